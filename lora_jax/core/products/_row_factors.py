"""The factors of the rows of a mixed batch: those of each row's adapter, or of all at once.

What the adapters add to a row is computed by one of two formulas:

    gather    s (x U_i) V_i, with the factors of the row's adapter i
    one-hot   s (x [U_0 | U_1 | ...]) * [0 | 1 | 0 ...] [V_0; V_1; ...], with those of all adapters

**gather** copies ``r (d + k)`` numbers for each row. **one-hot** copies nothing, but multiplies
with the factors of all ``N`` adapters, ``N`` times the arithmetic: it is better with few adapters
and few tokens in a row. ``docs/benchmarks.md`` has the numbers, and those of
``jax.lax.ragged_dot``. A row that is not finite stays alone in both, but in the gradient of one-hot
it reaches all adapters of the batch.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from lora_jax.core.products._row_ids import nan_where, presence, taken
from lora_jax.core.products._tuning import TUNING, Tuning


def gather_or_one_hot(
    count: int, vectors: Any, copied: int, multiplied: int, tuning: Tuning
) -> str:
    """``"gather"`` or ``"one-hot"``: what takes less time.

    Args:
      count: number of adapters.
      vectors: how many the layer multiplies for one id.
      copied: size of the factors of one adapter.
      multiplied: multiplications of one vector with them.
      tuning: of the platform.

    Example:
      >>> from lora_jax.core.products._tuning import TUNING
      >>> gather_or_one_hot(4, 128, copied=8 * 768, multiplied=8 * 768, tuning=TUNING["cpu"])
      'gather'
      >>> gather_or_one_hot(4, 8, copied=8 * 768, multiplied=8 * 768, tuning=TUNING["cpu"])
      'one-hot'
    """
    # A symbolic number of vectors, of jax.export, cannot be compared.
    if not isinstance(vectors, int):
        return "gather"
    first = (tuning.small - 1) * min(vectors, tuning.few)
    gather = tuning.copy * copied + (vectors + first) * multiplied
    return "gather" if gather < count * vectors * multiplied else "one-hot"


def choices(count: int, vectors: Any, copied: int, multiplied: int) -> dict[str, str]:
    """:func:`gather_or_one_hot` for every platform."""
    return {
        platform: gather_or_one_hot(count, vectors, copied, multiplied, tuning)
        for platform, tuning in TUNING.items()
    }


def row_factors(
    how: str, U: chex.Array, V: chex.Array, ids: chex.Array
) -> tuple[tuple[chex.Array, chex.Array, chex.Array | None], tuple[int, ...] | None]:
    """The factors that the rows of a batch compute with.

    Args:
      how: ``"gather"`` or ``"one-hot"``.
      U: ``(N, *batch, d, r)``, of all adapters.
      V: ``(N, *batch, r, k)``.
      ids: of the rows.

    Returns:
      ``(U, V, mask)``, where only one-hot has a mask; and which axes of ``U`` and ``V`` are those
      of the ids, or ``None`` where all rows share them.
    """
    if how == "gather":
        return (taken(U, ids, 0.0), taken(V, ids, 0.0), None), tuple(range(ids.ndim))
    return one_hot_factors(U, V, ids), None


def one_hot_factors(
    U: chex.Array, V: chex.Array, ids: chex.Array
) -> tuple[chex.Array, chex.Array, chex.Array]:
    """``[U_0 | U_1 | ...]``, ``[V_0; V_1; ...]`` and which columns a row has, ``(*rows, N r)``.

    An adapter that is not finite would reach into all rows, as ``0 * NaN`` is NaN: it is zero here,
    and its rows are NaN by the mask.
    """
    count, r = len(U), U.shape[-1]
    finite = jnp.isfinite(U).reshape(count, -1).all(1) & jnp.isfinite(V).reshape(count, -1).all(1)
    U, V = (jnp.where(finite[(...,) + (None,) * (x.ndim - 1)], x, 0) for x in (U, V))
    known = (presence(ids, count) + nan_where(~taken(finite, ids, True)))[..., None]
    selected = jax.nn.one_hot(ids, count, dtype=bool) | jnp.isnan(known)
    mask = jnp.repeat(jnp.where(selected, known, 0.0), r, axis=-1)
    U, V = jnp.moveaxis(U, 0, -2), jnp.moveaxis(V, 0, -3)
    U = jnp.reshape(U, (*U.shape[:-2], -1))
    return U, jnp.reshape(V, (*V.shape[:-3], -1, V.shape[-1])), mask


def ids_after(ids: chex.Array, x: chex.Array) -> chex.Array:
    """The ids, in a form that cannot be computed before ``x``.

    On CPUs XLA runs early what it can, and so copies the factors for all rows of all layers before
    the first layer: they would be in memory at once, and out of the caches when they are used. It
    takes no notice of ``jax.lax.optimization_barrier`` there. So 0 is added to the ids, made from a
    number of ``x`` by two shifts.

    Example:
      >>> ids_after(jnp.array([2, -1]), jnp.array([jnp.nan, 1.0]))
      Array([ 2, -1], dtype=int32)
    """
    if x.dtype.itemsize > 4 or 0 in x.shape:
        return ids
    one = jax.lax.stop_gradient(x)[(0,) * x.ndim]
    return jax.lax.platform_dependent(ids, one, cpu=_after, default=lambda ids, _: ids)


def _after(ids: chex.Array, number: chex.Array) -> chex.Array:
    bits = jnp.dtype(f"uint{8 * number.dtype.itemsize}")
    half = bits.type(4 * bits.itemsize)
    number = jax.lax.bitcast_convert_type(number, bits)
    zero = jax.lax.shift_right_logical(jax.lax.shift_right_logical(number, half), half)
    return ids + zero.astype(ids.dtype)
