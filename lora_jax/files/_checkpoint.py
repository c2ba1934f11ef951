"""The safetensors files of a model, one or many, read and rewritten one array at a time."""

from __future__ import annotations

import copy
import functools
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.files._bytes import StrPath, write_bytes
from lora_jax.files._json import json_bytes, read_json
from lora_jax.files._tensors import Info, Tensors, write_tensors

SHARDS = ".safetensors.index.json"
MODEL_CONFIG = "config.json"
# Of an adapter of PEFT, which may be in a model's folder and is not part of it.
PEFT_CONFIG = "adapter_config.json"
_ONE = "model.safetensors"
_BESIDE = (".json", ".txt", ".model", ".jinja")


def said_in(config: Any, name: str) -> Iterator[Any]:
    """What a config says under a name, of the model and of the models in it.

    Example:
      >>> list(said_in({"vocab_size": 8, "text_config": {"vocab_size": 9}}, "vocab_size"))
      [8, 9]
    """
    if isinstance(config, dict):
        if name in config:
            yield config[name]
        for one in config.values():
            yield from said_in(one, name)


class Checkpoint(Mapping[str, np.ndarray]):
    """The arrays of a safetensors file, or of a folder of them, by their names.

    Of a folder those files count that its index names, or ``model.safetensors``, as for
    transformers; all that end in ``.safetensors`` where there is neither.

    Attributes:
      path: the file or folder.
      info: dtype and shape of every array, without reading it.
      files: the names of each file's arrays.
      others: other safetensors files in the folder, which are not read.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if files are damaged, have a name twice, or are not all that the index of the
        folder names.
    """

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)
        self.others: tuple[Path, ...] = ()
        found, shards = [self.path], {}
        if self.path.is_dir():
            there = sorted(self.path.glob("*.safetensors"))
            if not there:
                raise FileNotFoundError(f"There is no safetensors file in {self.path}.")
            shards = {index: _shards(index) for index in sorted(self.path.glob(f"*{SHARDS}"))}
            named = {file for files in shards.values() for file in files.values()} or {_ONE}
            found = [file for file in there if file.name in named] or there
            self.others = tuple(file for file in there if file not in found)
        self._of: dict[str, tuple[Tensors, str]] = {}
        self.files: dict[Path, tuple[str, ...]] = {}
        for tensors in map(Tensors, found):
            self.files[tensors.path] = tuple(tensors)
            for name in tensors:
                if name in self._of:
                    other = self._of[name][0].path
                    raise ValueError(f"{name!r} is in {other} and in {tensors.path}.")
                self._of[name] = (tensors, name)
        self.info = {name: one.info[name] for name, (one, _) in self._of.items()}
        for index, file_of in shards.items():
            for name, file in file_of.items():
                if name not in self._of or self._of[name][0].path.name != file:
                    raise ValueError(f"{index}: {name!r} should be in {file!r}, and is not.")

    @property
    def config_file(self) -> Path:
        """Where the config of the model is, if there is one: next to the files."""
        return (self.path if self.path.is_dir() else self.path.parent) / MODEL_CONFIG

    @functools.cached_property
    def config(self) -> dict[str, Any] | None:
        """What the config of the model says; ``None`` where there is none."""
        config = read_json(self.config_file) if self.config_file.exists() else None
        if config is not None and not isinstance(config, dict):
            raise ValueError(f"{self.config_file} is not a JSON object.")
        return config

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """The same arrays by other names.

        Args:
          names: the new name of every array.

        Raises:
          ValueError: if two arrays would have one name.
        """
        new = copy.copy(self)
        new.info, new._of = {}, {}
        for name, to in names.items():
            if to in new.info:
                raise ValueError(f"{self.path}: two arrays would have the name {to!r}.")
            new.info[to], new._of[to] = self.info[name], self._of[name]
        new.files = {file: tuple(names[n] for n in those) for file, those in self.files.items()}
        return new

    def metadata(self, file: Path) -> dict[str, str]:
        """The strings in the header of a file."""
        return next((one.metadata for one, _ in self._of.values() if one.path == file), {})

    def __getitem__(self, name: str) -> np.ndarray:
        """The array."""
        tensors, key = self._of[name]
        return tensors[key]

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._of)

    def __len__(self) -> int:
        """Number of arrays."""
        return len(self._of)


def _shards(index: Path) -> dict[str, str]:
    """The file of every array by its name, as an index says."""
    content = read_json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
        raise ValueError(f"{index} has no weight_map from names to files.")
    return shards


def rewrite(
    base: Checkpoint,
    out: StrPath,
    info: Mapping[str, Info],
    read: Callable[[str], np.ndarray],
    config: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint like another one, with other arrays.

    Args:
      base: the one that it is like: a file gives a file, a folder a folder with the same files,
        configs and tokenizers among them, but for weights in other formats and adapters.
      out: where to; it must not exist.
      info: what the arrays will be, by the names of ``base``; others go into its last file.
      read: gives an array when it is its turn.
      config: what ``config.json`` says in place of the base's, if anything else.

    Raises:
      FileExistsError: if ``out`` exists.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists: name another file or folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    *_, last = base.files
    more = tuple(name for name in info if name not in base)
    files = {f: names + more if f == last else names for f, names in base.files.items()}
    if not base.path.is_dir():
        write_tensors(out, {n: info[n] for n in files[last]}, read, base.metadata(last))
        return
    partial = out.with_name(f".{out.name}.{secrets.token_hex(8)}.partial")
    try:
        partial.mkdir()
        for file, names in files.items():
            those = {n: info[n] for n in names}
            write_tensors(partial / file.name, those, read, base.metadata(file))
        for file in base.path.iterdir():
            if file.name.endswith(SHARDS):
                content = _index(file, info, files)
            elif file.name == MODEL_CONFIG and config is not None:
                content = json_bytes(config)
            elif file.suffix in _BESIDE and file.name != PEFT_CONFIG:
                content = file.read_bytes()
            else:
                continue
            write_bytes(partial / file.name, content)
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _index(file: Path, info: Mapping[str, Info], files: Mapping[Path, tuple[str, ...]]) -> bytes:
    """The index of shards, for other arrays."""
    content: dict[str, Any] = read_json(file)
    size = {"total_size": sum(one.nbytes for one in info.values())}
    shards = {name: one.name for one, names in files.items() for name in sorted(names)}
    content |= {"metadata": (content.get("metadata") or {}) | size}
    return json_bytes(content | {"weight_map": dict(sorted(shards.items()))})
