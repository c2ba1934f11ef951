"""Trees of arrays only, as files give them without a target: an adapter's arrays in a dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import empty_node

from lora_jax.core._node import Node
from lora_jax.trees._paths import Key, path_of

# Names that Flax gives to parameters, and never to modules.
_PARAMETERS = ("kernel", "bias", "scale", "embedding")
_LOAD = (
    "A tree read from a file has arrays only: load it into the tree that lora_init gives for the "
    "same config, as with flax.serialization.from_bytes."
)


def check_has_nodes(leaves: Mapping[Key, Any], name: str, base: Mapping[Key, Any] | None) -> None:
    """Checks that adapters are nodes, and not dicts of their arrays.

    Args:
      leaves: of the tree of adapters.
      name: of the tree, for messages.
      base: the leaves of the base, where it is known.

    Raises:
      TypeError: if the arrays of an adapter are in a dict.
      ValueError: if a leaf has the path of a dict of the base.
    """
    inside: dict[Key, dict[str, Any]] = {}
    dicts = {key[:n] for key in base or () for n in range(1, len(key))}
    for key, leaf in leaves.items():
        if key in dicts:
            raise ValueError(
                f"{name} has {path_of(key)!r} as a leaf, and the base has parameters in it. Was it "
                f"made for another model?"
            )
        inside.setdefault(key[:-1], {})[key[-1]] = leaf
        for above in (key[:n] for n in range(1, len(key))):
            if base is not None and base.get(above, empty_node) is not empty_node:
                raise TypeError(
                    f"{name} has {path_of(key)!r}, where the base has a parameter "
                    f"{path_of(above)!r}. {_LOAD}"
                )
    structured = any(isinstance(leaf, Node) for leaf in leaves.values())
    boxes = any(key[-1] == "value" for key in base or ())  # the model's own are in such dicts
    for parent, found in inside.items():
        named = bool(parent) and parent[-1] in _PARAMETERS
        factors = _are_factors(found) and (named or (base is None and not structured))
        if factors or (named and set(found) == {"value"} and not boxes):
            raise TypeError(
                f"{name} has a dict of {' and '.join(map(repr, found))} at "
                f"{path_of(parent) or 'its top'!r}. {_LOAD}"
                + (" Where these are parameters of the model, pass the base too." * (base is None))
            )


def _are_factors(found: Mapping[str, Any]) -> bool:
    """Whether arrays have the names and the shapes of one adapter's."""
    if not {"U", "V"} <= set(found) <= {"U", "V", "m"}:
        return False
    U, V = (np.shape(found[name]) for name in ("U", "V"))
    return len(U) == len(V) > 1 and U[:-2] == V[:-2] and U[-1] == V[-2]
