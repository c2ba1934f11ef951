"""The safetensors files of a model, one or many, read and rewritten one array at a time."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.tensors import (
    Info,
    StrPath,
    Tensors,
    json_bytes,
    read_json,
    write_bytes,
    write_tensors,
)

SHARDS = ".safetensors.index.json"
_BESIDE = (".json", ".txt", ".model", ".jinja")


class Checkpoint(Mapping[str, np.ndarray]):
    """The arrays of a safetensors file, or of a folder of them, by their names.

    Attributes:
      path: the file or folder.
      info: dtype and shape of every array, without reading it.
      files: each file with its arrays.

    Raises:
      FileNotFoundError: there is none.
      ValueError: files that are damaged, that have a name twice, or that are not all that the index
        of the folder names.
    """

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)
        found = [self.path]
        if self.path.is_dir():
            found = sorted(self.path.glob("*.safetensors"))
            if not found:
                raise FileNotFoundError(f"There is no safetensors file in {self.path}.")
        self.files = {file: Tensors(file) for file in found}
        self._of: dict[str, Tensors] = {}
        for tensors in self.files.values():
            for name in tensors:
                if name in self._of:
                    raise ValueError(f"{name!r} is in {self._of[name].path} and in {tensors.path}.")
                self._of[name] = tensors
        self.info = {name: tensors.info[name] for name, tensors in self._of.items()}
        for index in self.path.glob(f"*{SHARDS}") if self.path.is_dir() else ():
            self._check_index(index)

    def _check_index(self, index: Path) -> None:
        said = read_json(index)
        shards = said.get("weight_map") if isinstance(said, dict) else None
        if not isinstance(shards, dict):
            raise ValueError(f"{index} has no weight_map.")
        for name, file in shards.items():
            if name not in self._of or self._of[name].path.name != file:
                raise ValueError(f"{index}: {name!r} should be in {file!r}, and is not.")

    def __getitem__(self, name: str) -> np.ndarray:
        """The array."""
        return self._of[name][name]

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._of)

    def __len__(self) -> int:
        """Number of arrays."""
        return len(self._of)


def rewrite(
    base: Checkpoint,
    out: StrPath,
    info: Mapping[str, Info],
    read: Callable[[str], np.ndarray],
) -> None:
    """Writes a checkpoint like another one, with other arrays.

    Args:
      base: the one that it is like: a file gives a file, a folder a folder with the same files,
        configs and tokenizers among them, but for weights in other formats.
      out: where to; it must not exist.
      info: what the arrays will be, by the names of ``base``.
      read: gives an array when it is its turn.

    Raises:
      FileExistsError: ``out`` exists.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists: name another file or folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not base.path.is_dir():
        (tensors,) = base.files.values()
        write_tensors(out, {n: info[n] for n in tensors}, read, tensors.metadata)
        return
    partial = out.with_name(f".{out.name}.{secrets.token_hex(8)}.partial")
    try:
        partial.mkdir()
        for file, tensors in base.files.items():
            write_tensors(
                partial / file.name, {n: info[n] for n in tensors}, read, tensors.metadata
            )
        for file in base.path.iterdir():
            if file.suffix in _BESIDE:
                write_bytes(partial / file.name, _same_but_size(file, info))
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _same_but_size(file: Path, info: Mapping[str, Info]) -> bytes:
    """A file of a model's folder; that of its shards says how large all of them are."""
    if not file.name.endswith(SHARDS):
        return file.read_bytes()
    said: dict[str, Any] = read_json(file)
    size = {"total_size": sum(one.nbytes for one in info.values())}
    return json_bytes(said | {"metadata": (said.get("metadata") or {}) | size})
