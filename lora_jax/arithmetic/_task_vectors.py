"""Task vectors merged with interference removed: TIES, DARE, and pruning by magnitude.

A task vector is what fine-tuning has changed, ``W' - W``, here of one matrix; it is dense. All
of it is on the host, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

Array = np.ndarray[Any, Any]

METHODS = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
RANDOM = ("dare_linear", "dare_ties")


def merged(
    combination_type: str,
    deltas: Sequence[Array],
    weights: Sequence[float],
    density: float,
    keys: Sequence[chex.PRNGKey] | None = None,
) -> Array:
    """Task vectors as one.

    Args:
      combination_type: ``"magnitude_prune"`` is ``sum_i w_i prune(delta_i)``; ``"ties"`` elects
        signs of what is pruned (:func:`elected`); ``"dare_linear"`` and ``"dare_ties"`` drop at
        random instead.
      deltas: the task vectors, of one shape.
      weights: a number for each.
      density: share of the entries of each that is kept.
      keys: a random key for each, for DARE.

    Example:
      >>> a, b = np.array([4.0, 1.0, 3.0]), np.array([2.0, 0.5, -4.0])
      >>> merged("ties", [a, b], [1.0, 1.0], density=0.7).tolist()  # the second one is pruned
      [3.0, 0.0, -4.0]
    """
    if combination_type in RANDOM:
        assert keys is not None
        sparse = [dropped(x, density, key) for x, key in zip(deltas, keys, strict=True)]
    else:
        sparse = [pruned(delta, density) for delta in deltas]
    if combination_type.endswith("ties"):
        return elected(sparse, weights)
    return np.asarray(sum(w * x for w, x in zip(weights, sparse, strict=True)))


def pruned(delta: Array, density: float) -> Array:
    """The entries of the largest magnitude, and zeros.

    ``int(density * size)`` of them, but one at least; which of several equal ones is arbitrary.
    """
    drop = delta.size - max(int(density * delta.size), 1)
    if drop == 0:
        return delta
    out = delta.copy()
    out.reshape(-1)[np.argpartition(np.abs(delta), drop, axis=None)[:drop]] = 0
    return out


def dropped(delta: Array, density: float, key: chex.PRNGKey) -> Array:
    """DARE (Yu et al. 2024, equation 1): each entry is kept at random, and divided by that chance.

    So the mean over keys is ``delta``.
    """
    kept = np.asarray(jax.random.uniform(key, delta.shape, jnp.float32) < density)
    return np.asarray(np.where(kept, delta / density, 0), delta.dtype)


def elected(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    """TIES (Yadav et al. 2023, algorithm 1): elect a sign, then the mean of those that have it.

    The sign of an entry is that of ``sum_i sign(w_i) delta_i``, and positive where that is 0. The
    mean is of ``w_i delta_i``, over the entries that are not zero. So a negative weight negates the
    task vector before the election, and a weight of zero leaves it out.
    """
    signed = np.stack([np.sign(w) * x for w, x in zip(weights, deltas, strict=True)])
    agree = np.sign(signed) == np.where(signed.sum(0) >= 0, 1, -1)
    size = np.abs(np.asarray(weights, signed.dtype)).reshape(-1, *(1,) * (signed.ndim - 1))
    return np.asarray((size * signed * agree).sum(0) / np.maximum(agree.sum(0), 1), signed.dtype)
