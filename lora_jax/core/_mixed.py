"""Products of a batch in which every row has an adapter of its own, or none.

The product with ``W`` is computed once, for the whole batch. What the adapters add is computed row
by row, which ``jax.vmap`` makes batched products of, in one of two ways:

    gather    s (x U_i) V_i, with the factors of each row's own adapter i
    one-hot   s (x [U_0 | U_1 | ...]) * [0 | 1 | 0 ...] [V_0; V_1; ...], with all of them at once

**gather** copies ``r (d + k)`` numbers for each row. **one-hot** copies nothing, but multiplies
with the factors of all ``N`` adapters, ``N`` times the arithmetic: it is better with few adapters
and few tokens in a row. ``docs/benchmarks.md`` has the numbers, and those of
``jax.lax.ragged_dot``. A row that is not finite stays alone in both, but in the gradient of one-hot
it reaches all adapters of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lora_jax._compat import is_traced
from lora_jax.core._axes import KernelAxes
from lora_jax.core._equation import Equation
from lora_jax.core._meshes import left_to_compiler, spec_of
from lora_jax.core._product import (
    Factors,
    Product,
    factored_product,
    low_rank_linear,
    on_cpu,
    refuse,
    refuse_ways,
    scaled,
)

# The id of a row that has the base alone.
BASE = -1

# What takes as long as a multiplication with the factors of all adapters, as measured on CPUs: to
# copy a number is as many of them; and of the first FEW vectors of a row, a multiplication with its
# own factors is as many.
COPY, SMALL, FEW = 4, 5, 16


def checked_ids(adapter_ids: Any, count: int) -> chex.Array:
    """Ids as an array of integers; where they are known, each must be that of an adapter, or -1."""
    ids = adapter_ids if isinstance(adapter_ids, jax.Array) else np.asarray(adapter_ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"adapter_ids must be integers, got {ids.dtype}.")
    if not is_traced(ids) and getattr(ids, "is_fully_addressable", True):
        wrong = [int(i) for i in np.unique(np.asarray(ids)) if not BASE <= i < count]
        if wrong:
            raise ValueError(
                f"adapter_ids has {wrong[0]}, but there are {count} adapters: ids are 0 to "
                f"{count - 1}, and {BASE} for the base alone."
            )
    # In 8 bits -1 may be 255, and there may be no 200.
    return jnp.asarray(ids).astype(jnp.int32)


def presence(ids: chex.Array, count: int) -> chex.Array:
    """1 where there is such an adapter, 0 for the base, NaN for an id that is neither."""
    return jnp.where(ids == BASE, 0.0, 1.0) + nan_where((ids < BASE) | (ids >= count))


def nan_where(wrong: chex.Array) -> chex.Array:
    """NaN where something is wrong, and else 0.

    Where nothing is, no NaN is written, for which users may have told JAX to look.

    Example:
      >>> nan_where(jnp.array([False, True])).tolist()
      [0.0, nan]
    """
    return 0.0 / jnp.where(wrong, 0.0, 1.0)


def taken(array: chex.Array, ids: chex.Array, base: float | chex.Array) -> chex.Array:
    """``array[ids]``, and the value for the base where the id is -1."""

    def take(array: chex.Array, ids: chex.Array, base: chex.Array) -> chex.Array:
        rows = jnp.take(array, ids, axis=0, mode="clip")
        own = (...,) + (None,) * (rows.ndim - ids.ndim)
        if not jnp.issubdtype(array.dtype, jnp.inexact):
            return jnp.where((ids == BASE)[own], base, rows)
        has = presence(ids, array.shape[0])[own].astype(array.dtype)
        return jnp.where((ids == BASE)[own], base, rows * has)

    like = PartitionSpec(*(None,) * ids.ndim, *spec_of(array)[1:])
    rows: chex.Array = left_to_compiler(take, array, ids, jnp.asarray(base, array.dtype), like=like)
    return rows


@flax.struct.dataclass
class Ids:
    """Which of several adapters a row of the batch has, beside a kernel.

    Attributes:
      ids: of the row, or of each of its tokens, repeated along the axes that stack the kernel,
        so that transforms slice them alike.
      shape: of the ids: ``()``, or ``(1, tokens)``.
      count: number of adapters.
    """

    ids: Any
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
    count: int = flax.struct.field(pytree_node=False)

    @classmethod
    def beside(
        cls, ids: chex.Array, count: int, axes: KernelAxes, kernel_shape: Sequence[int]
    ) -> Ids:
        """The ids in the place for a kernel of that shape."""
        stacks = (kernel_shape[axis] for axis in axes.batch)
        repeated = jnp.broadcast_to(jnp.reshape(ids, -1), (*stacks, ids.size))
        return cls(axes.place(repeated, 1), ids.shape, count)

    def in_layer(self, axes: KernelAxes, kernel_shape: Sequence[int]) -> chex.Array:
        """The ids, in a layer that sees these axes of the kernel."""
        stacks = tuple(kernel_shape[axis] for axis in axes.batch)
        ids = axes.take(self.ids, 1, (*stacks, math.prod(self.shape)))
        assert ids is not None  # as the factors, which are taken before, were
        return jnp.reshape(ids[(0,) * len(stacks)], self.shape)


def check_tokens(ids: chex.Array, shape: Sequence[int], path: str) -> None:
    """Errors where the first axes of a layer's input are not those of the ids."""
    if tuple(shape[: ids.ndim]) != ids.shape:
        raise ValueError(
            f"Of one row adapter_ids is {ids.shape}, but the layer of {path!r} gets an input of "
            f"shape {tuple(shape)}, whose first axes are not its tokens. Give one id for each row."
        )


