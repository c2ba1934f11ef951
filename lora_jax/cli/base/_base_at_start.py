"""A base as it was when the training of an adapter began: with a head, and with all its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from lora_jax.cli.base._fits_base import check_floats
from lora_jax.cli.base._tied import Tie
from lora_jax.cli.base._vocabulary_arrays import grown, is_vocabulary
from lora_jax.files._checkpoint import Checkpoint
from lora_jax.files._tensors import Info
from lora_jax.peft._folder import PeftFiles
from lora_jax.peft.names._keys import without_base_layer


class BaseAtStart(Mapping[str, np.ndarray]):
    """The arrays of the base, and those that the adapter's files have in their place.

    PEFT saves an embedding, or a head, as it was before the training (``base_layer``,
    ``original_module``) or without training it, above all where tokens were added. A head that is
    tied is the embedding.

    Attributes:
      path: of the base.
      info: dtype and shape of every array.
      taken: arrays of the adapter's files that are used here, by their keys.

    Raises:
      ValueError: if the adapter was trained on another base.
    """

    def __init__(self, base: Checkpoint, files: PeftFiles, tie: Tie | None) -> None:
        self.path: Path = base.path
        self.info = dict(base.info)
        self.taken: set[str] = set()
        self._base, self._files, self._tie = base, files, tie
        self._replaced: dict[str, tuple[Mapping[str, np.ndarray], str]] = {}
        both = () if tie is None else (tie.embedding, tie.head)
        kept = {n: without_base_layer(n) for n in files.parameters}
        kept = {n: plain for n, plain in kept.items() if is_vocabulary(plain)}
        trained = {n for n in kept if files.config.saves(n)}
        if tie is not None and tie.together and tie.embedding in trained:
            trained |= {tie.head} & set(kept)
        for name, plain in kept.items():
            if name != plain or name not in trained:
                self._take(plain, files.parameters[name], in_place=name == plain)
        if not (both and set(both) <= trained):  # else nothing is left of what was before
            for name, key in files.originals.items():
                if is_vocabulary(name):
                    self._take(name, key, in_place=False)
        if tie is not None:
            self.info[tie.head] = self.info[tie.embedding]
            self._replaced[tie.head] = self._replaced.get(tie.embedding, (base, tie.embedding))

    def _take(self, name: str, key: str, in_place: bool) -> None:
        """Puts an array of the adapter's files in place of the base's, where they differ."""
        tensors, tie = self._files.tensors, self._tie
        if tie is not None and name == tie.head:
            name = tie.embedding
        if name not in self._base:
            return
        new, old = tensors.info[key].shape, self._base.info[name]
        more = grown([new], old.shape)
        if name in self._replaced:
            same = np.array_equal(tensors[key], tensors[self._replaced[name][1]])
        else:
            same = more or new == old.shape
            if same and not in_place:
                rows = tensors[key][: old.shape[0]].astype(old.dtype)
                same = np.array_equal(rows, self._base[name])
        if not same:
            raise ValueError(
                f"{tensors.path} was trained on another {name!r} than {self.path} has: its {key!r}."
            )
        self.taken.add(key)
        if more or in_place:
            check_floats(self._base, name)
            self.info[name] = Info(old.dtype, new)
            self._replaced[name] = (tensors, key)

    def __getitem__(self, name: str) -> np.ndarray:
        """The array, in the dtype of the base."""
        arrays, key = self._replaced.get(name, (self._base, name))
        return arrays[key].astype(self.info[name].dtype, copy=False)

    def __contains__(self, name: object) -> bool:
        """Whether there is such an array."""
        return name in self.info

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self.info)

    def __len__(self) -> int:
        """Number of arrays."""
        return len(self.info)
