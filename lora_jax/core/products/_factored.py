"""The factored product ``y = a (x W + s (x U) V)``: the activations are read, not the kernel.

It reads and writes the activations once more than the layer does, ``n (d + k)`` numbers for ``n``
rows, which costs more than its arithmetic. JAX differentiates it: the gradient has the skinny
products only, never ``x^T g``.

**outer** writes ``(x U) V`` as a sum of ``r`` outer products,

    y = a (x W + s sum_r (x U)_r V_r),

which a compiler can fuse into the product with ``W``, so that ``x W`` is not written and read once
more. It accesses fewer bytes by the TPU's compiler; no one has timed it on one, so it is taken only
where a rule asks for it.

:func:`factored_linear` is the same for any product that is linear in the kernel, such as a
convolution: ``U`` in the layout of the kernel is a kernel with ``r`` outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from lora_jax.core._axes import KernelAxes
from lora_jax.core._numerics import along, float32_or_more, known_tangent, not_zero
from lora_jax.core.products._einsum_equation import Equation
from lora_jax.core.products._layer_factors import LayerFactors
from lora_jax.core.products._platform import by_platform
from lora_jax.core.products._product_with_U import named_xU, product_with_U, with_derivative
from lora_jax.core.products._skinny_matmul import contract, merge_free_axes, times_V

Product = Callable[[chex.Array, chex.Array], chex.Array]


# Under jax.jit, layers that are alike are traced, differentiated and transposed once.
@functools.partial(jax.jit, static_argnames=("outer", "equation", "s", "precision", "from_result"))
def factored_product(
    y: chex.Array,
    x: chex.Array,
    U: chex.Array,
    V: chex.Array | None,
    a: chex.Array | None,
    *,
    outer: bool,
    equation: Equation,
    s: float,
    precision: jax.lax.PrecisionLike,
    mask: chex.Array | None = None,
    from_result: bool = False,
) -> chex.Array:
    """``a (y + s (x U) V)``; with a mask ``(r,)``, ``a (y + s (mask (x U)) V)``.

    Args:
      y: the layer's own product, ``x W``.
      x: the input of the factors.
      U: left factor.
      V: right factor, or ``None`` where ``U`` is the product already.
      a: one number for each output, or ``None`` for 1.
      outer: whether ``(x U) V`` is a sum of outer products.
      equation: of ``x``, the kernel and ``y``.
      s: the scale.
      precision: of the products.
      mask: of the columns of ``U``.
      from_result: whether the gradient of ``a`` may divide the result by it.
    """
    static: dict[str, Any] = {"equation": equation, "precision": precision}
    if V is None:
        delta = by_platform(functools.partial(_whole_delta, s=s, **static), x, U)
    else:
        xU = product_with_U(x, U, **static)
        if mask is not None:
            xU = xU * along(mask, xU).astype(xU.dtype)
        delta = by_platform(functools.partial(_delta, outer=outer, s=s, **static), xU, V)
    y = y + delta.astype(y.dtype)
    return y if a is None else scaled(equation.on_y(a), y, from_result=from_result)


def factored_on(
    platform: str,
    y: chex.Array,
    x: chex.Array,
    U: chex.Array,
    V: chex.Array | None,
    a: chex.Array | None,
    xU: chex.Array | None,
    *,
    equation: Equation,
    precision: jax.lax.PrecisionLike,
    s: float,
) -> chex.Array:
    """:func:`factored_product` as it is on one platform, with ``x U`` of :func:`known_xU`."""
    static: dict[str, Any] = {"equation": equation, "precision": precision, "platform": platform}
    if V is None:
        delta = _whole_delta(x, U, s=s, **static)
    else:
        xU = with_derivative(xU, x, U, equation, precision, platform)
        delta = _delta(xU, V, outer=False, s=s, **static)
    y = y + delta.astype(y.dtype)
    return y if a is None else scaled(equation.on_y(a), y)


def _whole_delta(
    x: chex.Array,
    D: chex.Array,
    *,
    equation: Equation,
    s: float,
    precision: jax.lax.PrecisionLike,
    platform: str,
) -> chex.Array:
    """``s x D``, of the shape of ``x W``."""
    x = merge_free_axes(equation.operand(x), len(equation.axes.batch), platform)
    return equation.result(s * contract(x, D.astype(x.dtype), -2, precision))


def _delta(
    xU: chex.Array,
    V: chex.Array,
    *,
    outer: bool,
    equation: Equation,
    s: float,
    precision: jax.lax.PrecisionLike,
    platform: str,
) -> chex.Array:
    """``s (x U) V``, of the shape of ``x W``."""
    xU = merge_free_axes(xU, len(equation.axes.batch), platform)
    # The scale is where it moves the fewest bytes, and is not rounded by itself.
    V = (s * V).astype(xU.dtype)
    if outer:
        return equation.result(_outer(xU, V, precision))
    form: dict[str, Any] = {"platform": platform, "W_is_transposed": equation.is_transposed}
    return equation.result(times_V(xU, V, precision, **form))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _outer(xU: chex.Array, V: chex.Array, precision: jax.lax.PrecisionLike) -> chex.Array:
    """``sum_r (x U)_r V_r``, whose derivative is that of the product ``(x U) V``."""
    dtype = float32_or_more(xU.dtype)
    batch, free = V.shape[:-2], (1,) * (xU.ndim - V.ndim + 1)
    total = jnp.zeros((), dtype)
    for r in range(V.shape[-2]):
        V_r = jnp.reshape(V[..., r, :], (*batch, *free, V.shape[-1]))
        total = total + xU[..., r : r + 1].astype(dtype) * V_r.astype(dtype)
    return total.astype(xU.dtype)


@_outer.defjvp
def _outer_jvp(
    precision: jax.lax.PrecisionLike,
    primals: tuple[chex.Array, chex.Array],
    tangents: tuple[chex.Array, chex.Array],
) -> tuple[chex.Array, chex.Array]:
    (xU, V), (dxU, dV) = primals, tangents
    derivative = contract(dxU, V, -2, precision) + contract(xU, dV, -2, precision)
    return _outer(xU, V, precision), derivative


def factored_linear(
    linear: Product,
    y: chex.Array,
    x: chex.Array,
    W: chex.Array,
    factors: LayerFactors,
    axes: KernelAxes,
    *,
    groups: int = 1,
    mask: chex.Array | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> chex.Array:
    """``a (y + s linear(x, U) V)``, and with a mask ``(r,)`` ``a (y + s (mask linear(x, U)) V)``.

    Args:
      linear: computes the layer's product; it takes kernels of any number of outputs.
      y: the layer's own product, ``linear(x, W)``.
      x: the input of the factors.
      W: the kernel in the compute dtype, with one output axis.
      factors: of the adapter.
      axes: how ``W`` is a matrix.
      groups: number of groups that the outputs are in, each with its own inputs.
      mask: of the columns of ``U``.
      precision: of the product with ``V``.

    Raises:
      ValueError: if the outputs are not the last axis of what ``linear`` gives.
    """
    (out,) = axes.outputs
    U = factors.U.astype(W.dtype)
    if factors.V is None:
        delta = factors.s * linear(x, axes.as_kernel(U, W.shape))
        y = y + jnp.reshape(delta, y.shape).astype(y.dtype)
        return (
            y if factors.a is None else scaled(factors.a, y, from_result=factors.product == "auto")
        )
    V = factors.V.astype(W.dtype)
    rank = U.shape[-1]
    shape = [rank if axis == out else size for axis, size in enumerate(W.shape)]
    kernel = axes.as_kernel(U, shape)
    if groups > 1:
        kernel = jnp.concatenate([kernel] * groups, axis=out)
    xU = factors.s * named_xU(linear(x, kernel))
    if y.shape[-1:] != (W.shape[out],) or xU.shape != (*y.shape[:-1], groups * rank):
        raise ValueError(
            f"The result of a linear product must have its outputs last: with a kernel {W.shape} "
            f"it is {y.shape}, with {kernel.shape} it is {xU.shape}."
        )
    if groups > 1:
        xU = jnp.reshape(xU, (*xU.shape[:-1], groups, rank))
    if mask is not None:
        xU = xU * along(mask, xU).astype(xU.dtype)
    if groups > 1:
        V = jnp.reshape(V, (rank, groups, -1))
        delta = jnp.einsum("...gr,rgk->...gk", xU, V, precision=precision)
    elif axes.batch:
        batch = "abcdefgh"[: len(axes.batch)]
        equation = f"...{batch}r,{batch}rk->...{batch}k"
        delta = jnp.einsum(equation, xU, V, precision=precision)
    else:
        delta = by_platform(functools.partial(_rows_times_V, precision=precision), xU, V)
    y = y + jnp.reshape(delta, y.shape).astype(y.dtype)
    return y if factors.a is None else scaled(factors.a, y, from_result=factors.product == "auto")


def _rows_times_V(
    xU: chex.Array, V: chex.Array, *, precision: jax.lax.PrecisionLike, platform: str
) -> chex.Array:
    delta = times_V(merge_free_axes(xU, 0, platform), V, precision, platform=platform)
    return jnp.reshape(delta, (*xU.shape[:-1], V.shape[-1]))


def scaled(a: chex.Array, y: chex.Array, *, from_result: bool = False) -> chex.Array:
    """``a * y``, whose last axes ``a`` has. ``a`` is close to 1, and 1 in 16 bits: so not cast.

    Args:
      a: one number for each output.
      y: the product.
      from_result: whether the gradient of ``a`` may divide the result by it. The model keeps the
        result for its own gradient more often than not, and ``y`` need not be kept beside it.
    """
    a = along(a, y).astype(float32_or_more(y.dtype))
    if from_result and y.dtype == jnp.bfloat16:
        return _scaled(not_zero(a), y)
    return (a * y.astype(a.dtype)).astype(y.dtype)


@jax.custom_jvp
def _scaled(a: chex.Array, y: chex.Array) -> chex.Array:
    """``a y``, whose derivative is ``a dy + (a y) (da / a)``."""
    return (a * y.astype(a.dtype)).astype(y.dtype)


def _scaled_jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[chex.Array, Any]:
    (a, y), (da, dy) = primals, map(known_tangent, tangents)
    out = _scaled(a, y)
    terms = [] if dy is None else [_scaled(a, dy)]
    if da is not None:
        terms.append(_scaled(da / a, out))
    return out, functools.reduce(jnp.add, terms) if terms else jnp.zeros_like(out)


_scaled.defjvp(_scaled_jvp, symbolic_zeros=True)
