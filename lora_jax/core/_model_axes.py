"""The kernels of a model: what ``kernel_axes`` finds out about each of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lora_jax._deprecated import renamed_fields
from lora_jax.core._axes import KernelAxes


@dataclasses.dataclass(frozen=True)
class Convolution:
    """How a convolution computes, so far as another library may not compute alike.

    Attributes:
      transposed: whether it is transposed.
      dilated: whether the kernel is dilated.
      padding: how the input is padded, such as ``"SAME"``; ``None`` where it is given in numbers.
      groups: number of groups that the inputs and outputs are in.
    """

    transposed: bool = False
    dilated: bool = False
    padding: str | None = None
    groups: int = 1


@renamed_fields(stacks="batch")
@dataclasses.dataclass(frozen=True)
class ModelAxes(Mapping[str, KernelAxes]):
    """The kernels of a model that can be adapted in their layers: their paths, and their axes.

    What :func:`lora_jax.kernel_axes` returns.

    Attributes:
      kernels: the axes of each kernel of a known layer, also of one that is refused.
      layers: for each parameter of a module that was called, kernel or not, the module's class.
      batch: for each of these parameters, its batch axes.
      refused: why a parameter of a known layer cannot be adapted in the layer.
      read: parameters that the result depends on.
      tied: kernels that the model also reads outside of their layer.
      shared: kernels that several methods of their layer compute with, such as ``nn.Embed`` and its
        ``attend``.
      convolutions: how each kernel of a convolution is used.
      linear: kernels of linear layers: those that are contracted with the input in each of their
        uses, so not embeddings and convolutions.
      call: a name of the call of the model that the axes were found by.
      find_heads: finds :attr:`heads` and :attr:`unsure`, when they are asked for.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lora_jax
      >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]), jnp.ones((1, 4))
      >>> axes = lora_jax.kernel_axes(model, model.init(jax.random.key(0), x), x)
      >>> sorted(axes.linear), sorted(axes.heads)
      (['layers_0/kernel', 'layers_2/kernel'], ['layers_2/kernel'])
    """

    kernels: Mapping[str, KernelAxes]
    layers: Mapping[str, str]
    batch: Mapping[str, tuple[int, ...]]
    refused: Mapping[str, str]
    read: frozenset[str]
    tied: frozenset[str]
    shared: frozenset[str] = frozenset()
    convolutions: Mapping[str, Convolution] = dataclasses.field(default_factory=dict)
    linear: frozenset[str] = frozenset()
    call: str | None = None
    find_heads: Callable[[], tuple[frozenset[str], frozenset[str]]] | None = dataclasses.field(
        default=None, repr=False, compare=False
    )

    @property
    def heads(self) -> frozenset[str]:
        """Kernels of output heads: a result of the model is computed behind them without another.

        So a classifier is a head, also with a bias, a softmax or a cap behind it; each of several
        classifiers; and the last layer of a model that has no head. The last layers that add to a
        residual stream are not, as the result has what was added before, too.

        Raises:
          ValueError: if it is not known, as in a pickled copy.
        """
        return self._heads[0]

    @property
    def unsure(self) -> frozenset[str]:
        """Kernels that may be output heads or not: it cannot be known.

        As where the model computes a loss from its logits and from others of its layers.

        Raises:
          ValueError: if it is not known, as in a pickled copy.
        """
        return self._heads[1]

    @functools.cached_property
    def _heads(self) -> tuple[frozenset[str], frozenset[str]]:
        if self.find_heads is None:
            raise ValueError(
                "Which layers are output heads is not known to this copy of the axes: call "
                "lora_jax.kernel_axes anew."
            )
        return self.find_heads()

    def __getstate__(self) -> dict[str, Any]:
        """All but the function, which has the model in it."""
        return {**vars(self), "find_heads": None}

    def __getitem__(self, path: str) -> KernelAxes:
        """The axes of the kernel at a path."""
        if path in self.refused:
            raise KeyError(path)
        return self.kernels[path]

    def __iter__(self) -> Iterator[str]:
        """The paths of the kernels."""
        return (path for path in self.kernels if path not in self.refused)

    def __len__(self) -> int:
        """Number of kernels."""
        return sum(1 for _ in self)

    def __str__(self) -> str:
        """One line for each kernel."""
        width = max(map(len, self.kernels), default=0)
        return "\n".join(
            f"{path.ljust(width)}  inputs {axes.inputs}  outputs {axes.outputs}"
            + (f"  batch {axes.batch}" if axes.batch else "")
            + ("  tied" if path in self.tied else "")
            + (f"  refused, as {self.refused[path]}" if path in self.refused else "")
            + f"  {self.layers[path]}"
            for path, axes in self.kernels.items()
        )
