"""Nested dicts by the paths of their leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chex
import flax.core
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_jax.trees._qwix_leaf import from_qwix
from lora_jax.trees._states import is_state, leaves_of_state, state_of

Key = tuple[str, ...]


def flatten(tree: chex.ArrayTree, name: str) -> dict[Key, Any]:
    """The leaves of nested dicts, or of a state, by their keys. Boxes and adapters are leaves.

    Those that qwix has quantized are quantized leaves of ours.
    """
    if is_state(tree):
        return leaves_of_state(tree, name)
    if not isinstance(tree, Mapping):
        raise TypeError(
            f"{name} must be a nested dict of arrays, or the nnx.State of an NNX model, "
            f"graphdef, state = nnx.split(model); got {type(tree).__name__}."
        )
    flat: dict[Key, Any] = flatten_dict(flax.core.unfreeze(dict(tree)), keep_empty_nodes=True)
    return {key: from_qwix(leaf, path_of(key)) for key, leaf in flat.items()}


def unflatten(flat: Mapping[Key, Any], like: chex.ArrayTree) -> chex.ArrayTree:
    """The inverse of :func:`flatten`: a ``FrozenDict`` or a state where ``like`` is one."""
    if is_state(like):
        return state_of(flat, like)
    tree: chex.ArrayTree = unflatten_dict(flat)
    return flax.core.freeze(tree) if isinstance(like, flax.core.FrozenDict) else tree


def unflatten_adapters(flat: Mapping[Key, Any], params: chex.ArrayTree) -> chex.ArrayTree:
    """Nodes as a tree of adapters for these parameters: nested dicts, also for a state."""
    return unflatten(flat, {} if is_state(params) else params)


def path_of(key: Key) -> str:
    """The path that patterns are matched on."""
    return "/".join(map(str, key))
