"""Leaves that adapters have fully trained, side by side, with the base's where one has none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from lora_jax.core._boxes import unbox
from lora_jax.core._fully_trained import as_node, raise_precision
from lora_jax.trees._leaves import check_floating


def check_kinds(path: str, nodes: Sequence[Any]) -> None:
    """Raises ValueError if a leaf is adapted in one of the trees and fully trained in another."""
    if len({node.in_base for node in nodes if node is not None}) > 1:
        raise ValueError(
            f"{path!r} is adapted in one of the adapters and fully trained in another, so they "
            f"cannot be stacked: merge the one into its parameter, or serve them apart."
        )


def fully_trained(path: str, node: Any, nodes: Sequence[Any], leaf: Any) -> Any:
    """The leaf of one adapter, or that of the base.

    Args:
      path: of the leaf.
      node: that of the adapter, or ``None``.
      nodes: those of all.
      leaf: that of the base, or ``None``.

    Raises:
      ValueError: if the base is needed and not known, or if shapes or dtypes differ.
    """
    if node is None:
        base_leaf(path, leaf)  # or says that it is missing
        node = as_node(raise_precision(path, leaf))
    like = next(one for one in nodes if one is not None)
    kinds = [str(jax.tree.map(jnp.shape, one.as_leaf())) for one in (node, like)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{path!r} was fully trained, in different shapes or dtypes: {' and '.join(kinds)}."
        )
    return node


def base_leaf(path: str, leaf: Any) -> chex.Array:
    """The array of the base.

    Raises:
      ValueError: if there is none.
    """
    if leaf is None:
        raise ValueError(
            f"Not all of the adapters have {path!r}, which one has fully trained: pass the model's "
            f"parameters too, lora_jax.stack(adapters, params)."
        )
    check_floating(path, leaf, "params has")
    return jnp.asarray(unbox(leaf))
