"""The adapters of one kernel as one, and the trained values of one leaf."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np

from lora_jax._compat import is_traced
from lora_jax.arithmetic import _sums as sums
from lora_jax.arithmetic import _task_vectors as task_vectors
from lora_jax.arithmetic._low_rank import LowRank, low_rank, low_rank_product
from lora_jax.arithmetic._options import Plan
from lora_jax.arithmetic._report import Approximation
from lora_jax.arithmetic._sums import Sum
from lora_jax.core._adapter import Adapter
from lora_jax.core._boxes import rebox
from lora_jax.core._fully_trained import FullyTrained
from lora_jax.core.variants._cached_norm import CachedNorm
from lora_jax.core.variants._dora import DoRA
from lora_jax.core.variants._lora import LoRA


def combine_kernel(
    path: str, found: dict[int, Any], weights: Sequence[Any], W: chex.Array | None, plan: Plan
) -> tuple[Adapter, Approximation]:
    """The adapters of one kernel as one.

    Args:
      path: of the kernel.
      found: its adapters, by their place among all.
      weights: a number for each of these.
      W: ``(*stack, d, k)`` in float32; ``None`` where all are LoRA.
      plan: how.
    """
    nodes = list(found.values())
    if not plan.linear:
        total, error = _merged(path, found, weights, W, plan)
    else:
        total, error = sums.weighted(nodes, weights, W), 0.0
        if plan.exact:
            total = sums.folded(total)
        else:
            total, error = _cut(total, W, plan)
    variants = (LoRA,) if total.c is None else (DoRA, CachedNorm)
    alike = [node for variant in variants for node in nodes if type(node.variant) is variant]
    combined = sums.as_adapter(total, W, (alike or nodes)[0])
    return combined, Approximation(combined.rank, error)


def combine_fully_trained(
    path: str,
    found: dict[int, Any],
    weights: Sequence[Any],
    leaf: Any,
    complete: bool,
    plan: Plan,
) -> FullyTrained:
    """One leaf that is fully trained: its base, and the combined changes.

    Args:
      path: of the leaf.
      found: its trained values, by their place among all adapters.
      weights: a number for each of these.
      leaf: its base, or ``None`` where that is not known.
      complete: whether all adapters have it.
      plan: how.

    Raises:
      ValueError: if the base is needed, but not known.
    """
    first: FullyTrained = next(iter(found.values()))
    values = [jnp.asarray(node.array) for node in found.values()]
    if leaf is None:
        known = complete and plan.linear and not is_traced(sum(weights))
        if not (known and math.isclose(sum(weights), 1.0, abs_tol=1e-6)):
            raise ValueError(
                f"{path!r} is fully trained: unless combination_type='linear', all adapters have "
                f"it and the weights are numbers that sum to 1, its base is needed. Pass params=, "
                f"all parameters that the adapters were trained on; the frozen tree lacks this one."
            )
        result = sum(w * value for w, value in zip(weights, values, strict=True))
    else:
        base = jnp.asarray(leaf).astype(values[0].dtype)
        deltas = [value - base for value in values]
        if plan.linear:
            result = base + sum(w * delta for w, delta in zip(weights, deltas, strict=True))
        else:
            assert plan.density is not None
            arrays, keys = list(map(np.asarray, deltas)), plan.keys(path, list(found))
            result = base + task_vectors.merged(
                plan.combination_type, arrays, weights, plan.density, keys
            )
    result = jnp.asarray(result, values[0].dtype)
    return FullyTrained(rebox(first.value, result), first.dtype)


def _merged(
    path: str, found: dict[int, Any], weights: Sequence[Any], W: chex.Array | None, plan: Plan
) -> tuple[Sum, float]:
    """The sum of dense task vectors, matrix by matrix, and its relative error."""
    if plan.rank is None and plan.explained_variance is None:
        raise ValueError(
            f"combination_type={plan.combination_type!r} makes the change of {path!r} dense: pass "
            f"rank=, or explained_variance=, where 1.0 keeps all, and takes up to as many "
            "numbers as the kernel has."
        )
    assert plan.density is not None
    first = next(iter(found.values()))
    stack = np.shape(next(iter(first.arrays.values())))[: first.stack_ndim]
    near = []
    for i, index in enumerate(np.ndindex(stack)):
        deltas = []
        for node in found.values():
            one = node.replace(arrays={name: a[index] for name, a in node.arrays.items()})
            change = sums.delta(sums.weighted([one], [1.0], _at(W, index)), _at(W, index))
            deltas.append(np.asarray(change, np.float32))
        keys = plan.keys(path, list(found), i)
        merged = task_vectors.merged(plan.combination_type, deltas, weights, plan.density, keys)
        near.append(low_rank(merged, plan.rank, plan.explained_variance))
    return _stacked(near, stack, None)


def _cut(total: Sum, W: chex.Array | None, plan: Plan) -> tuple[Sum, float]:
    """A sum with a lower rank, and its relative error. A ``c`` stays, unless all becomes a LoRA."""
    stack = np.shape(total.U)[:-2]
    near = []
    for index in np.ndindex(stack):
        one = Sum(total.U[index], total.Z[index], _at(total.c, index))
        U, Z, norm = np.asarray(one.U), np.asarray(one.Z), None
        if one.c is not None:
            dense = np.asarray(sums.delta(one, _at(W, index)))
            if plan.as_lora:
                near.append(low_rank(dense, plan.rank, plan.explained_variance))
                continue
            norm = float(np.linalg.norm(dense.astype(np.float64)))
        near.append(low_rank_product(U, Z, plan.rank, plan.explained_variance, norm))
    return _stacked(near, stack, None if plan.as_lora else total.c)


def _at(array: Any, index: tuple[int, ...]) -> Any:
    return None if array is None else array[index]


def _stacked(near: list[LowRank], stack: tuple[int, ...], c: Any) -> tuple[Sum, float]:
    """Factors of one rank, by zeros where a matrix needs less, and the error of all together."""
    rank = max(one.U.shape[1] for one in near)
    U = np.stack([np.pad(one.U, ((0, 0), (0, rank - one.U.shape[1]))) for one in near])
    V = np.stack([np.pad(one.V, ((0, rank - len(one.V)), (0, 0))) for one in near])
    lost, norm = math.hypot(*(one.lost for one in near)), math.hypot(*(one.norm for one in near))
    total = Sum(U.reshape(*stack, *U.shape[1:]), V.reshape(*stack, *V.shape[1:]), c)
    return total, lost / norm if norm > 0 else 0.0
