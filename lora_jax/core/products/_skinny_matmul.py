"""Matrix products with the thin factors ``U`` and ``V``, in the layout that a platform wants.

A product with a factor costs little arithmetic, so its layout in memory decides what it costs, and
what a compiler makes of it.

**On CPUs** the gradient of ``U`` is ``(g^T x)^T`` and not ``x^T g``, which is four times slower, as
it reads a large matrix by its columns; and ``x`` has one free axis, as XLA copies it where there
are two axes to contract.

**On GPUs** XLA joins products of the same array, ``x W`` and ``x U`` to ``x [W | U]``, and their
gradients ``g W^T`` and ``g V^T`` likewise. To do so it writes ``W`` anew in every step. It joins
only what contracts the same axes, so there a factor contracts other axes than ``W`` does.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from lora_jax._compat import barrier


def merge_free_axes(x: chex.Array, batch_ndim: int, platform: str) -> chex.Array:
    """``(*batch, *free, d)`` as ``(*batch, n, d)`` on CPUs, elsewhere as it is.

    On TPUs the reshape may be a copy, and in a mesh that shards two of the axes it gathers.
    """
    if x.ndim <= batch_ndim + 2 or platform != "cpu":
        return x
    return jnp.reshape(x, (*x.shape[:batch_ndim], -1, x.shape[-1]))


def times_U(
    x: chex.Array,
    U: chex.Array,
    precision: jax.lax.PrecisionLike,
    *,
    platform: str,
    W_is_transposed: bool = False,
) -> chex.Array:
    """``x U``, ``(*batch, *free, d), (*batch, d, r) -> (*batch, *free, r)``.

    Args:
      x: the input.
      U: the left factor.
      precision: of the product.
      platform: that computes.
      W_is_transposed: whether the product with ``W`` contracts its last axes.
    """
    if platform == "cpu":
        if U.ndim > 2:
            return contract(x, U, -2, precision)
        return contract(x, barrier(U.swapaxes(-1, -2)), -1, precision)
    if platform != "gpu":
        return contract(x, U, -2, precision)
    return _apart(x, U, precision, W_is_transposed)


def times_V(
    xU: chex.Array,
    V: chex.Array,
    precision: jax.lax.PrecisionLike,
    *,
    platform: str,
    W_is_transposed: bool = False,
) -> chex.Array:
    """``(x U) V``, ``(*batch, *free, r), (*batch, r, k) -> (*batch, *free, k)``.

    Args:
      xU: the input times the left factor.
      V: the right factor.
      precision: of the product.
      platform: that computes.
      W_is_transposed: whether the product with ``W`` contracts its last axes.
    """
    if platform != "gpu":
        return contract(xU, V, -2, precision)
    return _apart(xU, V, precision, W_is_transposed)


def _apart(
    x: chex.Array, factor: chex.Array, precision: jax.lax.PrecisionLike, W_is_transposed: bool
) -> chex.Array:
    """``x factor``, which is not joined with the product with ``W``, and nor is its gradient.

    It contracts other axes, behind a barrier, as XLA would transpose the factor to have the same.
    What layers with a transposed ``W`` compute XLA turns around itself: there it is ``x`` that is
    not the same array.
    """
    if W_is_transposed:
        return contract(jax.lax.optimization_barrier(x), factor, -2, precision)
    return contract(x, jax.lax.optimization_barrier(factor.swapaxes(-1, -2)), -1, precision)


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
