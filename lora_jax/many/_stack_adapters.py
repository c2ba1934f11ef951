"""Adapters of one kernel as a stack: their arrays side by side, with zeros where one has less."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lora_jax.core._adapter import Adapter
from lora_jax.core._adapter_stack import AdapterStack, Member, same
from lora_jax.core._meshes import left_to_compiler, spec_of
from lora_jax.core.variants._lora import LoRA
from lora_jax.trees._shardings import follow

# Fields in which stacked adapters must agree: no padding makes up for them.
_ALIKE = ("materialize", "untied")


def check_alike(path: str, nodes: Sequence[Any]) -> None:
    """Checks that adapters of one kernel can stand side by side.

    Raises:
      ValueError: if they differ in what no zeros make up for.
    """
    axes = {dataclasses.replace(node.axes, parts=()) for node in nodes}
    alike = {name: {getattr(node, name) for node in nodes} for name in _ALIKE} | {"axes": axes}
    for name, values in alike.items():
        if len(values) > 1:
            raise ValueError(
                f"The adapters of {path!r} differ in {name}, {' and '.join(map(str, values))}: "
                f"they cannot be stacked."
            )
    changed = [node for node in nodes if node.changes_base]
    if changed and len({node.base_hash for node in nodes}) > 1:
        raise ValueError(
            f"The variant {changed[0].kind!r} of {path!r} has changed the base at the start, so "
            f"that its adapters cannot share it with others. Serve them apart, or merge them."
        )
    sizes = {_sizes(node) for node in nodes} - {None}
    if len(sizes) > 1:
        found = sorted(size for size in sizes if size is not None)
        raise ValueError(
            f"The adapters of {path!r} are for kernels of different shapes, {found[0]} and "
            f"{found[1]}. Are they for one model?"
        )


def stack_adapters(path: str, nodes: Sequence[Adapter | None]) -> AdapterStack:
    """Adapters of one kernel, each ``None`` where there is none, as one node.

    Args:
      path: of the kernel, for messages.
      nodes: the adapters.
    """
    present = [node for node in nodes if node is not None]
    check_alike(path, present)
    first = present[0]
    union = tuple(sorted({part for node in present for part in node.axes.parts}))
    axes = dataclasses.replace(first.axes, parts=union)
    ndims: dict[str, int] = {}
    for node in present:
        for name, ndim in node.matrix_ndims().items():
            if ndims.setdefault(name, ndim) != ndim:
                kinds = sorted({one.kind for one in present if name in one.matrix_ndims()})
                raise ValueError(
                    f"The adapters of {path!r} are of the variants {' and '.join(kinds)}, whose "
                    f"arrays {name!r} have different numbers of axes: they cannot be stacked. "
                    f"Rename one; or stack what lora_jax.cache_norm gives, for inference."
                )
    arrays = {}
    for name, ndim in ndims.items():
        own = [None if node is None else node.arrays.get(name) for node in nodes]
        has = [(node, array) for node, array in zip(nodes, own, strict=True) if array is not None]
        shapes = [np.shape(array)[np.ndim(array) - ndim :] for _, array in has]
        largest = tuple(map(max, zip(*shapes, strict=True))) if ndim else ()
        whole = [
            _at_parts(jnp.asarray(array), node, axes, first.stack_ndim, largest)
            for node, array in has
            if node is not None
        ]
        zeros, rest = jnp.zeros_like(whole[0]), iter(whole)
        arrays[name] = stack_arrays(*(zeros if array is None else next(rest) for array in own))
    return AdapterStack(
        arrays,
        same(tuple(_absent(axes.parts) if node is None else Member.of(node) for node in nodes)),
        axes,
        first.materialize,
        first.untied,
        first.base_hash,
    )


def _absent(parts: tuple[int, ...]) -> Member:
    """What stands for an adapter that is not there."""
    return Member(LoRA(), 1, 1.0, False, 0.0, parts, (), present=False)


def _at_parts(
    array: chex.Array, node: Adapter, axes: Any, stack_ndim: int, largest: tuple[int, ...]
) -> chex.Array:
    """The array with zeros behind its own rank, and for parts that the adapter does not adapt."""
    lead = array.ndim - len(largest)
    widths = [(0, 0)] * lead + [
        (0, size - own) for size, own in zip(largest, array.shape[lead:], strict=True)
    ]
    if any(after for _, after in widths):
        array = jnp.pad(array, widths)
    if node.axes.parts == axes.parts:
        return array
    parts = np.array([axes.parts.index(part) for part in node.axes.parts])
    array = jnp.moveaxis(array, stack_ndim - 1, 0)
    zeros = jnp.zeros((len(axes.parts), *array.shape[1:]), array.dtype)
    return jnp.moveaxis(zeros.at[parts].set(array), 0, stack_ndim - 1)


def stack_arrays(first: chex.Array, *others: chex.Array) -> chex.Array:
    """The arrays on a new axis in front, in a mesh sharded as the first."""

    def stacked(*arrays: chex.Array) -> chex.Array:
        widest = max((array.dtype for array in arrays), key=lambda dtype: dtype.itemsize)
        return jnp.stack([array.astype(widest) for array in arrays])

    like = PartitionSpec(None, *spec_of(first))
    out: chex.Array = left_to_compiler(stacked, first, *others, like=like)
    return follow(out, first)


def _sizes(node: Adapter) -> tuple[int, ...] | None:
    """``(*batch, d, k)``, without the parts of fused kernels, in which adapters may differ."""
    sizes = node.matrix_sizes()
    return None if sizes is None else (*sizes[: len(node.axes.batch)], *sizes[-2:])
