"""Arithmetic of adapters: weighted sums, TIES, DARE, pruning, and compression to a lower rank."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import empty_node

from lora_jax._compat import is_traced
from lora_jax._renamed import renamed_arguments
from lora_jax.arithmetic._approximation import Approximation, ApproximationReport
from lora_jax.arithmetic._combine_kernel import Plan, combine_fully_trained, combine_kernel
from lora_jax.arithmetic._sums import matrix_of
from lora_jax.core._node import Node
from lora_jax.trees._leaves import is_finite
from lora_jax.trees._pair import base_of, check_pair, nodes_of
from lora_jax.trees._paths import Key, flatten, path_of, unbox, unflatten

# What must be alike to be added; the rest of an adapter says how it is trained.
_SAME = ("axes", "materialize", "untied")
_ON_HOST = (
    "rank=, explained_variance= and every combination_type but 'linear' are computed on the host, "
    "and cannot be jitted or differentiated."
)


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
      is no pytree, so that what is jitted returns the adapters alone. With ``rank``,
      ``explained_variance``, or another combination_type than ``"linear"``, the host computes, in
      float64 where factors are cut.

    Raises:
      TypeError: arguments of the wrong type; traced arrays where the host computes.
      ValueError: numbers out of range; adapters that are not of one model, or not finite; a
        missing ``params``, ``rank`` or ``key``. The message names the path.

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
    trees = _checked_trees(adapters)
    return _combine(trees, _checked_weights(weights, len(trees)), params, plan)


@renamed_arguments(energy="explained_variance")
def compress(
    adapters: chex.ArrayTree,
    *,
    rank: int | None = None,
    explained_variance: float | None = None,
    params: chex.ArrayTree | None = None,
    variant: str | None = None,
) -> tuple[chex.ArrayTree, ApproximationReport]:
    """The same adapters with a lower rank, by singular values.

    Args:
      adapters: a tree as :func:`lora_jax.lora_init` or :func:`lora_jax.load` return it.
      rank: as for :func:`combine`; or
      explained_variance: likewise. One of the two is needed.
      params: as for :func:`combine`; DoRA needs it.
      variant: ``"lora"`` makes every DoRA a LoRA, by the singular values of the dense ``W' - W``.
        It needs a far higher rank for the same error, as a change of magnitudes has all ranks.

    Returns:
      ``(adapters, report)``, as :func:`combine`.

    Raises:
      TypeError: as :func:`combine`.
      ValueError: likewise; neither a rank nor an explained_variance, or both.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=4)])
      >>> _, adapters = lora_jax.lora_init(jax.random.key(0), {"kernel": jnp.ones((8, 6))}, config)
      >>> adapters["kernel"] = adapters["kernel"].replace(U=jnp.eye(8, 4))
      >>> adapters, report = lora_jax.compress(adapters, explained_variance=0.9)
      >>> adapters["kernel"].rank, report["kernel"].error < 0.1**0.5
      (2, True)
    """
    if (rank is None) == (explained_variance is None):
        raise ValueError("compress needs either rank= or explained_variance=.")
    if variant not in (None, "lora"):
        raise ValueError(f"compress(variant=...) must be 'lora' or left out, got {variant!r}.")
    plan = Plan(rank=rank, explained_variance=explained_variance, as_lora=variant == "lora")
    return _combine(_checked_trees([adapters]), [1.0], params, plan)


def _combine(
    trees: Sequence[chex.ArrayTree],
    weights: Sequence[Any],
    params: chex.ArrayTree | None,
    plan: Plan,
) -> tuple[chex.ArrayTree, ApproximationReport]:
    if not plan.exact and any(is_traced(x) for x in (*weights, plan.key)):
        raise TypeError(f"The weights or the key are traced: {_ON_HOST}")
    base = None if params is None else base_of(params, "params")
    leaves = [flatten(tree, f"adapters[{i}]") for i, tree in enumerate(trees)]
    nodes = [nodes_of(tree, f"adapters[{i}]", base) for i, tree in enumerate(trees)]
    flat: dict[Key, Any] = {}
    rows: dict[str, Approximation] = {}
    for key in _keys(leaves):
        path = path_of(key)
        found = {i: one[key] for i, one in enumerate(nodes) if key in one}
        if not found:
            flat[key] = empty_node
            continue
        _check_nodes(path, found, plan)
        leaf = _base_leaf(key, found, base)
        if not plan.exact and is_traced(leaf):
            raise TypeError(f"params is traced at {path!r}: {_ON_HOST}")
        own_weights = [weights[i] for i in found]
        first = next(iter(found.values()))
        if first.in_base:
            W = _matrix(path, found, leaf)
            flat[key], rows[path] = combine_kernel(path, found, own_weights, W, plan)
        else:
            complete = len(found) == len(trees)
            combined = combine_fully_trained(path, found, own_weights, leaf, complete, plan)
            flat[key], rows[path] = combined.as_leaf(), Approximation(None, 0.0)
    return unflatten(flat, trees[0]), ApproximationReport(rows)


def _checked_trees(adapters: Sequence[chex.ArrayTree]) -> list[chex.ArrayTree]:
    if isinstance(adapters, Mapping):
        raise TypeError("adapters must be a list of adapter trees; this is one: write [adapters].")
    trees = list(adapters)
    if not trees:
        raise ValueError("There are no adapters to combine: the list is empty.")
    return trees


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


def _keys(nodes: Sequence[Mapping[Key, Any]]) -> list[Key]:
    """All keys, but those of empty dicts that another tree has something in."""
    keys = dict.fromkeys(key for one in nodes for key in one)
    inner = {key[:n] for key in keys for n in range(len(key))}
    for key in inner & keys.keys():
        if any(one.get(key, empty_node) is not empty_node for one in nodes):
            raise ValueError(
                f"{path_of(key)!r} is a parameter for some adapters, and has parameters in it for "
                f"others: they are not of one model."
            )
    return [key for key in keys if key not in inner]


def _check_nodes(path: str, found: Mapping[int, Any], plan: Plan) -> None:
    """Raises an error if what several trees have at a path cannot be added."""
    for j, node in found.items():
        node.check_combines(path, f"adapters[{j}]")
        arrays = jax.tree.leaves(node)
        if not all(isinstance(array, jax.Array | np.ndarray) for array in arrays):
            raise TypeError(
                f"adapters[{j}] has {node.as_leaf()!r} at {path!r}, which is neither an adapter "
                f"nor an array."
            )
        if any(is_traced(array) for array in arrays) and not plan.exact:
            raise TypeError(f"{path!r} is traced: {_ON_HOST}")
        if not all(map(is_finite, arrays)):
            raise ValueError(f"adapters[{j}] has NaN or infinite values at {path!r}.")
    (i, first), *rest = found.items()
    for j, node in rest:
        if first.in_base != node.in_base:
            kinds = [
                "an adapter" if one.in_base else "the fully trained leaf" for one in (first, node)
            ]
            raise ValueError(
                f"adapters[{i}] has {kinds[0]} at {path!r}, adapters[{j}] {kinds[1]}: these cannot "
                f"be added. Merge one into the parameters instead."
            )
        for name in _SAME if first.in_base else ():
            if (a := getattr(first, name)) != (b := getattr(node, name)):
                raise ValueError(
                    f"{path!r} is adapted with {name}={a} in adapters[{i}], and {name}={b} in "
                    f"adapters[{j}]: only what is adapted alike can be added."
                )
        shapes = [_shape(one) for one in (first, node)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{path!r} is {shapes[0]} in adapters[{i}], and {shapes[1]} in adapters[{j}]: they "
                f"are not of one model."
            )


def _shape(node: Any) -> tuple[Any, ...]:
    """``(*stack, d, k)`` of a kernel; shape and dtypes of a fully trained leaf."""
    if node.in_base:
        return (*np.shape(node.U)[:-1], np.shape(node.V)[-1])
    array = node.array
    return (*array.shape, jnp.dtype(array.dtype).name, node.merged_dtype().name)


def _base_leaf(key: Key, found: Mapping[int, Node], base: Mapping[Key, Any] | None) -> Any:
    """The array that ``params`` has for these nodes; ``None`` where it is not known."""
    if base is None:
        return None
    for i, node in found.items():
        try:
            check_pair(key, node, base, name="params")
        except ValueError as error:
            raise ValueError(f"adapters[{i}]: {error}") from None
    leaf = base.get(key, empty_node)
    if leaf is empty_node:
        return None
    if not is_finite(array := unbox(leaf)):
        raise ValueError(f"params has NaN or infinite values at {path_of(key)!r}.")
    return array


def _matrix(path: str, found: Mapping[int, Any], kernel: Any) -> chex.Array | None:
    """``W``, where an adapter needs it."""
    dora = [i for i, node in found.items() if node.m is not None]
    if not dora:
        return None
    if kernel is None:
        raise ValueError(
            f"adapters[{dora[0]}] is a DoRA at {path!r}, whose change depends on the kernel: pass "
            f"params=, the parameters that the adapters were trained on."
        )
    return matrix_of(kernel, found[dora[0]])
