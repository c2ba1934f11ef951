"""A label next to every parameter, by which a layer knows which parameter it has, and which axes.

A label has no arrays. Flax tells it when ``nn.scan`` or ``nn.vmap`` slice an axis off, so that in
the layer it says which axes of the full kernel are left there.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct

from lora_jax.core._boxes import content
from lora_jax.trees._paths import Key, path_of

# The name of a label is that of its parameter and this.
LABEL = "@label"
_NONCES = itertools.count()


@flax.struct.dataclass
class Label(nn.meta.AxisMetadata[Any]):
    """Which parameter this is, and which of its axes are left.

    It has no arrays, so that maps over parameters pass it by. The nonce makes ``nn.jit`` trace
    again what it has in its cache.
    """

    path: str = flax.struct.field(pytree_node=False)
    axes: tuple[int, ...] = flax.struct.field(pytree_node=False)
    ndim: int = flax.struct.field(pytree_node=False)
    nonce: int = flax.struct.field(pytree_node=False)

    @property
    def batch(self) -> tuple[int, ...]:
        """The axes that were sliced off."""
        return tuple(axis for axis in range(self.ndim) if axis not in self.axes)

    def unbox(self) -> None:
        """Holds nothing."""

    def replace_boxed(self, val: Any) -> Any:
        """Holds nothing."""
        return self

    def remove_axis(self, index: int, params: Any) -> Label:
        """A transform slices this axis off."""
        left = list(self.axes)
        del left[index]
        return Label(self.path, tuple(left), self.ndim, self.nonce)

    def add_axis(self, index: int, params: Any) -> Label:
        """A transform stacks again what it returns; that is of no interest."""
        return self


def labels_of(params: Mapping[Key, Any]) -> dict[Key, Label]:
    """The labels of parameters, by their own keys."""
    return {
        (*key[:-1], key[-1] + LABEL): Label(path_of(key), tuple(range(ndim)), ndim, 0)
        for key, leaf in params.items()
        if (ndim := getattr(content(leaf), "ndim", None)) is not None
    }


def renewed(labels: Mapping[Key, Label]) -> dict[Key, Label]:
    """Labels with which ``nn.jit`` has traced nothing yet."""
    nonce = next(_NONCES)
    return {key: dataclasses.replace(label, nonce=nonce) for key, label in labels.items()}
