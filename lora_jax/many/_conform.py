"""Adapters of one kernel brought to one structure and one shape, computing what they did.

A smaller rank is padded with zeros, a part of fused kernels that is not adapted gets zeros, scales
that differ go into ``U``, and where there is DoRA too, LoRA gets the ``m`` with which DoRA computes
the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core._adapter import Adapter
from lora_jax.core._boxes import unbox
from lora_jax.core._fully_trained import as_node, raise_precision
from lora_jax.core._variants import float32_or_more
from lora_jax.core.products._norm import dense_norm
from lora_jax.many._cache_norm import with_cached_norm
from lora_jax.trees._leaves import check_floating

# Fields in which stacked adapters must agree: no padding makes up for them.
_ALIKE = ("materialize", "untied")


def common(path: str, nodes: Sequence[Any]) -> Any:
    """What nodes of one leaf can all be brought to.

    Returns:
      The static fields that they shall have, as an :class:`Adapter` whose ``U`` and ``V`` are of
      the shapes of one; or, for a fully trained leaf, any of the nodes.
    """
    first = nodes[0]
    if not all(node.in_base == first.in_base for node in nodes):
        raise ValueError(
            f"{path!r} is adapted in one of the adapters and fully trained in another, so they "
            f"cannot be stacked: merge the one into its parameter, or serve them apart."
        )
    if not first.in_base:
        return first
    variants = {node.variant for node in nodes}
    variant = next(name for name in ("scaled", "dora", "lora") if name in variants)
    axes = {dataclasses.replace(node.axes, parts=()) for node in nodes}
    alike = {name: {getattr(node, name) for node in nodes} for name in _ALIKE} | {"axes": axes}
    for name, values in alike.items():
        if len(values) > 1:
            raise ValueError(
                f"The adapters of {path!r} differ in {name}, {' and '.join(map(str, values))}: "
                f"they cannot be stacked."
            )
    parts = sorted({part for node in nodes for part in node.axes.parts})
    rank, scales = max(node.rank for node in nodes), {node.scale for node in nodes}
    dropouts, products = {node.dropout for node in nodes}, {node.product for node in nodes}
    if {(node.rank, node.alpha, node.rslora) for node in nodes} == {
        (rank, first.alpha, first.rslora)
    }:
        alpha, rslora = first.alpha, first.rslora
    else:
        alpha, rslora = rank * (scales.pop() if len(scales) == 1 else 1.0), False
    return first.replace(
        variant=variant,
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        detach_norm=all(node.detach_norm for node in nodes if node.variant == variant),
        axes=dataclasses.replace(first.axes, parts=tuple(parts)),
        dropout=dropouts.pop() if len(dropouts) == 1 else None,
        product=products.pop() if len(products) == 1 else "auto",
    )


def conform(path: str, node: Any, like: Any, leaf: Any) -> Any:
    """A node with the structure of ``like``, which computes the same.

    Args:
      path: of the parameter.
      node: an adapter, a fully trained leaf, or ``None`` where there is neither.
      like: of :func:`common`.
      leaf: the parameter, or ``None``.
    """
    if not like.in_base:
        if node is None:
            _leaf(path, leaf)  # or says that it is missing
            node = as_node(raise_precision(path, leaf))
        kinds = [str(jax.tree.map(jnp.shape, one.as_leaf())) for one in (node, like)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"{path!r} was fully trained, in different shapes or dtypes: {' and '.join(kinds)}."
            )
        return node
    if node is None:
        node = _nothing(like)
    elif _matrices(node) != _matrices(like):
        found = _matrices(node), _matrices(like)
        raise ValueError(
            f"The adapters of {path!r} are for kernels of different shapes, {found[0]} and "
            f"{found[1]}. Are they for one model?"
        )
    same = {name: getattr(like, name) for name in ("rank", "alpha", "rslora", "axes")}
    if (
        like.m is None
        and like.variant == "lora"
        and all(getattr(node, name) == value for name, value in same.items())
    ):
        return like.replace(U=jnp.asarray(node.U), V=jnp.asarray(node.V))
    s = node.scale / like.scale
    U = jnp.asarray(node.U) if s == 1.0 else s * jnp.asarray(node.U)
    parts = [like.axes.parts.index(part) for part in node.axes.parts]
    pad = like.rank - node.rank
    U = _at_parts(_padded(U, -1, pad), parts, like, -3)
    V = _at_parts(_padded(jnp.asarray(node.V), -2, pad), parts, like, -3)
    padded = like.replace(U=U, V=V, m=None)
    if like.variant == "lora":
        return padded
    everywhere = parts == list(range(len(like.axes.parts)))
    if like.variant == node.variant and everywhere:
        return padded.replace(m=jnp.asarray(node.m))
    if like.variant == "scaled":
        dtype = V.dtype if leaf is None else float32_or_more(_leaf(path, leaf).dtype)
        m = jnp.ones((*V.shape[:-2], V.shape[-1]), dtype)
        if node.variant == "dora":
            node.check_fits(path, _leaf(path, leaf).shape)
            node = with_cached_norm(_leaf(path, leaf), node)
    else:
        padded.replace(variant="lora").check_fits(path, _leaf(path, leaf).shape)
        m = dense_norm(_leaf(path, leaf), padded)
    if node.m is not None:
        trained = jnp.asarray(node.m)
        m = trained if everywhere else m.at[..., parts, :].set(trained.astype(m.dtype))
    return padded.replace(m=m)


def _matrices(adapter: Adapter) -> tuple[int, ...]:
    """``(*stacks, d, k)``."""
    stacks = adapter.U.shape[: len(adapter.axes.batch)]
    return (*stacks, adapter.U.shape[-2], adapter.V.shape[-1])


def _nothing(like: Adapter) -> Adapter:
    """An adapter that adds nothing, of rank 1."""
    U = jnp.zeros((*like.U.shape[:-1], 1), jnp.float32)
    V = jnp.zeros((*like.V.shape[:-2], 1, like.V.shape[-1]), jnp.float32)
    nothing: Adapter = like.replace(  # type: ignore[attr-defined]
        U=U, V=V, m=None, variant="lora", rank=1, alpha=1.0, rslora=False
    )
    if like.axes.fused > 1:
        first = dataclasses.replace(like.axes, parts=like.axes.parts[:1])
        nothing = nothing.replace(U=U[..., :1, :, :], V=V[..., :1, :, :], axes=first)  # type: ignore[attr-defined]
    return nothing


def _padded(array: chex.Array, axis: int, by: int) -> chex.Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, by)
    return jnp.pad(array, widths) if by else array


def _at_parts(array: chex.Array, parts: list[int], like: Adapter, axis: int) -> chex.Array:
    """The parts that an adapter has, among all that the stack has, and zeros."""
    count = len(like.axes.parts)
    if like.axes.fused == 1 or parts == list(range(count)):
        return array
    array = jnp.moveaxis(array, axis, 0)
    zeros = jnp.zeros((count, *array.shape[1:]), array.dtype)
    return jnp.moveaxis(zeros.at[np.array(parts)].set(array), 0, axis)


def _leaf(path: str, leaf: Any) -> chex.Array:
    if leaf is None:
        raise ValueError(
            f"Not all of the adapters have {path!r}, or they are of different variants there: pass "
            f"the model's parameters too, lora_jax.stack(adapters, params)."
        )
    check_floating(path, leaf, "params has")
    return jnp.asarray(unbox(leaf))
