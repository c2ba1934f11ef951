"""What a folder of adapters holds, read without a model."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.files import _collections as variables
from lora_jax.files._adapter_json import INDEX, read_index
from lora_jax.files._bytes import StrPath
from lora_jax.files._node_kinds import KINDS, NodeKind
from lora_jax.files._tensors import Tensors, check_name


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a folder holds.

    Attributes:
      adapters: every node by its path, with NumPy's arrays; as in a tree of adapters, a leaf that
        was fully trained in its own dtype is a plain array.
      base: a hash of every frozen parameter by its path; empty where none were taken.
      metadata: what the user gave to :func:`lora_jax.save`.
      library: version of lora_jax that wrote it.
      collections: the arrays of other collections of the model, by the name of the collection and
        their paths.
    """

    adapters: Mapping[str, Any]
    base: Mapping[str, str]
    metadata: Mapping[str, Any]
    library: str
    collections: Mapping[str, Mapping[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    def adapters_alone(self, path: StrPath) -> Mapping[str, Any]:
        """The adapters, for what has no place for other collections.

        Raises:
          ValueError: if there are such collections.
        """
        if self.collections:
            raise ValueError(
                f"{path} has {variables.listed(self.collections)} beside the adapters, which "
                f"training changed, and for which there is no place here: load it in Python, with "
                f"lora_jax.load and collections=."
            )
        return self.adapters


def read(path: StrPath) -> Stored:
    """What a folder holds, without a model; arrays are NumPy's.

    Raises:
      FileNotFoundError: if no adapters are there.
      ValueError: if the files are damaged; the message names the file and the key.

    Example:
      >>> import tempfile, jax.numpy as jnp, lora_jax
      >>> folder = tempfile.mkdtemp()
      >>> lora_jax.save(folder, {"bias": jnp.zeros(2)}, metadata={"task": "reviews"})
      >>> stored = read(folder)
      >>> list(stored.adapters), stored.metadata["task"]
      (['bias'], 'reviews')
    """
    folder = Path(path)
    index = read_index(folder)
    while True:
        file = folder / index["tensors"]["file"]
        try:
            tensors = Tensors(file)
            with file.open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
            break
        except FileNotFoundError:
            # Saved anew since the index was read?
            newer = read_index(folder)
            if newer["tensors"]["file"] == index["tensors"]["file"]:
                raise FileNotFoundError(f"{file} is missing, which {INDEX} names.") from None
            index = newer
    if found != index["tensors"]["sha256"]:
        raise ValueError(f"{file} is damaged: its SHA-256 is not the one in {INDEX}.")
    return _stored(index, tensors, folder / INDEX)


def _stored(index: Mapping[str, Any], tensors: Tensors, file: Path) -> Stored:
    """The nodes that the index describes and the tensors hold, all of them and no more."""
    described: dict[str, tuple[NodeKind, Any, dict[str, str]]] = {}
    for kind in KINDS:
        for path, entry in index.get(kind.section, {}).items():
            where = f"{file}: {path!r}"
            if path in described:
                raise ValueError(f"{where} is described twice.")
            described[path] = kind, entry, kind.tensors(path, entry, where)
    expected = {name for _, _, names in described.values() for name in names.values()}
    others = index.get("collections", {})
    for collection, paths in others.items():
        texts = isinstance(paths, list) and all(isinstance(path, str) for path in paths)
        if not texts or len(set(paths)) < len(paths):
            raise ValueError(
                f"{file}: 'collections' has {paths!r} for {collection!r}, which are not paths."
            )
        expected |= {variables.tensor_name(collection, path) for path in paths}
    for name in sorted(expected - set(tensors)):
        raise ValueError(f"{tensors.path} lacks {name!r}, which {file} describes.")
    for name in sorted(set(tensors) - expected):
        raise ValueError(f"{tensors.path} has {name!r}, which {file} does not describe.")
    adapters: dict[str, Any] = {}
    for path, (kind, entry, names) in described.items():
        arrays = {field: tensors[name] for field, name in names.items()}
        adapters[path] = kind.read(entry, arrays, path, f"{file}: {path!r}").as_leaf()
    collections: dict[str, dict[str, np.ndarray]] = {}
    for collection, paths in others.items():
        collections[collection] = {p: tensors[variables.tensor_name(collection, p)] for p in paths}
    for path in adapters:
        check_name(path, str(file))
        parents = path.split("/")[:-1]
        for i in range(len(parents)):
            if "/".join(parents[: i + 1]) in adapters:
                raise ValueError(f"{file}: {path!r} is inside of another leaf.")
    return Stored(adapters, index["base"], index["metadata"], index["library"], collections)