def over_rows(
    function: Callable[..., Any], ndim: int, in_axes: Sequence[Any], out_axes: Sequence[int]
) -> Callable[..., Any]:
    """``jax.vmap`` over each of the axes of the ids.

    Args:
      function: of one row.
      ndim: number of axes of the ids.
      in_axes: for each argument ``None``, or the places of those axes in it.
      out_axes: likewise, of the result.
    """
    for axis in reversed(range(ndim)):
        # The axes before this one are mapped further out, and are gone here.
        own = [None if axes is None else axes[axis] - _below(axes, axis) for axes in in_axes]
        function = jax.vmap(function, tuple(own), out_axes[axis] - _below(out_axes, axis))
    return function


def _below(axes: Sequence[int], axis: int) -> int:
    return sum(axes[i] < axes[axis] for i in range(axis))


def way_for(count: int, vectors: Any, copied: int, multiplied: int) -> str:
    """The way that takes less time.

    Args:
      count: number of adapters.
      vectors: how many the layer multiplies for one id.
      copied: size of the factors of one adapter.
      multiplied: multiplications of one vector with them.

    Example:
      >>> way_for(4, vectors=128, copied=8 * 768, multiplied=8 * 768)
      'gather'
      >>> way_for(4, vectors=8, copied=8 * 768, multiplied=8 * 768)
      'one-hot'
    """
    # A symbolic number of vectors, of jax.export, cannot be compared.
    if not isinstance(vectors, int):
        return "gather"
    own = (vectors + (SMALL - 1) * min(vectors, FEW)) * multiplied
    return "gather" if COPY * copied + own < count * vectors * multiplied else "one-hot"


