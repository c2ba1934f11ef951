"""The normal forms of several adapters of one kernel, and that of one of them.

Members of a stack that are alike are computed together. Where all of them are products of the same
two arrays, as LoRA and DoRA of any ranks are, the factors are these arrays, and at most an ``a`` is
computed for each. Where scales differ they are multiplied into the factors here, and not in what is
trained.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lora_jax._compat import is_traced
from lora_jax.core._adapter import Adapter
from lora_jax.core._adapter_stack import AdapterStack, Member
from lora_jax.core._meshes import left_to_compiler
from lora_jax.core._numerics import float32_or_more
from lora_jax.core.products._dequantized import computed_of
from lora_jax.core.products._normal_form import NOTHING, PLAIN, SCALED, dense, low_rank, normalized
from lora_jax.core.products._row_ids import BASE, nan_where, taken
from lora_jax.core.variants._apply_variant import Known, known, low_rank_form
from lora_jax.core.variants._variant import NormalForm


class Group(NamedTuple):
    """Members of a stack that are alike, and so are computed together.

    Attributes:
      which: their places in the stack.
      member: one of them.
      known: what is known of their normal form.
    """

    which: tuple[int, ...]
    member: Member
    known: Known


def _groups(stack: AdapterStack, shape: tuple[int, ...]) -> list[Group]:
    """The members that are present, by what is alike."""
    d, k = stack.axes.matrix_shape(shape)
    groups: dict[Any, list[int]] = {}
    for i, member in enumerate(stack.members):
        if member.present:
            rank = None if member.may_be_padded() else member.rank
            groups.setdefault((member.variant, member.parts, rank), []).append(i)
    out = []
    for which in groups.values():
        member = stack.members[which[0]]
        widest = max((stack.members[i] for i in which), key=lambda member: member.rank)
        found = known(member.variant, d, k, widest.rank) or dense(d, k)
        out.append(Group(tuple(which), widest, found))
    return out


def normalized_stack(kernel: chex.Array, stack: AdapterStack) -> Adapter:
    """All adapters of a stack as their layer has them, with their axis in front.

    Where scales differ they are multiplied into the factors here, and not in what is trained.

    Args:
      kernel: as it is stored.
      stack: its adapters.
    """
    groups = _groups(stack, kernel.shape)
    scale = _one_scale(stack)
    names = _forwarded(stack, groups)
    has_a = any(group.known.has_a for group in groups)
    arrays: dict[str, Any] = {}
    if names is not None and scale is not None:
        arrays = {"U": stack.arrays[names[0]], "V": stack.arrays[names[1]]}
    if has_a or not arrays:
        *lead, d, k = stack.axes.matrix_spec(kernel)
        like = {"m": PartitionSpec(None, *lead, k)} if has_a else {}
        if not arrays:
            like |= {
                "U": PartitionSpec(None, *lead, d, None),
                "V": PartitionSpec(None, *lead, None, k),
            }
        form = functools.partial(_stack_form, names=tuple(like))
        compute = functools.partial(computed_of, form)
        arrays |= left_to_compiler(compute, kernel, stack, like=like)
    rates = _rates(stack)
    rate = rates if len(set(rates)) > 1 else rates[0]
    return _layer_adapter(stack, arrays, scale).replace(dropout=rate)


@functools.partial(jax.jit, static_argnames=("names",))
def _stack_form(
    kernel: chex.Array, stack: AdapterStack, *, names: tuple[str, ...]
) -> dict[str, chex.Array]:
    """Those of ``a``, ``L`` and ``R`` that have to be computed, ``(n, *stack, ...)``."""
    groups, count = _groups(stack, kernel.shape), len(stack.members)
    W = stack.axes.as_matrix(kernel)
    wide = float32_or_more(W.dtype)
    *lead, d, k = W.shape
    forwarded, fold = _forwarded(stack, groups), _one_scale(stack) is None
    q = max(group.known.width for group in groups) or 1
    factors = "U" in names
    out: dict[str, Any] = {}
    if "m" in names:
        out["m"] = jnp.ones((count, *lead, k), wide)
    if factors and forwarded is not None:
        out |= {"U": stack.arrays[forwarded[0]], "V": stack.arrays[forwarded[1]]}
        scales = jnp.array([member.scale for member in stack.members], out["U"].dtype)
        out["U"] = out["U"] * jnp.reshape(scales, (count, *(1,) * (out["U"].ndim - 1)))
    elif factors:
        out |= {"U": jnp.zeros((count, *lead, d, q), wide)}
        out |= {"V": jnp.zeros((count, *lead, q, k), wide)}
    for which, member, found in groups:
        if not (found.has_a or (factors and forwarded is None)):
            continue
        form = _group_form(stack, which, member, W)
        if form.a is not None:
            out["m"] = _put(stack, out["m"], which, member, form.a)
        if factors and forwarded is None:
            s = jnp.array([stack.members[i].scale if fold else 1.0 for i in which], wide)
            L = form.L * jnp.reshape(s, (len(which), *(1,) * (form.L.ndim - 1))) if fold else form.L
            out["U"] = _put(stack, out["U"], which, member, _padded(L, -1, q))
            out["V"] = _put(stack, out["V"], which, member, _padded(form.R, -2, q))
    return out


def _group_form(
    stack: AdapterStack, which: tuple[int, ...], member: Member, W: chex.Array
) -> NormalForm:
    """The normal forms of members that are alike, ``(n, *stack, ...)``."""
    parts = stack.parts_of(member)
    W = W if parts is None else W[..., parts, :, :]
    scales = [stack.members[i].scale for i in which]
    arrays = stack.arrays_of(which, member)
    if len(set(scales)) == 1:
        form = functools.partial(low_rank_form, member.variant, W, scales[0])
        return jax.vmap(form)(arrays)
    form = functools.partial(low_rank_form, member.variant, W)
    return jax.vmap(form)(jnp.array(scales, float32_or_more(W.dtype)), arrays)


def _put(
    stack: AdapterStack, whole: chex.Array, which: tuple[int, ...], member: Member, array: Any
) -> chex.Array:
    """The arrays of some members, and parts, in those of all."""
    parts = stack.parts_of(member)
    if parts is not None:
        array = _with_parts(whole[np.array(which)], array, parts, stack.stack_ndim)
    if len(which) == len(stack.members):
        return jnp.asarray(array)
    return whole.at[np.array(which)].set(array.astype(whole.dtype))


def _padded(array: chex.Array, axis: int, size: int) -> chex.Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, widths) if widths[axis][1] else array


def _forwarded(stack: AdapterStack, groups: list[Group]) -> tuple[str, str] | None:
    """The two arrays that are the factors of all members, as they are; ``None`` if none are."""
    names = {(group.known.left, group.known.right) for group in groups}
    # Parts that a member does not adapt are zeros in its arrays.
    if len(names) != 1:
        return None
    left, right = names.pop()
    return None if left is None or right is None else (left, right)


def _one_scale(stack: AdapterStack) -> float | None:
    """The scale of all members, or ``None`` where they differ."""
    scales = {member.scale for member in stack.members if member.present}
    return scales.pop() if len(scales) == 1 else None


def _rates(stack: AdapterStack) -> tuple[float, ...]:
    return tuple(member.dropout or 0.0 for member in stack.members)


def _layer_adapter(
    stack: AdapterStack, arrays: Mapping[str, chex.Array], scale: float | None
) -> Adapter:
    """A normal form as an adapter of its layer."""
    rank = arrays["U"].shape[-1]
    return Adapter(
        arrays=arrays,
        variant=SCALED if "m" in arrays else PLAIN,
        rank=rank,
        alpha=(1.0 if scale is None else scale) * rank,
        axes=stack.axes,
        materialize=stack.materialize,
        untied=stack.untied,
    )


def normalized_member(kernel: chex.Array, stack: AdapterStack, id_: chex.Array) -> Adapter:
    """One adapter of a stack as its layer has it; where the id is -1, what changes nothing.

    Args:
      kernel: as it is stored.
      stack: its adapters.
      id_: which one, a number.
    """
    groups, scale = _groups(stack, kernel.shape), _one_scale(stack)
    some = jnp.where(id_ == BASE, 0, id_)  # for the base the numbers of the first are not used
    if len(groups) == 1 and scale is not None and len(groups[0].which) == len(stack.members):
        member = groups[0].member
        arrays = {name: taken(stack.arrays[name], some, 0.0) for name, _ in member.shapes}
        one = stack.alone(member, arrays)
        form = normalized(kernel, one)
        form = form if form.variant in (PLAIN, SCALED) else low_rank(kernel, one)
    else:
        *lead, d, k = stack.axes.matrix_spec(kernel)
        like = {"U": PartitionSpec(*lead, d, None), "V": PartitionSpec(*lead, None, k)}
        if any(group.known.has_a for group in groups):
            like["m"] = PartitionSpec(*lead, k)
        compute = functools.partial(computed_of, _selected)
        selected = left_to_compiler(compute, kernel, stack, some, like=like)
        form = _layer_adapter(stack, selected, 1.0)
    arrays = {n: jnp.where(id_ == BASE, NOTHING[n], array) for n, array in form.arrays.items()}
    return form.replace(arrays=arrays, dropout=_rate_of(stack, id_))


@jax.jit
def _selected(kernel: chex.Array, stack: AdapterStack, id_: chex.Array) -> dict[str, chex.Array]:
    """``a``, ``s L`` and ``R`` of one member: each group computes those of one of its own."""
    groups, count = _groups(stack, kernel.shape), len(stack.members)
    W = stack.axes.as_matrix(kernel)
    wide = float32_or_more(W.dtype)
    *lead, d, k = W.shape
    q = max(group.known.width for group in groups) or 1
    out = {"U": jnp.zeros((*lead, d, q), wide), "V": jnp.zeros((*lead, q, k), wide)}
    if any(group.known.has_a for group in groups):
        out["m"] = jnp.ones((*lead, k), wide)
    for which, member, _ in groups:
        own, first = np.isin(np.arange(count), which), which[0]
        is_own = jnp.take(jnp.array(own), id_, mode="clip")
        at = jnp.where(is_own, id_, first)
        parts = stack.parts_of(member)
        scales = jnp.array([m.scale for m in stack.members], wide)
        s = jnp.take(scales, at, mode="clip")
        whole = {name: array[None] for name, array in stack.arrays_at(at).items()}
        one = stack.replace(arrays=whole, members=(member,))
        arrays = {name: array[0] for name, array in one.arrays_of((0,), member).items()}
        form = low_rank_form(member.variant, W if parts is None else W[..., parts, :, :], s, arrays)
        new = {"U": _padded(s * form.L, -1, q), "V": _padded(form.R, -2, q)}
        if form.a is not None:
            new["m"] = form.a
        for name, array in new.items():
            if parts is not None:
                array = _with_parts(out[name], array, parts, len(lead) - 1)
            out[name] = jnp.where(is_own, array, out[name])
    unknown = nan_where((id_ < 0) | (id_ >= count)).astype(wide)
    return {name: array + unknown for name, array in out.items()}


def _with_parts(whole: chex.Array, some: chex.Array, parts: Any, axis: int) -> chex.Array:
    """The array, with other values for some parts of fused kernels."""
    moved = jnp.moveaxis(whole, axis, 0)
    moved = moved.at[parts].set(jnp.moveaxis(some, axis, 0).astype(whole.dtype))
    return jnp.moveaxis(moved, 0, axis)


def _rate_of(stack: AdapterStack, id_: chex.Array) -> float | None:
    """The rate of dropout of a member; ``None`` where they differ, and the id is not known."""
    rates = set(_rates(stack))
    if len(rates) == 1:
        return rates.pop()
    if is_traced(id_):
        return None
    return 0.0 if int(id_) == BASE else _rates(stack)[int(id_)]
