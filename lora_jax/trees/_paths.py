"""Nested dicts by the paths of their leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chex
import flax.core
from flax.traverse_util import flatten_dict, unflatten_dict

Key = tuple[str, ...]


def flatten(tree: chex.ArrayTree, name: str) -> dict[Key, Any]:
    """The leaves of nested dicts by their keys. Boxes and adapters are leaves."""
    if not isinstance(tree, Mapping):
        raise TypeError(f"{name} must be a nested dict of arrays, got {type(tree).__name__}.")
    flat: dict[Key, Any] = flatten_dict(flax.core.unfreeze(dict(tree)), keep_empty_nodes=True)
    return flat


def unflatten(flat: Mapping[Key, Any], like: chex.ArrayTree) -> chex.ArrayTree:
    """The inverse of :func:`flatten`: a ``FrozenDict`` where ``like`` is one."""
    tree: chex.ArrayTree = unflatten_dict(flat)
    return flax.core.freeze(tree) if isinstance(like, flax.core.FrozenDict) else tree


def path_of(key: Key) -> str:
    """The path that patterns are matched on."""
    return "/".join(map(str, key))
