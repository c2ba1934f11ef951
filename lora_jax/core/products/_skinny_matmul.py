"""Matrix products with the thin factors ``U`` and ``V``, and what they need on CPUs.

A product with a factor costs little arithmetic, so its layout in memory decides what it costs. On
CPUs XLA is helped in two places, by :func:`merge_free_axes` and :func:`skinny_matmul`; elsewhere
the products are as they are written.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from lora_jax._compat import barrier


def on_cpu() -> bool:
    """Whether it is a CPU that computes."""
    return jax.default_backend() == "cpu"


def merge_free_axes(x: chex.Array, batch_ndim: int, on_cpu: bool) -> chex.Array:
    """``(*batch, *free, d)`` as ``(*batch, n, d)`` on CPUs, elsewhere as it is.

    On CPUs XLA copies ``x`` in the gradient of ``U`` if there are two axes to contract. On TPUs
    the reshape is a copy, and in a mesh that shards two of the axes it gathers.
    """
    if x.ndim <= batch_ndim + 2 or not on_cpu:
        return x
    return jnp.reshape(x, (*x.shape[:batch_ndim], -1, x.shape[-1]))


def skinny_matmul(
    x: chex.Array, U: chex.Array, precision: jax.lax.PrecisionLike, on_cpu: bool
) -> chex.Array:
    """``x U``, written so that on CPUs the gradient of ``U`` is ``(g^T x)^T`` and not ``x^T g``.

    The second is four times slower there, as it reads a large matrix by its columns. XLA would
    make it of the first, hence the barrier.
    """
    if not on_cpu or U.ndim > 2:
        return contract(x, U, -2, precision)
    Ut = barrier(U.swapaxes(-1, -2))
    return contract(x, Ut, -1, precision)


def contract(
    x: chex.Array, W: chex.Array, axis: int, precision: jax.lax.PrecisionLike
) -> chex.Array:
    """Contracts the last axis of ``x`` with an axis of ``W``, whose batch axes are in front.

    Args:
      x: ``(*batch, *free, d)``.
      W: ``(*batch, d, k)`` or ``(*batch, k, d)``.
      axis: of ``W``: -2 or -1.
      precision: of the product.
    """
    batch = tuple(range(W.ndim - 2))
    dims = (((x.ndim - 1,), (W.ndim + axis,)), (batch, batch))
    return jax.lax.dot_general(x, W, dims, precision=precision)
