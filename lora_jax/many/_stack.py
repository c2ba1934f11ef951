"""Adapters of one base side by side, brought to common shapes without a change of what they do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lora_jax.core._adapter import Adapter, LoraBias
from lora_jax.core._meshes import left_to_compiler, spec_of
from lora_jax.core._norm import dense_norm
from lora_jax.core._variants import float32_or_more, magnitude_ratio
from lora_jax.trees._checks import (
    base_of,
    check_factors,
    check_fits,
    check_floating,
    check_node,
    nodes_of,
)
from lora_jax.trees._paths import Key, flatten, path_of, unbox, unflatten
from lora_jax.trees._tree import raise_precision


def stack(
    adapters: Sequence[chex.ArrayTree], params: chex.ArrayTree | None = None
) -> chex.ArrayTree:
    """Stacks adapters of one base on a new axis in front.

    So one program serves them all, by ``lora_apply(..., adapter_ids=ids)``, or trains them all, by
    ``jax.vmap``. Each computes what it computed alone. Ranks are padded with zeros, which stay zero
    in training. An adapter that lacks a kernel that another one adapts gets a zero adapter there,
    and one that lacks a leaf that another one fully trained gets the base's. Beside DoRA, LoRA gets
    the magnitude ``m = ||W + s U V||_c``, with which DoRA's ``W'`` is ``W + s U V``.

    That is for what they compute. How they train is one way for all: beside DoRA, LoRA trains its
    ``m`` too; where some have ``detach_norm``, all have the exact gradient; where scales differ,
    ``s`` is multiplied into ``U``, and an optimizer's steps are others. (So to train several ranks
    side by side give them one scale, ``alpha = c * rank``.) Where rates of dropout differ, that it
    is active is an error.

    Adapters of equal structure, as from ``jax.vmap(lora_init, ...)`` over keys or a tree map of
    ``jnp.stack``, need no more than that.

    Args:
      adapters: the adapters, each as from :func:`lora_init` or :func:`load`.
      params: the model's parameters, all of them; needed only where one adapter lacks what another
        one has, or where LoRA is beside DoRA.

    Returns:
      One tree: every array has the number of adapters as its first size. ``jax.tree.map(lambda x:
      x[i], stacked)`` is adapter ``i`` alone.

    Raises:
      TypeError: trees of another kind.
      ValueError: no adapters; adapters of different models, or that differ in what no padding can
        hide; ``params`` is needed and missing. The message names the path.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lora_jax
      >>> model, x = nn.Dense(3), jnp.ones((4, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> a, b = (
      ...     lora_jax.lora_init(jax.random.key(r), params, lora_jax.LoraConfig([rule]))[1]
      ...     for r, rule in enumerate([
      ...         lora_jax.Rule("kernel", rank=1), lora_jax.Rule("kernel", rank=2, variant="dora")
      ...     ])
      ... )
      >>> stacked = lora_jax.stack([a, b], params)
      >>> stacked["kernel"].U.shape, stacked["kernel"].m.shape
      ((2, 5, 2), (2, 3))
      >>> ids = jnp.array([1, 0, -1, 1])  # -1 is the base alone
      >>> lora_jax.lora_apply(model, {"params": params}, stacked, x, adapter_ids=ids).shape
      (4, 3)
    """
    base = None if params is None else base_of(params, "params")
    trees = nodes_of_each(adapters, base)
    base = base or {}
    out: dict[Key, Any] = {}
    for key in dict.fromkeys(key for tree in trees for key in tree):
        nodes, leaf = [tree.get(key) for tree in trees], base.get(key)
        like = template(path_of(key), [node for node in nodes if node is not None])
        same = [conformed(path_of(key), node, like, leaf) for node in nodes]
        out[key] = jax.tree.map(_stacked, *same)
    return unflatten(out, adapters[0])


def _stacked(first: chex.Array, *others: chex.Array) -> chex.Array:
    """The arrays on a new axis in front, in a mesh sharded as the first."""

    def stacked(*arrays: chex.Array) -> chex.Array:
        widest = max((array.dtype for array in arrays), key=lambda dtype: dtype.itemsize)
        return jnp.stack([array.astype(widest) for array in arrays])

    like = PartitionSpec(None, *spec_of(first))
    whole: chex.Array = left_to_compiler(stacked, first, *others, like=like)
    return whole


def cache_norm(frozen: chex.ArrayTree, adapters: chex.ArrayTree) -> chex.ArrayTree:
    """Computes DoRA's norm once, for inference: ``m`` becomes ``a = m / ||W + s U V||_c``.

    Outputs stay the same, and a call of the model no longer computes a norm of every kernel, for
    each adapter that there is. (They may come nearer to the formula: the norm is computed with
    ``U V`` formed, which loses no digits where an adapter removes most of a column.) What is left
    is ``W' = a (W + s U V)``, which trains otherwise than DoRA, and which PEFT does not have: keep
    the adapters themselves.

    Args:
      frozen: the base, or all parameters of the model.
      adapters: one adapter, or several from :func:`stack`. LoRA stays as it is.

    Raises:
      TypeError: as :func:`lora_jax.lora_merge`.
      ValueError: adapters that do not fit the base, which may be stacked.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((4, 2))}
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=1, variant="dora")])
      >>> frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config)
      >>> lora_jax.cache_norm(frozen, adapters)["kernel"].m
      Array([1., 1.], dtype=float32)
    """
    base = base_of(frozen)
    out = flatten(adapters, "adapters")
    nodes = nodes_of(adapters, base=base)
    count = next((node.count for node in nodes.values() if isinstance(node, Adapter)), None)
    for key, node in nodes.items():
        check_node(key, node, base, count)
        if isinstance(node, Adapter) and node.variant == "dora":
            out[key] = _frozen(jnp.asarray(unbox(base[key])), node)
    return unflatten(out, adapters)


def nodes_of_each(
    adapters: Sequence[chex.ArrayTree], base: Mapping[Key, Any] | None, what: str = "adapters"
) -> list[dict[Key, Any]]:
    """The nodes of each tree by their keys, when they can be stacked.

    Args:
      adapters: the trees.
      base: the leaves of the model, where they are known.
      what: the name of the trees, for messages.
    """
    if isinstance(adapters, Mapping) or not isinstance(adapters, Iterable):
        raise TypeError(f"stack takes a list of adapters, got {type(adapters).__name__}.")
    trees = [nodes_of(tree, f"{what}[{i}]", base) for i, tree in enumerate(adapters)]
    if not trees:
        raise ValueError("There is nothing to stack: the list of adapters is empty.")
    for i, tree in enumerate(trees):
        for key, node in tree.items():
            if isinstance(node, LoraBias):
                raise ValueError(
                    f"{what}[{i}] adds something to {path_of(key)!r} (PEFT's lora_bias), which "
                    f"cannot be stacked: serve it apart."
                )
            if isinstance(node, Adapter) and node.count is not None:
                raise ValueError(
                    f"{what}[{i}] is a stack of {node.count} adapters already, at "
                    f"{path_of(key)!r}: stack adapters that are alone."
                )
            if isinstance(node, Adapter):
                check_factors(path_of(key), node, f"{what}[{i}]")
            if base is not None:
                check_node(key, node, base, name="params")
    return trees


# Facts of an adapter that are part of what it computes, and that nothing can hide.
_ALIKE = ("materialize", "untied")


def template(path: str, nodes: Sequence[Any]) -> Any:
    """What adapters of one kernel can all be brought to; nodes of fully trained leaves as they are.

    Returns:
      The static fields that they shall have, as an :class:`Adapter` whose ``U`` and ``V`` are of
      the shapes of one; or, for a fully trained leaf, any of the nodes.
    """
    first = nodes[0]
    if not all(isinstance(node, Adapter) == isinstance(first, Adapter) for node in nodes):
        raise ValueError(
            f"{path!r} is adapted in one of the adapters and fully trained in another, so they "
            f"cannot be stacked: merge the one into its parameter, or serve them apart."
        )
    if not isinstance(first, Adapter):
        return first
    variants = {node.variant for node in nodes}
    variant = next(name for name in ("scaled", "dora", "lora") if name in variants)
    wholes = {dataclasses.replace(node.axes, parts=()) for node in nodes}
    alike = {name: {getattr(node, name) for node in nodes} for name in _ALIKE} | {"axes": wholes}
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
    return first.replace(  # type: ignore[attr-defined]
        variant=variant,
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        detach_norm=all(node.detach_norm for node in nodes if node.variant == variant),
        axes=dataclasses.replace(first.axes, parts=tuple(parts)),
        dropout=dropouts.pop() if len(dropouts) == 1 else None,
        product=products.pop() if len(products) == 1 else "auto",
    )


def conformed(path: str, node: Any, like: Any, leaf: Any) -> Any:
    """A node with the structure of ``like``, which computes the same.

    Args:
      path: of the parameter.
      node: an adapter, a fully trained leaf, or ``None`` where there is neither.
      like: of :func:`template`.
      leaf: the parameter, or ``None``.
    """
    if not isinstance(like, Adapter):
        if node is None:
            _leaf(path, leaf)  # or says that it is missing
            node = raise_precision(path, leaf)
        wholes = [str(jax.tree.map(jnp.shape, x)) for x in (node, like)]
        if wholes[0] != wholes[1]:
            raise ValueError(
                f"{path!r} was fully trained, in different shapes or dtypes: "
                f"{' and '.join(wholes)}."
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
        return like.replace(U=jnp.asarray(node.U), V=jnp.asarray(node.V))  # type: ignore[attr-defined]
    s = node.scale / like.scale
    U = jnp.asarray(node.U) if s == 1.0 else s * jnp.asarray(node.U)
    parts = [like.axes.parts.index(part) for part in node.axes.parts]
    pad = like.rank - node.rank
    U = _spread(_padded(U, -1, pad), parts, like, -3)
    V = _spread(_padded(jnp.asarray(node.V), -2, pad), parts, like, -3)
    padded = like.replace(U=U, V=V, m=None)  # type: ignore[attr-defined]
    if like.variant == "lora":
        return padded
    everywhere = parts == list(range(len(like.axes.parts)))
    if like.variant == node.variant and everywhere:
        return padded.replace(m=jnp.asarray(node.m))
    if like.variant == "scaled":
        dtype = V.dtype if leaf is None else float32_or_more(_leaf(path, leaf).dtype)
        m = jnp.ones((*V.shape[:-2], V.shape[-1]), dtype)
        if node.variant == "dora":
            check_fits(path, _leaf(path, leaf), node)
            node = _frozen(_leaf(path, leaf), node)
    else:
        check_fits(path, _leaf(path, leaf), padded.replace(variant="lora"))
        m = dense_norm(_leaf(path, leaf), padded)
    if node.m is not None:
        own = jnp.asarray(node.m)
        m = own if everywhere else m.at[..., parts, :].set(own.astype(m.dtype))
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


def _spread(array: chex.Array, parts: list[int], like: Adapter, axis: int) -> chex.Array:
    """The parts that an adapter has, among all that the stack has, and zeros."""
    count = len(like.axes.parts)
    if like.axes.fused == 1 or parts == list(range(count)):
        return array
    array = jnp.moveaxis(array, axis, 0)
    zeros = jnp.zeros((count, *array.shape[1:]), array.dtype)
    return jnp.moveaxis(zeros.at[np.array(parts)].set(array), 0, axis)


def _frozen(kernel: chex.Array, adapter: Adapter) -> Adapter:
    norm = dense_norm(kernel, adapter)
    a = magnitude_ratio(jnp.asarray(adapter.m).astype(norm.dtype), norm)
    return adapter.replace(m=a, variant="scaled", detach_norm=False)  # type: ignore[attr-defined, no-any-return]


def _leaf(path: str, leaf: Any) -> chex.Array:
    if leaf is None:
        raise ValueError(
            f"Not all of the adapters have {path!r}, or they are of different variants there: pass "
            f"the model's parameters too, lora_jax.stack(adapters, params)."
        )
    check_floating(path, leaf, "params has")
    return jnp.asarray(unbox(leaf))
