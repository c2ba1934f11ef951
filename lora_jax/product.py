"""The adapted product and its gradient.

:mod:`lora_jax.variants` says what ``x W'`` is; this module computes it without forming ``W'``:

    LoRA    y = x W + s (x U) V
    DoRA    y = (m / n) (x W + s (x U) V),   n = ||W + s U V||_c

and DoRA's norm without forming ``W + s U V``:

    n^2 = ||W||_c^2 + 2 s sum_r (U^T W) * V + s^2 sum_r (U^T U V) * V.
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from lora_jax.adapter import Adapter
from lora_jax.variants import magnitude_ratio, product, safe_sqrt

Product = Callable[[chex.Array, chex.Array], chex.Array]


def adapted_product(
    x: chex.Array,
    W: chex.Array,
    adapter: Adapter,
    *,
    base_product: Product = jnp.matmul,
    precision: jax.lax.PrecisionLike = None,
    stored_W: chex.Array | None = None,
    dropped_x: chex.Array | None = None,
) -> chex.Array:
    """``x W'`` for one layer, in the layer's own dtype.

    Args:
      x: inputs, ``(..., d)``.
      W: kernel in the compute dtype, ``(d, k)``.
      adapter: ``U`` ``(d, r)``, ``V`` ``(r, k)``, ``m`` ``(k,)`` or ``None``.
      base_product: the layer's own product ``x W``.
      precision: of the products with the factors.
      stored_W: the kernel as it is stored, for the norm; ``W`` by default.
      dropped_x: the inputs of the factors where they have dropout; ``x`` by default.

    Returns:
      ``(..., k)``.
    """
    base = base_product(x, W)
    U, V = adapter.U.astype(W.dtype), adapter.V.astype(W.dtype)
    # As rows of one matrix: with two axes to contract in its gradient, XLA would copy x.
    rows = jnp.reshape(x if dropped_x is None else dropped_x, (-1, x.shape[-1]))
    xU = adapter.scale * jnp.matmul(rows, U, precision=precision)
    delta = jnp.matmul(xU, V, precision=precision)
    y = base + jnp.reshape(delta, base.shape).astype(base.dtype)
    if adapter.m is None:
        return y
    # The ratio is close to 1, where 16 bits cannot tell it from 1: it stays in float32.
    ratio = dora_ratio(W if stored_W is None else stored_W, adapter)
    return (ratio * y.astype(jnp.promote_types(y.dtype, ratio.dtype))).astype(y.dtype)


def dora_ratio(W: chex.Array, adapter: Adapter) -> chex.Array:
    """``m / ||W + s U V||_c`` in float32, ``(k,)``, from the kernel as it is stored."""
    norm = factored_norm(
        W.astype(jnp.promote_types(W.dtype, jnp.float32)), adapter.U, adapter.V, adapter.scale
    )
    if adapter.detach_norm:
        norm = jax.lax.stop_gradient(norm)
    return magnitude_ratio(adapter.m, norm)


def factored_norm(W: chex.Array, U: chex.Array, V: chex.Array, s: float) -> chex.Array:
    """``||W + s U V||_c`` without the product ``U V``: ``(d, k), (d, r), (r, k) -> (k,)``.

    Example:
      >>> W, U, V = jnp.ones((4, 3)), jnp.ones((4, 1)), jnp.ones((1, 3))
      >>> factored_norm(W, U, V, 0.5)
      Array([3., 3., 3.], dtype=float32)
    """
    squared = jnp.sum(jnp.square(W), axis=-2)
    cross = jnp.sum(product(U.T, W) * V, axis=-2)
    quadratic = jnp.sum(product(product(U.T, U), V) * V, axis=-2)
    return safe_sqrt(squared + 2 * s * cross + s**2 * quadratic)
