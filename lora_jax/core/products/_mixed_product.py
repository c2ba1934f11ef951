"""Products of a batch in which each row has its own adapter, or none.

The product with ``W`` is computed once, for the whole batch. What the adapters add is written
for one row, and ``jax.vmap`` makes batched products of it; ``_row_factors.py`` has the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from lora_jax.core._axes import KernelAxes
from lora_jax.core._meshes import left_to_compiler
from lora_jax.core.products._einsum_equation import Equation
from lora_jax.core.products._factored import Product, factored_linear, factored_product, scaled
from lora_jax.core.products._layer_factors import LayerFactors
from lora_jax.core.products._platform import by_choice
from lora_jax.core.products._product import refuse_product, transposed_factors
from lora_jax.core.products._row_factors import choices, ids_after, row_factors
from lora_jax.core.products._row_ids import check_tokens, taken


def mixed_einsum(
    equation: Equation,
    x: chex.Array,
    W: chex.Array,
    factors: LayerFactors,
    ids: chex.Array,
    *,
    base: Product | None = None,
    transposed: bool = False,
    precision: jax.lax.PrecisionLike = None,
    x_in: chex.Array | None = None,
) -> chex.Array:
    """``adapted_einsum`` of a batch of rows.

    Args:
      equation: ``x,W->y``.
      x: the input, whose first axes are those of the ids.
      W: the kernel in the compute dtype.
      factors: of all adapters, on an axis in front.
      ids: which adapter each row has.
      base: the layer's own product of ``x`` and ``W``, if it is more than the einsum.
      transposed: the product is with the transposed matrix, ``x W'^T``.
      precision: of the products.
      x_in: the input of the factors, with their dropout; ``x`` by default.

    Raises:
      ValueError: if the call wants a dense product, or the ids are not those of the first axes.
    """
    if factors.product == "dense":
        refuse_product(factors, "the rows of the batch have different adapters")
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
    of_row = equation.of_row(n)
    U, V, a = factors.U, factors.V, factors.a
    x_in = x if x_in is None else x_in
    assert V is not None  # of several adapters there are always factors
    if transposed:
        U, V = transposed_factors(U, V)
        if a is not None:

            def scale(a: chex.Array, ids: chex.Array, x: chex.Array) -> Any:
                by_row = vmap_rows(lambda a, x: scaled(of_row.on_x(a), x), n, (rows, rows), rows)
                return by_row(taken(a, ids, 1.0), x)

            x, x_in = (left_to_compiler(scale, a, ids, x, like=x) for x in (x, x_in))
            a = None
    y = equation.product(x, W, precision) if base is None else base(x, W)
    count, (d, r), k = len(U), U.shape[-2:], V.shape[-1]
    outer = factors.product == "outer"
    copied, multiplied = (U.size + V.size) // count, r * (d + k)
    how = choices(count, of_row.rows, copied, multiplied)
    if outer:
        how = dict.fromkeys(how, "gather")

    def product(y: Any, x: Any, U: Any, V: Any, a: Any, mask: Any) -> chex.Array:
        return factored_product(
            y,
            x,
            U,
            V,
            a,
            mask=mask,
            outer=outer,
            from_result=factors.product == "auto",
            equation=of_row,
            s=factors.s,
            precision=precision,
        )

    add = _by_row(product, how, in_y)
    return left_to_compiler(add, y, x_in, U, V, a, ids, like=y)


def mixed_linear(
    linear: Product,
    x: chex.Array,
    W: chex.Array,
    factors: LayerFactors,
    axes: KernelAxes,
    ids: chex.Array,
    *,
    base: Product,
    groups: int = 1,
    precision: jax.lax.PrecisionLike = None,
    x_in: chex.Array | None = None,
) -> chex.Array:
    """``adapted_linear`` of a batch of rows.

    Args:
      linear: computes the layer's product; it takes kernels of any number of outputs.
      x: the input, whose first axes are those of the ids.
      W: the kernel in the compute dtype, with one output axis.
      factors: of all adapters, on an axis in front.
      axes: how ``W`` is a matrix.
      ids: which adapter each row has.
      base: the layer's own product of ``x`` and ``W``.
      groups: number of groups that the outputs are in, each with its own inputs.
      precision: of the product with ``V``.
      x_in: the input of the factors, with their dropout; ``x`` by default.

    Raises:
      ValueError: if the ids are not those of the first axes.
    """
    n = ids.ndim
    rows = tuple(range(n))
    y = base(x, W)
    check_tokens(ids, x.shape, factors.path)
    check_tokens(ids, y.shape, factors.path)
    U, V = factors.U, factors.V
    assert V is not None  # of several adapters there are always factors
    count, (d, r), k = len(U), U.shape[-2:], V.shape[-1]
    looks_up = not jnp.issubdtype(x.dtype, jnp.inexact)
    vectors = y.size // (k * ids.size) if isinstance(y.size, int) else y.size
    copied, multiplied = (U.size + V.size) // count, r * (1 if looks_up else d) + r * k
    how = choices(count, vectors, copied, multiplied)

    def product(y: Any, x: Any, U: Any, V: Any, a: Any, mask: Any) -> chex.Array:
        of_row = factors._replace(U=U, V=V, a=a)
        ones = (None,) * n  # the layer may need the axes of the batch
        y, x = y[ones], x[ones]
        y = factored_linear(
            linear, y, x, W, of_row, axes, groups=groups, mask=mask, precision=precision
        )
        return y[(0,) * n]

    add = _by_row(product, how, rows)
    x = x if x_in is None else x_in
    return left_to_compiler(add, y, x, U, V, factors.a, ids, like=y)


def _by_row(
    product: Callable[..., Any], how: Mapping[str, str], in_y: tuple[int, ...]
) -> Callable[..., Any]:
    """A function of ``y, x``, all factors and the ids, from one of the factors of a row.

    Args:
      product: of ``y, x, U, V, a, mask`` of one row.
      how: ``"gather"`` or ``"one-hot"`` for each platform.
      in_y: the axes of the rows in ``y``; in ``x`` they are the first.
    """
    rows = tuple(range(len(in_y)))

    def added(y: Any, x: Any, U: Any, V: Any, a: Any, ids: Any, *, choice: str) -> Any:
        (U, V, mask), shared = row_factors(choice, U, V, ids)
        in_axes = (in_y, rows, shared, shared, rows, rows)
        return vmap_rows(product, len(in_y), in_axes, in_y)(y, x, U, V, a, mask)

    def add(y: Any, x: Any, U: Any, V: Any, a: Any, ids: Any) -> Any:
        ids = ids_after(ids, x)
        a = None if a is None else taken(a, ids, 1.0)
        return by_choice(how, added, y, x, U, V, a, ids)

    return add


def vmap_rows(
    function: Callable[..., Any], ndim: int, in_axes: Sequence[Any], out_axes: Sequence[int]
) -> Callable[..., Any]:
    """``jax.vmap`` over each of the axes of the ids.

    Args:
      function: of one row.
      ndim: number of axes of the ids.
      in_axes: for each argument where it has these axes, or ``None`` if it is shared.
      out_axes: where the result has them.
    """
    for axis in reversed(range(ndim)):
        # The axes before this one are mapped further out, and are gone here.
        axis_in = [None if axes is None else axes[axis] - _below(axes, axis) for axes in in_axes]
        function = jax.vmap(function, tuple(axis_in), out_axes[axis] - _below(out_axes, axis))
    return function


def _below(axes: Sequence[int], axis: int) -> int:
    """How many of the axes before this one are in front of it."""
    return sum(axes[i] < axes[axis] for i in range(axis))
