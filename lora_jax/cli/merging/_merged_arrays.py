"""Merged arrays of a base on disk, computed one at a time, and what rounding did to them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.files._tensors import Info, is_floating
from lora_jax.trees._rounding import (
    Rounding,
    RoundingReport,
    key_for,
    measure,
    measure_parts,
    round_to,
)

# What is merged into one array of the base: the index of a part of it, and that part in float32.
# There is one part for each expert, and one of anything else.
Parts = Iterable[tuple[tuple[int, ...], chex.Array]]


@dataclasses.dataclass
class Updates:
    """Merged arrays by their names in the base, and what rounding did to them.

    Attributes:
      base: the arrays that are merged into.
      merged: gives ``W'`` in float32, part by part, for a base's array, by its name.
      replaced: arrays that take the place of the base's, or that it lacks.
      info: dtype and shape of every array of the merged model.
      config: that of the merged model, where it is another than the base's.
      notes: what was done that the adapter does not say by itself.
    """

    base: Mapping[str, np.ndarray]
    merged: Mapping[str, Callable[[np.ndarray], Parts]]
    replaced: Mapping[str, np.ndarray]
    info: Mapping[str, Info]
    config: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()
    _rows: dict[str, Rounding] = dataclasses.field(default_factory=dict)

    def __call__(self, name: str, key: chex.PRNGKey | None) -> np.ndarray:
        """The array of the merged model, in the dtype of the base's."""
        chance = None if key is None else key_for(key, name)
        if name in self.merged:
            return self._rounded(name, self.base[name], chance)
        if name not in self.replaced:
            return self.base[name]
        if not is_floating(self.replaced[name]):
            return self.replaced[name]
        exact = jnp.asarray(self.replaced[name]).astype(jnp.float32)
        out = round_to(exact, self.info[name].dtype, chance)
        self._rows[name] = measure(exact, out, None)
        return np.asarray(out)

    def _rounded(self, name: str, base: np.ndarray, chance: chex.PRNGKey | None) -> np.ndarray:
        """``W'`` in the dtype of the base, rounded part by part."""
        out = base

        def parts() -> Iterator[tuple[chex.Array, chex.Array, chex.Array]]:
            nonlocal out
            for index, exact in self.merged[name](base):
                key = chance
                if index and chance is not None:
                    key = functools.reduce(jax.random.fold_in, index, chance)
                rounded = round_to(exact, base.dtype, key)
                if not index:
                    out = np.asarray(rounded)
                else:
                    out = np.empty_like(base) if out is base else out
                    out[index] = rounded
                yield exact, rounded, jnp.asarray(base[index])

        self._rows[name] = measure_parts(parts())
        return out

    def report(self) -> RoundingReport:
        """The rounding of all that was merged."""
        return RoundingReport(dict(sorted(self._rows.items())))
