"""Blocks of a kernel: its axes cut into pieces of one size, with one scale for each block.

The scales have as many axes as the kernel, so that whatever slices the kernel slices them alike. An
axis of ``n`` numbers with ``s`` scales has blocks of ``ceil(n / s)``; the last may be smaller.
"""

from __future__ import annotations

from collections.abc import Sequence

import chex
import jax.numpy as jnp


def block_counts(shape: Sequence[int], axes: Sequence[int], size: int) -> tuple[int, ...]:
    """How many blocks each axis has, for blocks of at most so many numbers.

    Args:
      shape: of the array.
      axes: those that are cut, the one that is filled first in front. The others have one block
        for each number.
      size: of a block; 0 for all of the axes.

    Example:
      >>> block_counts((128, 10), (0,), 64), block_counts((3, 3, 16, 8), (2, 1, 0), 64)
      ((2, 10), (3, 1, 1, 8))
    """
    counts, left = list(shape), size
    for axis in axes:
        counts[axis] = 1 if not size else -(-shape[axis] // left)
        left = max(left // _size(shape[axis], counts[axis]), 1)
    return tuple(counts)


def block_max(x: chex.Array, counts: Sequence[int]) -> chex.Array:
    """The largest number of each block: an array of the shape ``counts``."""
    for axis, count in enumerate(counts):
        n, size = x.shape[axis], _size(x.shape[axis], count)
        if size == 1:
            continue
        if size * count > n:
            widths = [(0, 0)] * x.ndim
            widths[axis] = (0, size * count - n)
            x = jnp.pad(x, widths, mode="edge")
        shape = (*x.shape[:axis], count, size, *x.shape[axis + 1 :])
        x = jnp.max(jnp.reshape(x, shape), axis=axis + 1)
    return x


def spread(scale: chex.Array, shape: Sequence[int]) -> chex.Array:
    """One number for each entry of the array: that of its block. Axes of one block stay as 1.

    Example:
      >>> spread(jnp.array([1.0, 2.0]), (3,))
      Array([1., 1., 2.], dtype=float32)
    """
    for axis, n in enumerate(shape):
        count = scale.shape[axis]
        size = _size(n, count)
        if size == 1 or count == 1:
            continue
        lead, rest = scale.shape[:axis], scale.shape[axis + 1 :]
        wide = jnp.broadcast_to(jnp.expand_dims(scale, axis + 1), (*lead, count, size, *rest))
        scale = jnp.reshape(wide, (*lead, count * size, *rest))
        if count * size > n:
            scale = scale[(slice(None),) * axis + (slice(n),)]
    return scale


def _size(n: int, count: int) -> int:
    return -(-n // count)
