"""Two codes of 4 bits in one byte: those of an even place and of the one behind it.

XLA has integers of 4 bits too, but keeps each in a byte of its own on CPUs and in files.
"""

from __future__ import annotations

import chex
import jax.numpy as jnp
import numpy as np


def packed(codes: chex.Array, axis: int) -> chex.Array:
    """Codes, each below 16, with half as many along an axis.

    Example:
      >>> packed(jnp.array([1, 2, 3], jnp.uint8), 0)
      Array([33,  3], dtype=uint8)
    """
    if codes.shape[axis] % 2:
        widths = [(0, 0)] * codes.ndim
        widths[axis] = (0, 1)
        codes = jnp.pad(codes, widths)
    shape = (*codes.shape[:axis], codes.shape[axis] // 2, 2, *codes.shape[axis + 1 :])
    pairs = jnp.moveaxis(jnp.reshape(codes, shape), axis + 1, 0)
    return pairs[0] | (pairs[1] << np.uint8(4))


def unpacked(codes: chex.Array, axis: int, odd: bool) -> chex.Array:
    """The inverse of :func:`packed`.

    Args:
      codes: two in each byte.
      axis: along which.
      odd: whether the last byte has one only.

    Example:
      >>> unpacked(jnp.array([33, 3], jnp.uint8), 0, odd=True)
      Array([1, 2, 3], dtype=uint8)
    """
    shifts = np.array([0, 4], np.uint8).reshape((2, *(1,) * (codes.ndim - axis - 1)))
    pairs = (jnp.expand_dims(codes, axis + 1) >> shifts[(None,) * (axis + 1)]) & np.uint8(15)
    shape = (*codes.shape[:axis], 2 * codes.shape[axis], *codes.shape[axis + 1 :])
    whole = jnp.reshape(pairs, shape)
    return whole[(slice(None),) * axis + (slice(-1),)] if odd else whole
