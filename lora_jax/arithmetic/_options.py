"""How adapters are combined: the options of ``combine`` and ``compress``, checked together."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any

import chex
import jax

from lora_jax.arithmetic._task_vectors import METHODS, RANDOM
from lora_jax.trees._rounding import key_for


@dataclasses.dataclass(frozen=True)
class Plan:
    """How adapters are combined.

    Attributes:
      combination_type: one of ``METHODS`` in ``_task_vectors.py``.
      density: share of the entries of each task vector that is kept; ``None`` for ``"linear"``.
      key: for DARE.
      rank: of the result, at most.
      explained_variance: instead of a rank.
      as_lora: whether a sum with DoRAs in it becomes a LoRA.

    Raises:
      TypeError: if an option is of the wrong type.
      ValueError: if one is out of range, missing, or without a use.
    """

    combination_type: str = "linear"
    density: float | None = None
    key: chex.PRNGKey | None = None
    rank: int | None = None
    explained_variance: float | None = None
    as_lora: bool = False

    def __post_init__(self) -> None:
        if self.combination_type not in METHODS:
            raise ValueError(
                f"There is no combination_type {self.combination_type!r}; there are "
                f"{', '.join(METHODS)}."
            )
        _check_type("rank", self.rank, numbers.Integral)
        _check_type("explained_variance", self.explained_variance, numbers.Real)
        _check_type("density", self.density, numbers.Real)
        if self.rank is not None and self.explained_variance is not None:
            raise ValueError(
                "rank= and explained_variance= exclude each other: pass one of the two."
            )
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}.")
        for name in ("explained_variance", "density"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {value}.")
        if self.linear and self.density is not None:
            raise ValueError(
                f"combination_type='linear' keeps every entry, so that density={self.density} has "
                f"no use: leave it out, or choose another combination_type."
            )
        if not self.linear and self.density is None:
            raise ValueError(
                f"combination_type={self.combination_type!r} needs density=, the share of entries "
                "to keep."
            )
        if self.combination_type in RANDOM and self.key is None:
            raise ValueError(
                f"combination_type={self.combination_type!r} drops entries at random: pass key=."
            )
        if self.combination_type not in RANDOM and self.key is not None:
            raise ValueError(
                f"combination_type={self.combination_type!r} has nothing random: leave out key=."
            )

    @property
    def linear(self) -> bool:
        """Whether it is a weighted sum."""
        return self.combination_type == "linear"

    @property
    def exact(self) -> bool:
        """Whether nothing is left out; else the host computes."""
        return self.linear and self.rank is None and self.explained_variance is None

    def keys(self, path: str, which: Sequence[int], index: int = 0) -> list[chex.PRNGKey] | None:
        """A key for each adapter, for one of the stacked matrices of a path."""
        if self.key is None:
            return None
        one = jax.random.fold_in(key_for(self.key, path), index)
        return [jax.random.fold_in(one, i) for i in which]


def _check_type(name: str, value: Any, kind: type) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
        what = "an int" if kind is numbers.Integral else "a number"
        raise TypeError(f"{name} must be {what}, got {value!r}.")
