"""Adapters into a folder: ``adapter.json``, which says all about them, and a safetensors file."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import chex
import numpy as np

from lora_jax._version import __version__
from lora_jax.files import _collections as variables
from lora_jax.files._adapter_json import FORMAT, INDEX, VERSION, checksum, tensors_file
from lora_jax.files._array_names import named, named_pair
from lora_jax.files._bytes import StrPath, write_bytes
from lora_jax.files._fingerprint import fingerprint
from lora_jax.files._json import json_bytes
from lora_jax.files._node_kinds import KINDS, kind_of
from lora_jax.files._tensors import DTYPES, encode
from lora_jax.files._to_host import host
from lora_jax.trees._pair import nodes_of


def save(
    path: StrPath,
    adapters: chex.ArrayTree,
    *,
    frozen: chex.ArrayTree | None = None,
    collections: Mapping[str, chex.ArrayTree] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Saves adapters in a folder, with all that is needed to use them again; the base is not in it.

    The folder has ``adapter.json`` and a safetensors file that it names. Whoever loads the folder
    meanwhile, or after a kill at any moment, has all of the old adapters or all of the new ones.
    With several processes let one of them save.

    Args:
      path: the folder; it is made where there is none, and what was saved there is replaced.
      adapters: the adapters, as :func:`lora_jax.lora_init` returned them, trained.
      frozen: the base. With it the adapters are checked to fit, and a hash of every frozen
        parameter is saved, so that :func:`load` can verify that it is given the same base.
      collections: the model's other collections that training changed, as ``mutable=`` returns
        them: ``{"batch_stats": ...}``. They are not part of the base that ``frozen`` is, and
        without them the model does not compute what it did.
      metadata: anything that JSON has; it stands in ``adapter.json`` under that name.

    Raises:
      TypeError: if adapters, collections or metadata are of another kind.
      ValueError: if arrays are not finite, if the adapters do not fit the base or a leaf is in
        both, or if this process does not have all of an array.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=1)])
      >>> frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config)
      >>> folder = tempfile.mkdtemp()
      >>> lora_jax.save(folder, adapters, frozen=frozen)
      >>> frozen, again = lora_jax.load(folder, params, verify=True)
      >>> chex.assert_trees_all_equal(adapters, again)
    """
    base: dict[str, Any] = {}
    if frozen is None:
        nodes = named(nodes_of(adapters), "adapters")
    else:
        base, nodes = named_pair(frozen, adapters)
    sections: dict[str, dict[str, Any]] = {kind.section: {} for kind in KINDS if kind.always}
    arrays: dict[str, np.ndarray] = {}
    for leaf_path, node in nodes.items():
        if node.changes_base and frozen is None:
            raise ValueError(
                f"The variant {node.kind!r} of {leaf_path!r} has changed the base, without which "
                f"the adapter is of no use: pass frozen=, and save that tree too."
            )
        kind = kind_of(leaf_path, node)
        entry = kind.entry(leaf_path, node)
        sections.setdefault(kind.section, {})[leaf_path] = entry
        for field, name in kind.tensors(leaf_path, entry, leaf_path).items():
            _add(arrays, name, node.arrays[field])
    if not arrays:
        raise ValueError("There is nothing to save: adapters is empty.")
    others = {} if collections is None else variables.arrays_of(collections)
    for collection, leaves in others.items():
        for leaf_path, array in leaves.items():
            _add(arrays, variables.tensor_name(collection, leaf_path), array)
    for name, array in arrays.items():
        if array.dtype not in DTYPES.values():
            raise ValueError(
                f"{name!r} is of dtype {array.dtype}, which a safetensors file cannot have."
            )
    content = encode(arrays)
    folder, file = Path(path), f"adapter-{secrets.token_hex(8)}.safetensors"
    index = {
        "format": FORMAT,
        "version": VERSION,
        "library": __version__,
        "tensors": {"file": file, "sha256": hashlib.sha256(content).hexdigest()},
        **{kind.section: sections.pop(kind.section) for kind in KINDS if kind.always},
        "base": {p: fingerprint(leaf, p) for p, leaf in base.items()},
        "metadata": _checked_metadata(metadata or {}),
    } | sections
    if others:
        index["collections"] = {name: list(leaves) for name, leaves in others.items()}
    index["checksum"] = checksum(index)
    folder.mkdir(parents=True, exist_ok=True)
    old, new = tensors_file(folder), folder / file
    write_bytes(new, content)
    try:
        write_bytes(folder / INDEX, json_bytes(index))
    except BaseException:
        new.unlink()
        raise
    # Only the old one: of other files another process may be about to name one.
    if old is not None:
        old.unlink(missing_ok=True)


def _add(arrays: dict[str, np.ndarray], name: str, array: Any) -> None:
    """Adds an array under a name that no other has."""
    if name in arrays:
        raise ValueError(f"Two arrays would have the name {name!r}.")
    arrays[name] = host(array, name)


def _checked_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    try:
        same: dict[str, Any] = json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be what JSON has: {error}.") from error
    if same != metadata:
        raise TypeError("metadata must be what JSON has: lists, not tuples; strings for keys.")
    return same
