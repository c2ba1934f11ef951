"""Which of several adapters each row of a batch has: its id, or -1 for the base alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lora_jax._compat import is_traced
from lora_jax.core._axes import KernelAxes
from lora_jax.core._meshes import left_to_compiler, spec_of

# The id of a row that has the base alone.
BASE = -1


def checked_ids(adapter_ids: Any, count: int) -> chex.Array:
    """The ids as an array of integers.

    Raises:
      TypeError: if they are not integers.
      ValueError: if one is known to be neither that of an adapter nor -1.
    """
    ids = adapter_ids if isinstance(adapter_ids, jax.Array) else np.asarray(adapter_ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"adapter_ids must be integers, got {ids.dtype}.")
    if not is_traced(ids) and getattr(ids, "is_fully_addressable", True):
        wrong = [int(i) for i in np.unique(np.asarray(ids)) if not BASE <= i < count]
        if wrong:
            raise ValueError(
                f"adapter_ids has {wrong[0]}, but there are {count} adapters: ids are 0 to "
                f"{count - 1}, and {BASE} for the base alone."
            )
    # Ids of 8 bits cannot hold every number that they are compared with.
    return jnp.asarray(ids).astype(jnp.int32)


def presence(ids: chex.Array, count: int) -> chex.Array:
    """1 where there is such an adapter, 0 for the base, NaN for an id that is neither."""
    return jnp.where(ids == BASE, 0.0, 1.0) + nan_where((ids < BASE) | (ids >= count))


def nan_where(wrong: chex.Array) -> chex.Array:
    """NaN where something is wrong, and else 0.

    Where nothing is wrong no NaN is written: users may have told JAX to look for NaNs.

    Example:
      >>> nan_where(jnp.array([False, True])).tolist()
      [0.0, nan]
    """
    return 0.0 / jnp.where(wrong, 0.0, 1.0)


def taken(array: chex.Array, ids: chex.Array, base: float | chex.Array) -> chex.Array:
    """``array[ids]``, and the value for the base where the id is -1."""

    def take(array: chex.Array, ids: chex.Array, base: chex.Array) -> chex.Array:
        rows = jnp.take(array, ids, axis=0, mode="clip")
        as_rows = (...,) + (None,) * (rows.ndim - ids.ndim)
        if not jnp.issubdtype(array.dtype, jnp.inexact):
            return jnp.where((ids == BASE)[as_rows], base, rows)
        has = presence(ids, array.shape[0])[as_rows].astype(array.dtype)
        return jnp.where((ids == BASE)[as_rows], base, rows * has)

    like = PartitionSpec(*(None,) * ids.ndim, *spec_of(array)[1:])
    rows: chex.Array = left_to_compiler(take, array, ids, jnp.asarray(base, array.dtype), like=like)
    return rows


@flax.struct.dataclass
class Ids:
    """Which of several adapters a row of the batch has, placed next to a kernel.

    Attributes:
      ids: of the row, or of each of its tokens, repeated along the batch axes of the kernel, so
        that transforms slice them as they slice the kernel.
      shape: of the ids: ``()``, or ``(1, tokens)``.
      count: number of adapters.
    """

    ids: Any
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
    count: int = flax.struct.field(pytree_node=False)

    @classmethod
    def placed(
        cls, ids: chex.Array, count: int, axes: KernelAxes, kernel_shape: Sequence[int]
    ) -> Ids:
        """The ids for a kernel of that shape."""
        batch = (kernel_shape[axis] for axis in axes.batch)
        repeated = jnp.broadcast_to(jnp.reshape(ids, -1), (*batch, ids.size))
        return cls(axes.place(repeated, 1), ids.shape, count)

    def in_layer(self, axes: KernelAxes, kernel_shape: Sequence[int]) -> chex.Array:
        """The ids, in a layer that sees these axes of the kernel."""
        batch = tuple(kernel_shape[axis] for axis in axes.batch)
        ids = axes.take(self.ids, 1, (*batch, math.prod(self.shape)))
        assert ids is not None  # as the factors, which are taken before, were
        return jnp.reshape(ids[(0,) * len(batch)], self.shape)


def check_tokens(ids: chex.Array, shape: Sequence[int], path: str) -> None:
    """Raises ValueError if the first axes of a layer's input are not those of the ids."""
    if tuple(shape[: ids.ndim]) != ids.shape:
        raise ValueError(
            f"Of one row adapter_ids is {ids.shape}, but the layer of {path!r} gets an input of "
            f"shape {tuple(shape)}, whose first axes are not its tokens. Give one id for each row."
        )


def repeat_ids(ids: chex.Array, batch_shape: tuple[int, ...]) -> chex.Array:
    """The ids of the tokens, repeated, where a layer has made these axes of its input into one."""
    if ids.shape != batch_shape[: ids.ndim]:
        return ids  # check_tokens will refuse them
    ids = jnp.reshape(ids, (*ids.shape, *(1,) * (len(batch_shape) - ids.ndim)))
    return jnp.reshape(jnp.broadcast_to(ids, batch_shape), -1)