def mixed_einsum(
    equation: Equation,
    x: chex.Array,
    W: chex.Array,
    factors: Factors,
    ids: chex.Array,
    *,
    base: Product | None = None,
    transposed: bool = False,
    precision: jax.lax.PrecisionLike = None,
    dropped_x: chex.Array | None = None,
) -> chex.Array:
    """:func:`adapted_einsum` of a batch of rows.

    Args:
      equation: ``x,W->y``.
      x: the input, whose first axes are those of the ids.
      W: the kernel in the compute dtype.
      factors: of all adapters, on an axis in front.
      ids: which adapter each row has.
      base: as there; alike the others.
      transposed: as there.
      precision: as there.
      dropped_x: as there.
    """
    if factors.way == "dense":
        refuse(factors, "the rows of the batch have different adapters")
    n = ids.ndim
    rows = tuple(range(n))
    letters = equation.x[:n]
    check_tokens(ids, x.shape, factors.path)
    if not all(c in equation.y and c not in equation.W for c in letters):
        raise ValueError(
            f"Of one row adapter_ids is {ids.shape}, but the first axes of the input of the layer "
            f"of {factors.path!r} are contracted or stack its kernels, as in "
            f"'{equation.x},{equation.W}->{equation.y}', so they are not its tokens. Give one id "
            f"for each row."
        )
    in_y = tuple(equation.y.index(c) for c in letters)
    one = equation.of_row(n)
    U, V, a = factors.U, factors.V, factors.a
    dropped_x = x if dropped_x is None else dropped_x
    if transposed:
        U, V = V.swapaxes(-1, -2), U.swapaxes(-1, -2)
        if a is not None:

            def scale(a: chex.Array, ids: chex.Array, x: chex.Array) -> Any:
                by_row = over_rows(lambda a, x: scaled(one.on_x(a), x), n, (rows, rows), rows)
                return by_row(taken(a, ids, 1.0), x)

            x, dropped_x = (left_to_compiler(scale, a, ids, x, like=x) for x in (x, dropped_x))
            a = None
    y = equation.product(x, W, precision) if base is None else base(x, W)
    count, (d, r), k = len(U), U.shape[-2:], V.shape[-1]
    outer = factors.way == "outer"
    size = (U.size + V.size) // count
    way = "gather" if outer else way_for(count, one.rows, size, r * (d + k))

    def product(y: Any, x: Any, U: Any, V: Any, a: Any, mask: Any) -> chex.Array:
        return factored_product(
            y,
            x,
            U,
            V,
            a,
            mask=mask,
            outer=outer,
            equation=one,
            s=factors.s,
            precision=precision,
            on_cpu=on_cpu(),
        )

    add = _adding(product, way, in_y)
    return left_to_compiler(add, y, dropped_x, U, V, a, ids, like=y)


