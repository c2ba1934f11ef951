"""Adapters in the ``params`` collection, each next to its kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chex

from lora_jax.layers._place_adapters import Placed
from lora_jax.trees._paths import Key, flatten, unflatten

# The name of an adapter is that of its parameter and this.
SUFFIX = "@lora"


def with_adapters(
    params: Mapping[Key, Any], placed: Mapping[Key, Placed], like: chex.ArrayTree
) -> chex.ArrayTree:
    """Parameters with adapters in them.

    Args:
      params: by their keys.
      placed: the adapters, by the keys of their kernels.
      like: a tree of the kind to return.
    """
    beside = {(*key[:-1], key[-1] + SUFFIX): node for key, node in placed.items()}
    return unflatten({**params, **beside}, like)


def restored(params: chex.ArrayTree, frozen: chex.ArrayTree, placed: Any) -> chex.ArrayTree:
    """The parameters that a call with ``mutable`` gives back, without what was placed in them.

    Args:
      params: what the call gives back.
      frozen: the base, which is given back where ``W'`` stood in its place, and still does.
      placed: what the call was given.
    """
    base, given = flatten(frozen, "frozen"), flatten(placed, "params")
    kept = {}
    for key, leaf in flatten(params, "params").items():
        if not key[-1].endswith(SUFFIX):
            kept[key] = base[key] if key in base and leaf is given.get(key) else leaf
    return unflatten(kept, params)
