"""DoRA's norm ``||W + s U V||_c``: one for each column of ``W``, that is, for each output.

It depends on parameters only, so it is computed once for a call of the model, outside of its layers
and of what rematerialises them (:func:`normalized`), and without forming ``U V``:

    ||W + s U V||_c^2 = ||W||_c^2 + 2 s sum_r (U^T W) * V + s^2 sum_r (U^T U V) * V.

Where the adapter removes most of a column these terms cancel, and leave their rounding errors. What
is computed once, and not in every step, therefore forms ``U V`` (:func:`dense_norm`).
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lora_jax.core._adapter import Adapter
from lora_jax.core._axes import KernelAxes
from lora_jax.core._meshes import left_to_compiler, spec_of
from lora_jax.core._variants import (
    column_norm,
    float32_or_more,
    magnitude_ratio,
    product,
    safe_sqrt,
)


def normalized(kernel: chex.Array, adapter: Adapter) -> Adapter:
    """The adapter as its layer has it: with ``a = m / ||W + s U V||_c`` in the place of ``m``.

    Args:
      kernel: as it is stored.
      adapter: its adapter, or several on an axis in front.
    """
    if adapter.variant != "dora":
        return adapter
    ratio = functools.partial(
        _ratio, axes=adapter.axes, s=adapter.scale, detach_norm=adapter.detach_norm
    )
    if adapter.count is not None:
        ratio = jax.vmap(ratio, in_axes=(None, 0, 0, 0))
    arrays = kernel, adapter.U, adapter.V, adapter.m
    a = left_to_compiler(ratio, *arrays, like=adapter.m)
    return adapter.replace(m=a)  # type: ignore[attr-defined, no-any-return]


@functools.partial(jax.jit, static_argnames=("axes", "s", "detach_norm"))
def _ratio(
    kernel: chex.Array,
    U: chex.Array,
    V: chex.Array,
    m: chex.Array,
    *,
    axes: KernelAxes,
    s: float,
    detach_norm: bool,
) -> chex.Array:
    """``m / ||W + s U V||_c``."""
    W = axes.as_matrix(kernel)
    dtype = float32_or_more(W.dtype)
    W, U, V, m = (array.astype(dtype) for array in (W, U, V, m))
    norm = factored_norm(W, U, V, s, m)
    if detach_norm:
        norm = jax.lax.stop_gradient(norm)
    return magnitude_ratio(m, norm)


def factored_norm(
    W: chex.Array, U: chex.Array, V: chex.Array, s: float, m: chex.Array | None = None
) -> chex.Array:
    """``||W + s U V||_c`` without the product ``U V``: ``(d, k), (d, r), (r, k) -> (k,)``.

    Leading axes may stack. The terms of its square are sums of ``d`` numbers, whose rounding errors
    grow as ``sqrt(d)``. Where the terms cancel, the norm is known no better than to these; and
    where ``m`` is as near as that, it is taken for the norm. So a LoRA that :func:`lora_jax.stack`
    has made a DoRA, with its own norm for ``m``, keeps ``m / norm = 1`` in every column.

    Args:
      W: the kernel.
      U: left factor.
      V: right factor.
      s: the scale.
      m: the magnitude, if it may be the norm; it has no gradient here.

    Example:
      >>> W, U, V = jnp.ones((4, 3)), jnp.ones((4, 1)), jnp.ones((1, 3))
      >>> factored_norm(W, U, V, 0.5)
      Array([3., 3., 3.], dtype=float32)
    """
    transposed = U.swapaxes(-1, -2)
    squared = jnp.sum(jnp.square(W), axis=-2)
    cross = jnp.sum(product(transposed, W) * V, axis=-2)
    quadratic = jnp.sum(product(product(transposed, U), V) * V, axis=-2)
    terms = squared + s**2 * quadratic
    total = terms + 2 * s * cross
    if m is not None:
        known = jnp.square(jax.lax.stop_gradient(m))
        error = W.shape[-2] ** 0.5 * np.finfo(W.dtype).eps * terms
        same = (total < terms / 2) & (jnp.abs(total - known) <= error)
        total = jnp.where(same, known + (total - jax.lax.stop_gradient(total)), total)
    return safe_sqrt(total)


@jax.jit
def dense_norm(kernel: chex.Array, adapter: Adapter) -> chex.Array:
    """``||W + s U V||_c`` with ``U V`` formed, which loses no digits where they cancel.

    Args:
      kernel: as it is stored.
      adapter: its adapter, or several on an axis in front; then one ``U V`` is formed at a time.

    Returns:
      ``(*stack, k)`` in float32 or more.

    Example:
      >>> dense_norm(jnp.ones((4, 3)), Adapter(jnp.ones((4, 1)), -jnp.ones((1, 3))))
      Array([0., 0., 0.], dtype=float32)
    """
    if adapter.count is not None:
        norms: chex.Array = jax.lax.map(functools.partial(dense_norm, kernel), adapter)
        return norms

    def norm(kernel: chex.Array, U: chex.Array, V: chex.Array) -> chex.Array:
        W = adapter.axes.as_matrix(kernel)
        W = W.astype(float32_or_more(W.dtype))
        U, V = U.astype(W.dtype), V.astype(W.dtype)
        return column_norm(W + adapter.scale * product(U, V))

    *stack, _, k = spec_of(adapter.V)
    like = PartitionSpec(*stack, k)
    one: chex.Array = left_to_compiler(norm, kernel, adapter.U, adapter.V, like=like)
    return one
