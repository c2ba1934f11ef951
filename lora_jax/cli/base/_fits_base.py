"""What a base on disk must be before anything is merged into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from lora_jax.cli.base._vocabulary_arrays import grown, head_biases, is_vocabulary
from lora_jax.core.rules._match_paths import nearest_paths
from lora_jax.files._bytes import StrPath
from lora_jax.files._tensors import Info, floats


class Base(Protocol):
    """The names of a base's arrays, with their dtypes and shapes."""

    @property
    def path(self) -> Path:
        """Where it is."""

    @property
    def info(self) -> Mapping[str, Info]:
        """Dtype and shape by name."""

    def __contains__(self, name: object) -> bool:
        """Whether there is such an array."""

    def __iter__(self) -> Iterator[str]:
        """The names."""


def check_floats(base: Base, name: str) -> None:
    """Raises ValueError if an array does not hold weights, but what a quantizer made of them."""
    dtype = base.info[name].dtype
    if not floats(dtype):
        raise ValueError(
            f"{base.path}: {name!r} is {dtype}, the codes of a quantized base, to which nothing "
            f"can be added: merge into the base in floating point."
        )


def check_has(base: Base, name: str, path: StrPath) -> None:
    """Raises ValueError if the base lacks an array, or has codes in its place."""
    if name not in base:
        raise ValueError(
            f"{path} has something for {name!r}, but {base.path} has no such array. Nearest: "
            f"{', '.join(nearest_paths(name, base)) or 'none'}."
        )
    check_floats(base, name)


def check_shape(name: str, one: Info, base: Base, path: StrPath) -> None:
    """Raises ValueError if an array cannot take the base's place; it may have more tokens."""
    if one.dtype != base.info[name].dtype or floats(one.dtype):
        check_has(base, name, path)
    shape = base.info[name].shape
    tokens = is_vocabulary(name) or name in head_biases(base)
    if one.shape != shape and not (tokens and grown([one.shape], shape)):
        raise ValueError(f"{path}: {name!r} is {one.shape}, but {base.path} has {shape}.")
