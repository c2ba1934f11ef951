"""The arguments that several commands have, and their checks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from lora_jax.files._json import read_json
from lora_jax.peft.names._families import as_names
from lora_jax.peft.names._key_mapping import KeyMapping

Adapter = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER")]
Other = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OTHER")]
Base = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BASE")]
Tuned = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TUNED")]
Out = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
Names = Annotated[str, tyro.conf.arg(metavar="FAMILY|FILE.json")]
Experts = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME ...]")]
Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT")]
Number = Annotated[int | None, tyro.conf.arg(metavar="NUMBER")]


def read_names(names: str) -> tuple[KeyMapping, ...]:
    """The names of a family, or those in a JSON file.

    Raises:
      ValueError: if there is no such family, or the file is not a list of names.
    """
    if not names.endswith(".json"):
        return as_names(names)
    content = read_json(Path(names))
    if not isinstance(content, list) or not all(isinstance(one, list) for one in content):
        raise ValueError(f"{names} must be a list of [Flax's path, PyTorch's name, kind].")
    return as_names([tuple(one) for one in content])


def check_new(path: Path) -> None:
    """Raises FileExistsError if something is where a command is to write."""
    if path.exists():
        raise FileExistsError(f"{path} exists: name another one.")
