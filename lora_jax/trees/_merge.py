"""Base and adapters as one tree of parameters: merged, or joined in another way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax.numpy as jnp

from lora_jax.core._adapter import Adapter
from lora_jax.core._boxes import content, is_quantized, rebox, unbox
from lora_jax.core._node import Node
from lora_jax.trees._pair import pair
from lora_jax.trees._paths import Key, path_of, unflatten
from lora_jax.trees._quantized_leaf import requantized_leaf
from lora_jax.trees._rounding import check_requantize, key_for, round_to
from lora_jax.trees._shardings import follow


def lora_merge(
    frozen: chex.ArrayTree,
    adapters: chex.ArrayTree,
    *,
    key: chex.PRNGKey | None = None,
    requantize: bool = False,
) -> chex.ArrayTree:
    """Merges adapters into the base: plain parameters for the plain model.

    ``W'`` is formed in float32 by the formula of the variant and cast once, to the
    dtype of the kernel. Nothing is changed in place, so there is nothing to unmerge. It can be
    jitted and differentiated. In 16 bits small updates are rounded away:
    :func:`lora_jax.rounding` says how many.

    Args:
      frozen: the base, as :func:`lora_init` returned it.
      adapters: the adapters, trained.
      key: round stochastically, up or down, so that the mean of many entries is right; by default
        to the nearest.
      requantize: quantize the merged kernels again that are quantized in the base, each as it was,
        to the nearest codes. By default they are floats, in the dtype that they dequantize to.
        Kernels without an adapter stay as they are.
        ``rounding(..., requantize=True)`` says how large the error is.

    Returns:
      Parameters with the structure, shapes and dtypes that ``lora_init`` was given.

    Raises:
      TypeError: if a tree is not a nested dict, or if adapters are as a file has them, of arrays
        only.
      ValueError: if the adapters do not fit this base, if the base is of integers, as the codes of
        a quantized one are, or if a leaf is in both trees.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=1)])
      >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}
      >>> frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config)
      >>> lora_jax.lora_merge(frozen, adapters)["kernel"]
      Array([[1., 1.],
             [1., 1.]], dtype=float32)
    """
    check_requantize(key, requantize)

    def merge(key_: Key, leaf: Any, node: Node) -> dict[Key, Any]:
        path = path_of(key_)
        node.check_merges(path)
        path_key = None if key is None else key_for(key, path)
        if requantize and isinstance(node, Adapter) and is_quantized(content(leaf)):
            return {key_: requantized_leaf(leaf, node.merge(unbox(leaf)), node.axes)}
        return {key_: merged_leaf(leaf, node, path_key)}

    return unflatten(join(frozen, adapters, merge), frozen)


def merged_leaf(leaf: Any, node: Node, key: chex.PRNGKey | None = None) -> Any:
    """The merged leaf, in the dtype and the box of the base's leaf.

    Args:
      leaf: of the base.
      node: what changes it.
      key: as for :func:`lora_merge`.
    """
    W = jnp.asarray(unbox(leaf))
    return rebox(leaf, follow(round_to(node.merge(W), W.dtype, key), content(leaf)))


def join(
    frozen: chex.ArrayTree,
    adapters: chex.ArrayTree,
    adapt: Callable[[Key, Any, Any], Mapping[Key, Any]],
    count: int | None = None,
    replace: Callable[[Key, Any, Any], Mapping[Key, Any]] | None = None,
) -> dict[Key, Any]:
    """Puts base and adapters together: the parameters by their keys.

    Args:
      frozen: the base.
      adapters: the adapters.
      adapt: gives the leaves for a leaf that the base has, from its key, the leaf and its node.
      count: how many adapters there are, where they are stacked.
      replace: gives the leaves for a stack of leaves that were fully trained, from their key, the
        leaf of the base, if there is one, and the node.

    Raises:
      TypeError: if :func:`pair` refuses the trees.
      ValueError: if it does, or if a node cannot be adapted.
    """
    flat, nodes = pair(frozen, adapters, count, either=replace is not None)
    for key, node in nodes.items():
        if node.in_base:
            flat |= adapt(key, flat[key], node)
        elif replace is not None:
            flat |= replace(key, flat.get(key), node)
        else:
            flat[key] = node.as_parameter()
    return flat
