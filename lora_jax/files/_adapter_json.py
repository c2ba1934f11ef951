"""``adapter.json``: what it must have, and its checksum.

Next to it is the safetensors file that it names. For each kind of node it has an object with an
entry for each path, see :mod:`lora_jax.files._node_kinds`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.files._json import read_json
from lora_jax.files._node_kinds import KINDS, check_types

INDEX = "adapter.json"
FORMAT = "lora_jax adapter"
VERSION = 2
_READS = (1, 2)

_FIELDS = {
    "format": str,
    "version": int,
    "library": str,
    "tensors": dict,
    "base": dict,
    "metadata": dict,
    "checksum": str,
}
_TENSORS = re.compile(r"adapter-[0-9a-f]{16}\.safetensors")


def read_index(folder: Path) -> dict[str, Any]:
    """The content of ``adapter.json``, checked but for what it says of the nodes.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is damaged, or of another format or version.
    """
    file = folder / INDEX
    try:
        index = read_json(file)
    except (FileNotFoundError, NotADirectoryError):
        theirs = (folder / "adapter_config.json").exists()
        raise FileNotFoundError(
            f"There are no adapters in {folder}: {file} is missing."
            + (" It holds an adapter of PEFT, which lora_jax.peft.load reads." if theirs else "")
        ) from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{file} is not of the format {FORMAT!r}.")
    if index.get("version") not in _READS:
        raise ValueError(
            f"{file} is of version {index.get('version')!r} of the format, and this lora_jax reads "
            f"up to version {VERSION}: install a newer one."
        )
    required = _FIELDS | {kind.section: dict for kind in KINDS if kind.always}
    optional = {"collections"} | {kind.section for kind in KINDS if not kind.always}
    more = {name: dict for name in optional if name in index}
    check_types(index, required | more, str(file))
    if index["checksum"] != checksum(index):
        raise ValueError(
            f"{file} is damaged, or was edited: its checksum is not that of its content. Save the "
            f"adapters again."
        )
    check_types(index["tensors"], {"file": str, "sha256": str}, f"{file}: 'tensors'")
    if not _TENSORS.fullmatch(index["tensors"]["file"]):
        raise ValueError(
            f"{file} names {index['tensors']['file']!r}, which is not a file of its own."
        )
    for key, value in index["base"].items():
        if not isinstance(value, str):
            raise ValueError(f"{file}: 'base' has {value!r} for {key!r}, which is not a string.")
    return index


def tensors_file(folder: Path) -> Path | None:
    """The safetensors file that the index of a folder names, where it has one."""
    try:
        return folder / str(read_index(folder)["tensors"]["file"])
    except (FileNotFoundError, ValueError):
        return None


def checksum(index: Mapping[str, Any]) -> str:
    """The checksum of the rest of an index."""
    content = {name: value for name, value in index.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
