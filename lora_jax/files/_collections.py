"""Collections of the model other than its parameters, as a folder of adapters has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chex
from flax.traverse_util import empty_node

from lora_jax.core._boxes import rebox, unbox
from lora_jax.files._array_names import named
from lora_jax.files._tensors import check_name
from lora_jax.trees._leaves import dtype_of
from lora_jax.trees._paths import flatten, path_of, unflatten


def arrays_of(collections: Mapping[str, chex.ArrayTree]) -> dict[str, dict[str, Any]]:
    """The arrays of collections that have any, by their paths."""
    _check_type(collections)
    if "params" in collections:
        raise ValueError(
            "collections must be those beside 'params', which adapters and frozen are: leave it "
            "out, as with mutable=['batch_stats']."
        )
    out = {}
    for name, tree in collections.items():
        where = f"collections[{name!r}]"
        if leaves := named(flatten(tree, where), where):
            check_name(name, "collections")
            out[name] = {path: unbox(leaf) for path, leaf in leaves.items()}
    return out


def tensor_name(collection: str, path: str) -> str:
    """The name of an array of a collection in a file."""
    return f"{collection}:{path}"


def listed(collections: Mapping[str, Any]) -> str:
    """Names of collections in words."""
    return " and ".join(f"the collection {name!r}" for name in collections)


def restored(
    stored: Mapping[str, Mapping[str, chex.Array]],
    given: Mapping[str, chex.ArrayTree],
    file: str,
) -> dict[str, chex.ArrayTree]:
    """Collections of the model, with the arrays that were saved in their places and boxes."""
    _check_type(given)
    out = {name: tree for name, tree in given.items() if name != "params"}
    for name, arrays in stored.items():
        if name not in out:
            raise ValueError(f"{file} has the collection {name!r}, which collections lacks.")
        flat = flatten(out[name], f"collections[{name!r}]")
        keys = {path_of(key): key for key, leaf in flat.items() if leaf is not empty_node}
        for path in sorted(keys.keys() ^ arrays.keys()):
            has, lacks = (file, "the model") if path in arrays else ("the model", file)
            raise ValueError(
                f"{has} has {path!r} in the collection {name!r}, and {lacks} does not. Is it of "
                f"another model?"
            )
        for path, array in arrays.items():
            leaf = unbox(flat[keys[path]])
            dtype, shape = dtype_of(leaf), getattr(leaf, "shape", None)
            if dtype != array.dtype or shape != array.shape:
                raise ValueError(
                    f"{file} has {path!r} in the collection {name!r} as {array.dtype} "
                    f"{array.shape}, but the model has {dtype} {shape} there. "
                    f"Is it of another model?"
                )
            flat[keys[path]] = rebox(flat[keys[path]], array)
        out[name] = unflatten(flat, out[name])
    return out


def _check_type(collections: object) -> None:
    if not isinstance(collections, Mapping):
        raise TypeError(
            f"collections must be a dict of collections, as {{'batch_stats': ...}}, got "
            f"{type(collections).__name__}."
        )
