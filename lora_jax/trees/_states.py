"""``nnx.State``, the variables of an NNX model, as a tree of parameters.

Its leaves are ``nnx.Variable``, each a box around an array as ``nn.Partitioned`` is one in Linen.
Parameters are those that are ``nnx.Param``: statistics, caches and keys are never adapted or
trained. Below the street ``nnx/`` this file and ``_compat.py`` are all that knows NNX.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

# A key as adapters have it: the numbers of lists are words there, as in files.
Key = tuple[str, ...]


def is_state(tree: Any) -> bool:
    """Whether something is an ``nnx.State``."""
    return isinstance(tree, nnx.State)


def leaves_of_state(state: Any, name: str = "state") -> dict[Key, Any]:
    """The variables of a state by their keys.

    Raises:
      ValueError: if two have the same path.
    """
    flat: dict[Key, Any] = {}
    for path, leaf in nnx.to_flat_state(state):
        key = tuple(map(str, path))
        if key in flat:
            raise ValueError(
                f"{name} has {'/'.join(key)!r} twice, by a number and by a word: patterns and "
                f"files could not tell them apart."
            )
        flat[key] = leaf
    return flat


def state_of(flat: Mapping[Key, Any], like: Any) -> Any:
    """The inverse of :func:`leaves_of_state`.

    Args:
      flat: variables by their keys.
      like: the state that the keys are of. Those that it lacks have numbers where they look so.
    """
    paths = {tuple(map(str, path)): path for path, _ in nnx.to_flat_state(like)}
    numbers = {path[:n] for path in paths.values() for n in range(len(path) + 1)}

    def path_of_key(key: Key) -> tuple[Any, ...]:
        if key in paths:
            return paths[key]
        path: tuple[Any, ...] = ()
        for part in key:
            is_word = (*path, part) in numbers or not part.isdigit()
            path = (*path, part if is_word else int(part))
        return path

    # As other variables: nnx.merge takes those of a state into the model, which may change them.
    own = {key: jax.tree.map(lambda array: array, leaf) for key, leaf in flat.items()}
    return nnx.from_flat_state([(path_of_key(key), leaf) for key, leaf in own.items()])


def parameters_in(flat: Mapping[Key, Any]) -> dict[Key, Any]:
    """The leaves that may be adapted or trained: not the statistics, caches and keys of a state.

    Where there are variables, arrays without one are data of the model.
    """
    has_variables = any(isinstance(leaf, nnx.Variable) for leaf in flat.values())
    kind = nnx.Param if has_variables else object
    return {key: leaf for key, leaf in flat.items() if isinstance(leaf, kind)}


def has_adapter(leaf: Any) -> bool:
    """Whether a leaf is what is trained in a model of ``lora_model``."""
    return isinstance(leaf, nnx.Variable) and getattr(leaf, "is_of_lora_model", False) is True


def names_of_variable(leaf: Any) -> Any:
    """The axes of a mesh that a variable names, as a ``PartitionSpec``; ``None`` without names."""
    if not isinstance(leaf, nnx.Variable):
        return None
    (spec,) = jax.tree.leaves(nnx.get_partition_spec(leaf))
    return spec if tuple(spec) else None
