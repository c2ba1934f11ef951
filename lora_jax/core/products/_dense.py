"""The dense product ``y = x K`` with ``K = a (W + s U V)``, and its gradient.

It reads and writes the kernel, ``d k`` numbers, where the factored product reads and writes the
activations, so it is better with many rows. (Without rematerialisation ``K`` is kept for the
gradient.) Its gradient has the skinny products only, never ``x^T g``:

    dU = s x^T (g (a V)^T)    dV = s a (x U)^T g    dx = g K^T    da = sum_n g y / a
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from lora_jax.core._numerics import known_tangent, not_zero, product
from lora_jax.core.products._einsum_equation import Equation
from lora_jax.core.products._product_with_U import with_derivative
from lora_jax.core.products._skinny_matmul import contract, merge_free_axes, times_U


def dense_product(
    x: chex.Array,
    W: chex.Array,
    U: chex.Array,
    V: chex.Array | None,
    a: chex.Array | None,
    xU: chex.Array | None,
    *,
    equation: Equation,
    s: float,
    precision: jax.lax.PrecisionLike,
    platform: str,
) -> chex.Array:
    """``x K``, at full precision unless another one is asked for.

    Args:
      x: the input.
      W: the kernel in the compute dtype.
      U: left factor.
      V: right factor, or ``None`` where ``U`` is the product already.
      a: one number for each output, or ``None`` for 1.
      xU: ``x U``, for the gradient of ``V``, or ``None`` where there is none.
      equation: of ``x``, the kernel and the result.
      s: the scale.
      precision: of the products.
      platform: that computes.
    """
    U, V = U.astype(W.dtype), None if V is None else V.astype(W.dtype)
    if a is not None:  # its gradient divides by it
        a = not_zero(a).astype(W.dtype)
    # Not all backends multiply float32 numbers as such unless they are told to.
    precision = jax.lax.Precision.HIGHEST if precision is None else precision
    if V is None:  # its gradient is of the size of the kernel whatever is done
        K = _times(a, equation.axes.as_matrix(W) + s * U)
        return equation.product(x, equation.axes.as_kernel(K, W.shape), precision)
    return _dense(x, W, U, V, a, xU, s, equation, precision, platform)


@functools.partial(jax.custom_jvp, nondiff_argnums=(6, 7, 8, 9))
def _dense(
    x: chex.Array,
    W: chex.Array,
    U: chex.Array,
    V: chex.Array,
    a: chex.Array | None,
    xU: chex.Array,
    s: float,
    equation: Equation,
    precision: jax.lax.PrecisionLike,
    platform: str,
) -> chex.Array:
    """``x K`` with ``K = a (W + s U V)``."""
    return equation.product(x, _kernel(W, U, V, a, s, equation), precision)


def _kernel(
    W: chex.Array,
    U: chex.Array,
    V: chex.Array,
    a: chex.Array | None,
    s: float,
    equation: Equation,
) -> chex.Array:
    """``K = a (W + s U V)``, of the shape of ``W``."""
    K = equation.axes.as_matrix(W) + product(s * U, V)
    return equation.axes.as_kernel(_times(a, K), W.shape)


def _times(a: chex.Array | None, K: chex.Array) -> chex.Array:
    return K if a is None else a[..., None, :] * K


def _dense_jvp(
    s: float,
    equation: Equation,
    precision: jax.lax.PrecisionLike,
    platform: str,
    primals: Sequence[Any],
    tangents: Sequence[Any],
) -> tuple[chex.Array, chex.Array]:
    """The derivative, which JAX transposes to the gradient at the top of this file."""
    x, W, U, V, a, xU = primals
    dx, dW, dU, dV, da, _ = map(known_tangent, tangents)
    y = _dense(x, W, U, V, a, xU, s, equation, precision, platform)
    rows = merge_free_axes(equation.operand(x), len(equation.axes.batch), platform)
    terms, low_rank = [], []
    if dx is not None:
        K = _kernel(W, U, V, a, s, equation)
        terms.append(equation.product(dx, K, precision))
    if dW is not None:
        dK = _times(a, equation.axes.as_matrix(dW))
        dK = equation.axes.as_kernel(dK, W.shape)
        terms.append(equation.product(x, dK, precision))
    if dU is not None:
        xdU = times_U(rows, dU, precision, platform=platform)
        low_rank.append(contract(xdU, _times(a, s * V), -2, precision))
    if dV is not None:
        xU = with_derivative(xU, x, U, equation, precision, platform)
        xU = merge_free_axes(xU, len(equation.axes.batch), platform)
        low_rank.append(contract(xU, _times(a, s * dV), -2, precision))
    if low_rank:
        terms.append(equation.result(functools.reduce(jnp.add, low_rank)))
    if da is not None:
        terms.append(y * equation.on_y(da / a))
    return y, functools.reduce(jnp.add, terms) if terms else jnp.zeros_like(y)


_dense.defjvp(_dense_jvp, symbolic_zeros=True)