def mixed_linear(
    linear: Product,
    x: chex.Array,
    W: chex.Array,
    factors: Factors,
    axes: KernelAxes,
    ids: chex.Array,
    *,
    base: Product,
    groups: int = 1,
    precision: jax.lax.PrecisionLike = None,
    dropped_x: chex.Array | None = None,
) -> chex.Array:
    """:func:`adapted_linear` of a batch of rows: see :func:`mixed_einsum`."""
    refuse_ways(factors)
    n = ids.ndim
    rows = tuple(range(n))
    y = base(x, W)
    check_tokens(ids, x.shape, factors.path)
    check_tokens(ids, y.shape, factors.path)
    U, V = factors.U, factors.V
    count, (d, r), k = len(U), U.shape[-2:], V.shape[-1]
    looks_up = not jnp.issubdtype(x.dtype, jnp.inexact)
    vectors = y.size // (k * ids.size) if isinstance(y.size, int) else y.size
    multiplied = r * (1 if looks_up else d) + r * k
    way = way_for(count, vectors, (U.size + V.size) // count, multiplied)

    def product(y: Any, x: Any, U: Any, V: Any, a: Any, mask: Any) -> chex.Array:
        own = factors._replace(U=U, V=V, a=a)
        batch = (None,) * n  # the layer may need to have them
        y, x = y[batch], x[batch]
        y = low_rank_linear(
            linear, y, x, W, own, axes, groups=groups, mask=mask, precision=precision
        )
        return y[(0,) * n]

    add = _adding(product, way, rows)
    x = x if dropped_x is None else dropped_x
    return left_to_compiler(add, y, x, U, V, factors.a, ids, like=y)


def _adding(product: Callable[..., Any], way: str, in_y: tuple[int, ...]) -> Callable[..., Any]:
    """A function of ``y, x``, all factors and the ids, from one of a row's own factors.

    Args:
      product: of ``y, x, U, V, a, mask`` of one row.
      way: how the factors are laid out.
      in_y: the axes of the rows in ``y``; in ``x`` they are the first.
    """
    rows = tuple(range(len(in_y)))

    def add(y: Any, x: Any, U: Any, V: Any, a: Any, ids: Any) -> Any:
        ids = after(ids, x)
        a = None if a is None else taken(a, ids, 1.0)
        (U, V, mask), shared = laid_out(way, U, V, ids)
        in_axes = (in_y, rows, shared, shared, rows, rows)
        return over_rows(product, len(in_y), in_axes, in_y)(y, x, U, V, a, mask)

    return add


def after(ids: chex.Array, x: chex.Array) -> chex.Array:
    """The ids, in a form that cannot be computed before ``x``.

    On CPUs XLA runs early what it can, and so copies the factors for all rows of all layers before
    the first layer: they would be in memory at once, and out of the caches when they are used. It
    takes no notice of ``jax.lax.optimization_barrier`` there. So 0 is added to the ids, made from a
    number of ``x`` by two shifts.

    Example:
      >>> after(jnp.array([2, -1]), jnp.array([jnp.nan, 1.0]))
      Array([ 2, -1], dtype=int32)
    """
    if not on_cpu() or x.dtype.itemsize > 4 or 0 in x.shape:
        return ids
    bits = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    one = jax.lax.stop_gradient(x)[(0,) * x.ndim]
    half = bits.type(4 * bits.itemsize)
    number = jax.lax.bitcast_convert_type(one, bits)
    zero = jax.lax.shift_right_logical(jax.lax.shift_right_logical(number, half), half)
    return ids + zero.astype(ids.dtype)


def laid_out(
    way: str, U: chex.Array, V: chex.Array, ids: chex.Array
) -> tuple[tuple[chex.Array, chex.Array, chex.Array | None], tuple[int, ...] | None]:
    """The factors and the mask for a way, and the axes of the rows in the factors, if they are."""
    if way == "gather":
        return (taken(U, ids, 0.0), taken(V, ids, 0.0), None), tuple(range(ids.ndim))
    return all_at_once(U, V, ids), None


def all_at_once(
    U: chex.Array, V: chex.Array, ids: chex.Array
) -> tuple[chex.Array, chex.Array, chex.Array]:
    """``[U_0 | U_1 | ...]``, ``[V_0; V_1; ...]`` and which columns a row has, ``(*rows, N r)``.

    An adapter that is not finite would reach into all rows, as ``0 * NaN`` is NaN: it is zero here,
    and its own rows are NaN.

    Args:
      U: ``(N, *stack, d, r)``.
      V: ``(N, *stack, r, k)``.
      ids: of the rows.
    """
    count, r = len(U), U.shape[-1]
    finite = jnp.isfinite(U).reshape(count, -1).all(1) & jnp.isfinite(V).reshape(count, -1).all(1)
    U, V = (jnp.where(finite[(...,) + (None,) * (x.ndim - 1)], x, 0) for x in (U, V))
    known = (presence(ids, count) + nan_where(~taken(finite, ids, True)))[..., None]
    own = jax.nn.one_hot(ids, count, dtype=bool) | jnp.isnan(known)
    mask = jnp.repeat(jnp.where(own, known, 0.0), r, axis=-1)
    U, V = jnp.moveaxis(U, 0, -2), jnp.moveaxis(V, 0, -3)
    U = jnp.reshape(U, (*U.shape[:-2], -1))
    return U, jnp.reshape(V, (*V.shape[:-3], -1, V.shape[-1])), mask
