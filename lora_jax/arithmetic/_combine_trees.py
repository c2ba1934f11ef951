"""Trees of adapters combined path by path, and what must be alike for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import empty_node

from lora_jax._compat import is_traced
from lora_jax.arithmetic._combine_leaf import combine_fully_trained, combine_kernel
from lora_jax.arithmetic._options import Plan
from lora_jax.arithmetic._report import Approximation, ApproximationReport
from lora_jax.arithmetic._sums import matrix_of, plain_factors
from lora_jax.core._boxes import unbox
from lora_jax.core._node import Node
from lora_jax.trees._leaves import is_finite
from lora_jax.trees._pair import base_of, check_pair, nodes_of
from lora_jax.trees._paths import Key, flatten, path_of, unflatten

# What must be alike to be added; the rest of an adapter says how it is trained.
_SAME = ("axes", "materialize", "untied", "base_hash")
_ON_HOST = (
    "rank=, explained_variance= and every combination_type but 'linear' are computed on the host, "
    "and cannot be jitted or differentiated."
)


def combine_trees(
    trees: Sequence[chex.ArrayTree],
    weights: Sequence[Any],
    params: chex.ArrayTree | None,
    plan: Plan,
) -> tuple[chex.ArrayTree, ApproximationReport]:
    """The trees as one.

    Args:
      trees: of adapters.
      weights: a number for each.
      params: the parameters that they were trained on, or ``None``.
      plan: how.

    Returns:
      ``(adapters, report)``.
    """
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


def checked_trees(adapters: Sequence[chex.ArrayTree]) -> list[chex.ArrayTree]:
    """The trees as a list, in which there is one at least."""
    if isinstance(adapters, Mapping):
        raise TypeError("adapters must be a list of adapter trees; this is one: write [adapters].")
    trees = list(adapters)
    if not trees:
        raise ValueError("There are no adapters to combine: the list is empty.")
    return trees


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
        if shapes[0] != shapes[1] and None not in shapes:
            raise ValueError(
                f"{path!r} is {shapes[0]} in adapters[{i}], and {shapes[1]} in adapters[{j}]: they "
                f"are not of one model."
            )


def _shape(node: Any) -> tuple[Any, ...] | None:
    """``(*stack, d, k)`` of a kernel, if known; shape and dtypes of a fully trained leaf."""
    if node.in_base:
        sizes: tuple[int, ...] | None = node.matrix_sizes()
        return sizes
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
    dora = [i for i, node in found.items() if plain_factors(node) is None]
    if not dora:
        return None
    if kernel is None:
        raise ValueError(
            f"adapters[{dora[0]}] is {_word(found[dora[0]])} at {path!r}, whose change depends on "
            f"the kernel: pass params=, the parameters that the adapters were trained on."
        )
    return matrix_of(kernel, found[dora[0]])


def _word(node: Any) -> str:
    return "a DoRA" if node.m is not None else f"of variant {node.kind!r}"
