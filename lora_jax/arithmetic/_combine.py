"""Several adapters as one: weighted sums, TIES, DARE and pruning."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import chex
import numpy as np

from lora_jax._compat import is_traced
from lora_jax._deprecated import renamed_arguments
from lora_jax.arithmetic._combine_trees import checked_trees, combine_trees
from lora_jax.arithmetic._options import Plan
from lora_jax.arithmetic._report import ApproximationReport


@renamed_arguments(method="combination_type", energy="explained_variance")
def combine(
    adapters: Sequence[chex.ArrayTree],
    weights: Sequence[Any],
    *,
    params: chex.ArrayTree | None = None,
    combination_type: str = "linear",
    density: float | None = None,
    key: chex.PRNGKey | None = None,
    rank: int | None = None,
    explained_variance: float | None = None,
) -> tuple[chex.ArrayTree, ApproximationReport]:
    """Several adapters as one, whose ``W' - W`` is a weighted sum of theirs.

    With ``delta_i = W'_i - W``, of DoRA with its magnitudes, the result changes ``W`` by

    - ``"linear"``: ``sum_i w_i delta_i``, task arithmetic (Ilharco et al. 2023). A sum of LoRAs is
      a LoRA, and one with a DoRA in it a DoRA, of the sum of the ranks, but at most
      ``min(d, k)``. It is exact, forms no singular values, and can be jitted and differentiated.
      Weights ``[-1]`` negate, ``[1 - t, t]`` interpolate.
    - ``"magnitude_prune"``: the same of the entries of ``delta_i`` with the largest magnitudes.
    - ``"ties"``: of those, the mean of ``w_i delta_i`` where it has the elected sign (Yadav et al.
      2023).
    - ``"dare_linear"``, ``"dare_ties"``: entries are dropped at random instead, and what is kept is
      divided by ``density`` (Yu et al. 2024).

    The latter four work on the dense ``delta_i``, each matrix by itself (the papers prune over all
    parameters at once), with one for each adapter in memory. Their result is a LoRA, by singular
    values, and its error is against the dense result.

    Args:
      adapters: trees as :func:`lora_jax.lora_init` or :func:`lora_jax.load` return them. Ranks,
        scales and variants may differ. What a tree has no adapter for, it does not change.
      weights: a number for each.
      params: the parameters that the adapters were trained on. DoRA needs its kernels, for which
        ``frozen`` does; leaves that are fully trained need theirs, unless all trees have them and
        linear weights sum to 1.
      combination_type: as above.
      density: in ``(0, 1]``, the share of the entries that is kept; not for ``"linear"``.
      key: for DARE.
      rank: of the result, at most; the nearest one by singular values. A DoRA stays one: what
        is cut is ``U V``, so that ``W'`` is nearest for the same ``m / ||W + s U V||_c``.
      explained_variance: in ``(0, 1]``, instead of a rank: the smallest that keeps this share of
        ``||W' - W||^2``, so that the error is ``sqrt(1 - explained_variance)`` at most. For stacked
        kernels the rank is the largest of any matrix, and the others have zeros. 1 is exact but for
        rounding.

    Returns:
      ``(adapters, report)``. The adapters have ``s = 1``, are a ``FrozenDict`` if the first tree is
      one, and would be trained on with the dropout, product and ``detach_norm`` of the first
      adapter of the same variant. The report has the rank and the relative error of every path; it
      is not a pytree, so that what is jitted returns the adapters alone. With ``rank``,
      ``explained_variance``, or another combination_type than ``"linear"``, the host computes, in
      float64 where factors are cut.

    Raises:
      TypeError: if arguments are of the wrong type, or traced where the host computes.
      ValueError: if numbers are out of range, if adapters are not of one model or not finite, or if
        ``params``, ``rank`` or ``key`` is missing. The message names the path.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax
      >>> rules = [lora_jax.Rule("kernel", rank=r, zero=z) for r, z in [(1, "U"), (2, "V")]]
      >>> params = {"kernel": jnp.ones((8, 6))}
      >>> trees = [
      ...     lora_jax.lora_init(jax.random.key(0), params, lora_jax.LoraConfig([rule]))[1]
      ...     for rule in rules
      ... ]
      >>> adapters, report = lora_jax.combine(trees, [0.5, 0.5])
      >>> print(report)
      path    rank  relative error
      ------  ----  --------------
      kernel     3           exact
      ------  ----  --------------
    """
    plan = Plan(combination_type, density, key, rank, explained_variance)
    trees = checked_trees(adapters)
    return combine_trees(trees, _checked_weights(weights, len(trees)), params, plan)


def _checked_weights(weights: Sequence[Any], count: int) -> list[Any]:
    """A float for each, but for traced ones."""
    if isinstance(weights, numbers.Real):
        raise TypeError(
            f"weights must be a list of numbers, one for each adapter, got {weights!r}."
        )
    checked: list[Any] = []
    for weight in weights:
        if isinstance(weight, bool) or np.shape(weight) != ():
            raise TypeError(f"A weight must be a number, got {weight!r}.")
        if is_traced(weight):
            checked.append(weight)
            continue
        try:
            checked.append(float(weight))
        except (TypeError, ValueError):
            raise TypeError(f"A weight must be a number, got {weight!r}.") from None
        if not math.isfinite(checked[-1]):
            raise ValueError(f"A weight must be finite, got {weight!r}.")
    if len(checked) != count:
        raise ValueError(
            f"There are {count} adapters, but {len(checked)} weights: give one for each."
        )
    return checked
