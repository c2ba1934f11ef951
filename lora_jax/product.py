"""The adapted product and its gradient.

:mod:`lora_jax.variants` says what ``x W'`` is; this module computes it without forming ``W'``:

    LoRA    y = x W + s (x U) V
    DoRA    y = (m / n) (x W + s (x U) V),   n = ||W + s U V||_c

and DoRA's norm without forming ``W + s U V``:

    n^2 = ||W||_c^2 + 2 s sum_r (U^T W) * V + s^2 sum_r (U^T U V) * V.

The product is an einsum, or any other that is linear in the kernel, such as a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter import Adapter
from lora_jax.axes import KernelAxes
from lora_jax.equation import Equation
from lora_jax.variants import float32_or_more, magnitude_ratio, product, safe_sqrt

Product = Callable[[chex.Array, chex.Array], chex.Array]


class Factors(NamedTuple):
    """What an adapter adds to one layer, with any fused kernels as one matrix.

    Attributes:
      U: ``(*stack, d, r)``.
      V: ``(*stack, r, k)``.
      m: ``(*stack, k)``, or ``None`` for LoRA.
      s: the scale.
      detach_norm: whether DoRA's norm is a constant in the gradient.
      adapted: which of the ``k`` outputs have a magnitude, ``(k,)``; ``None`` for all.
    """

    U: chex.Array
    V: chex.Array
    m: chex.Array | None
    s: float
    detach_norm: bool = False
    adapted: np.ndarray | None = None


def factors_of(adapter: Adapter) -> Factors:
    """The factors of one layer. Those of fused kernels side by side, ``r`` for each part.

    With parts ``a`` and ``c`` of three fused kernels it is
    ``U = [U_a | U_c]`` and ``V = [[V_a, 0, 0], [0, 0, V_c]]``.
    """
    axes, U, V, m = adapter.axes, adapter.U, adapter.V, adapter.m
    if axes.fused == 1:
        return Factors(U, V, m, adapter.scale, adapter.detach_norm)
    place = np.eye(axes.fused, dtype=np.float32)[list(axes.parts)]
    U = jnp.moveaxis(U, -3, -2)
    U = jnp.reshape(U, (*U.shape[:-2], -1))
    V = jnp.einsum("...prk,pf->...prfk", V, place)
    V = jnp.reshape(V, (*V.shape[:-4], V.shape[-4] * V.shape[-3], -1))
    if m is not None:
        width = m.shape[-1]
        m = jnp.einsum("...pk,pf->...fk", m, place)
        m = jnp.reshape(m, (*m.shape[:-2], -1))
        adapted = np.repeat(place.any(0), width)
        return Factors(U, V, m, adapter.scale, adapter.detach_norm, adapted)
    return Factors(U, V, m, adapter.scale)


def adapted_einsum(
    equation: Equation,
    x: chex.Array,
    W: chex.Array,
    factors: Factors,
    *,
    base: Product,
    transposed: bool = False,
    precision: jax.lax.PrecisionLike = None,
    stored_W: chex.Array | None = None,
    dropped_x: chex.Array | None = None,
) -> chex.Array:
    """The einsum of ``x`` with ``W'`` for one layer, in the layer's own dtype.

    Args:
      equation: ``x,W->y``.
      x: the input.
      W: the kernel in the compute dtype.
      factors: of the adapter.
      base: the layer's own product of ``x`` and ``W``.
      transposed: the product is with the transposed matrix, ``x W'^T``, as where an embedding
        gives the logits: then ``y = (a x) W^T + s ((a x) V^T) U^T`` with ``a = m / n``.
      precision: of the products with the factors.
      stored_W: the kernel as it is stored, for the norm; ``W`` by default.
      dropped_x: the input of the factors where they have dropout; ``x`` by default.
    """
    U, V = factors.U.astype(W.dtype), factors.V.astype(W.dtype)
    dropped_x = x if dropped_x is None else dropped_x
    axes = equation.transposed_axes if transposed else equation.axes
    ratio = None
    if factors.m is not None:
        ratio = dora_ratio(axes.as_matrix(W if stored_W is None else stored_W), factors)
    if transposed:
        U, V = V.swapaxes(-1, -2), U.swapaxes(-1, -2)
        if ratio is not None:
            x, dropped_x = (scaled(equation.on_x(ratio), a) for a in (x, dropped_x))
    # As rows of one matrix: with two axes to contract in its gradient, XLA would copy x.
    xU = factors.s * jnp.matmul(equation.rows(dropped_x), U, precision=precision)
    delta = equation.result(jnp.matmul(xU, V, precision=precision))
    y = base(x, W)
    y = y + delta.astype(y.dtype)
    return y if ratio is None or transposed else scaled(equation.on_y(ratio), y)


def adapted_linear(
    linear: Product,
    x: chex.Array,
    W: chex.Array,
    factors: Factors,
    axes: KernelAxes,
    *,
    base: Product,
    groups: int = 1,
    stored_W: chex.Array | None = None,
    dropped_x: chex.Array | None = None,
) -> chex.Array:
    """``linear(x, W')`` for any product that is linear in the kernel, such as a convolution.

    ``linear(x, U)`` is the same product with ``r`` outputs, and its result times ``V`` is added.

    Args:
      linear: computes the layer's product; it takes kernels of any number of outputs.
      x: the input.
      W: the kernel in the compute dtype, with one output axis.
      factors: of the adapter.
      axes: how ``W`` is a matrix. The result's last axes are the stacks and the outputs.
      base: the layer's own product of ``x`` and ``W``.
      groups: number of groups that the outputs are in, each with inputs of its own.
      stored_W: the kernel as it is stored, for the norm; ``W`` by default.
      dropped_x: the input of the factors where they have dropout; ``x`` by default.
    """
    (out,) = axes.outputs
    U, V = factors.U.astype(W.dtype), factors.V.astype(W.dtype)
    rank = U.shape[-1]
    shape = [rank if axis == out else size for axis, size in enumerate(W.shape)]
    kernel = axes.as_kernel(U, shape)
    if groups > 1:
        kernel = jnp.concatenate([kernel] * groups, axis=out)
    y = base(x, W)
    xU = factors.s * linear(x if dropped_x is None else dropped_x, kernel)
    if y.shape[-1:] != (W.shape[out],) or xU.shape != (*y.shape[:-1], groups * rank):
        raise ValueError(
            f"The result of a linear product must have its outputs last: with a kernel {W.shape} "
            f"it is {y.shape}, with {kernel.shape} it is {xU.shape}."
        )
    if groups > 1:
        xU = jnp.reshape(xU, (*xU.shape[:-1], groups, rank))
        V = jnp.reshape(V, (rank, groups, -1))
        delta = jnp.einsum("...gr,rgk->...gk", xU, V)
    elif axes.stacks:
        stacks = "abcdefgh"[: len(axes.stacks)]
        delta = jnp.einsum(f"...{stacks}r,{stacks}rk->...{stacks}k", xU, V)
    else:
        delta = jnp.matmul(jnp.reshape(xU, (math.prod(xU.shape[:-1]), rank)), V)
    y = y + jnp.reshape(delta, y.shape).astype(y.dtype)
    if factors.m is None:
        return y
    return scaled(dora_ratio(axes.as_matrix(W if stored_W is None else stored_W), factors), y)


def scaled(ratio: chex.Array, y: chex.Array) -> chex.Array:
    """``ratio * y``. The ratio is close to 1, where 16 bits cannot tell it from 1: not cast."""
    dtype = float32_or_more(y.dtype)
    return (ratio.astype(dtype) * y.astype(dtype)).astype(y.dtype)


def dora_ratio(W: chex.Array, factors: Factors) -> chex.Array:
    """``m / ||W + s U V||_c`` in float32, ``(*stack, k)``, from the kernel as it is stored."""
    W = W.astype(float32_or_more(W.dtype))
    norm = factored_norm(W, factors.U, factors.V, factors.s)
    if factors.detach_norm:
        norm = jax.lax.stop_gradient(norm)
    ratio = magnitude_ratio(factors.m, norm)
    return ratio if factors.adapted is None else jnp.where(factors.adapted, ratio, 1)


def factored_norm(W: chex.Array, U: chex.Array, V: chex.Array, s: float) -> chex.Array:
    """``||W + s U V||_c`` without the product ``U V``: ``(d, k), (d, r), (r, k) -> (k,)``.

    Leading axes may stack.

    Example:
      >>> W, U, V = jnp.ones((4, 3)), jnp.ones((4, 1)), jnp.ones((1, 3))
      >>> factored_norm(W, U, V, 0.5)
      Array([3., 3., 3.], dtype=float32)
    """
    transposed = U.swapaxes(-1, -2)
    squared = jnp.sum(jnp.square(W), axis=-2)
    cross = jnp.sum(product(transposed, W) * V, axis=-2)
    quadratic = jnp.sum(product(product(transposed, U), V) * V, axis=-2)
    return safe_sqrt(squared + 2 * s * cross + s**2 * quadratic)
