"""Leaves by their paths, as files have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chex
from flax.traverse_util import empty_node

from lora_jax.files._tensors import check_name
from lora_jax.trees._pair import pair
from lora_jax.trees._paths import Key, path_of
from lora_jax.trees._states import parameters_in


def named(leaves: Mapping[Key, Any], name: str) -> dict[str, Any]:
    """Leaves by their paths, as files have them; an integer in a key is written in digits."""
    out: dict[str, Any] = {}
    for key, leaf in leaves.items():
        if leaf is empty_node:
            continue
        path = path_of(key)
        for part in key:
            if type(part) not in (str, int) or "/" in str(part):
                raise ValueError(f"{name}: {path!r} cannot be saved, as {part!r} is part of it.")
        if path in out:
            raise ValueError(f"{name}: two leaves have the path {path!r}, and cannot be saved.")
        check_name(path, name)
        out[path] = leaf
    return out


def named_pair(
    frozen: chex.ArrayTree, adapters: chex.ArrayTree, *, either: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A base and its nodes, as ``pair`` gives them, by paths; no two may be the same."""
    base, nodes = pair(frozen, adapters, either=either)
    return named(parameters_in(base), "frozen"), named(nodes, "adapters")
