"""Parameters by their names in Flax and in PyTorch: templates that are read in both directions."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

from lora_jax.core._axes import KernelAxes
from lora_jax.peft.names._templates import fill, match, placeholders

EXPERTS = ("experts", "experts_transposed")
KINDS = ("linear", "conv1d", "conv", "weight", "embedding", "plain", "unused", *EXPERTS)


@dataclasses.dataclass(frozen=True)
class KeyMapping:
    """The name of a parameter, or of many, in Flax and in PyTorch.

    ``{...}`` stands for one name between separators and is the same on both sides; ``{...*}``
    stands for one or more. One that only PyTorch's name has counts what Flax stacks in one kernel:
    the layers of an ``nn.scan`` (``{i}`` counts from 0), or kernels that lie side by side
    (``{q|k|v}`` names them). There is one for each stack axis, in the order of the axes, the fused
    kernels last.

    Attributes:
      flax: path in ``params``, as ``"layer_{i}/attention/query/kernel"``.
      torch: name in the state dict, as ``"encoder.layer.{i}.attention.self.query.weight"``.
      kind: how PyTorch stores it. ``"linear"``: ``(out, in)``; ``"conv1d"``: ``(in, out)``, the
        ``Conv1D`` of GPT-2; ``"conv"``: ``(out, in, *window)``; ``"weight"``: as the class of the
        layer has it: conv1d for ``FlaxConv1D``, linear for another matrix, else conv;
        ``"embedding"``: ``(tokens, width)``; ``"experts"``: ``(experts, out, in)``, where the last
        axis that Flax stacks holds the experts; ``"experts_transposed"``: ``(experts, in, out)``;
        ``"plain"``: as Flax does; ``"unused"``: likewise, but PyTorch computes with it under
        another name, so that PEFT's adapter of it does nothing.
      axes: how Flax stores it, where it is not a matrix ``(in, out)`` and nothing else says so.

    Raises:
      TypeError: if a field has the wrong type.
      ValueError: if there is no such kind, or PyTorch's name lacks a placeholder of Flax's name.

    Example:
      >>> name = KeyMapping("layer_{i}/query/kernel", "encoder.layer.{i}.self.query.weight")
      >>> name.match("layer_3/query/kernel", ())
      [((), 'encoder.layer.3.self.query.weight')]
      >>> KeyMapping("layers/q/kernel", "layers.{i}.q.weight").match("layers/q/kernel", (2,))
      [((0,), 'layers.0.q.weight'), ((1,), 'layers.1.q.weight')]
    """

    flax: str
    torch: str
    kind: str = "linear"
    axes: KernelAxes | None = None

    def __post_init__(self) -> None:
        for field in ("flax", "torch", "kind"):
            if not isinstance(getattr(self, field), str):
                raise TypeError(
                    f"KeyMapping: {field} must be a string, got {getattr(self, field)!r}."
                )
        if self.kind not in KINDS:
            raise ValueError(
                f"KeyMapping({self.flax!r}): there is no kind {self.kind!r}, but {KINDS}."
            )
        if self.axes is not None and not isinstance(self.axes, KernelAxes):
            raise TypeError(
                f"KeyMapping({self.flax!r}): axes must be KernelAxes, got {self.axes!r}."
            )
        ours, theirs = placeholders(self.flax), placeholders(self.torch)
        lost = [name for name in ours if name not in theirs or "|" in name]
        if lost or len(set(ours)) < len(ours) or len(set(theirs)) < len(theirs):
            raise ValueError(
                f"KeyMapping({self.flax!r}, {self.torch!r}): every placeholder of the first name "
                f"must be in the second, once in each."
            )
        if any(name.endswith("*") for name in self.counted):
            raise ValueError(
                f"KeyMapping({self.flax!r}, {self.torch!r}): no '*' in a name that counts."
            )

    @functools.cached_property
    def counted(self) -> tuple[str, ...]:
        """The placeholders that only PyTorch's name has."""
        ours = placeholders(self.flax)
        return tuple(name for name in placeholders(self.torch) if name not in ours)

    def match(self, path: str, stack: Sequence[int]) -> list[tuple[tuple[int, ...], str]] | None:
        """PyTorch's names of a parameter, each with its index in the stack.

        ``None`` if the name is of another parameter.

        Args:
          path: the path in ``params``.
          stack: sizes of the stack axes.

        Raises:
          ValueError: if PyTorch's name does not count as many axes as there are.
        """
        shared = match(self.flax, path, "/")
        if shared is None:
            return None
        choices = self._choices(path, stack)
        fixed = {name: value.replace("/", ".") for name, value in shared.items()}
        out = []
        for index in itertools.product(*(range(size) for size in stack)):
            counted = {n: c[i] for n, c, i in zip(self.counted, choices, index, strict=True)}
            out.append((index, fill(self.torch, fixed | counted)))
        return out

    def _choices(self, path: str, stack: Sequence[int]) -> list[list[str]]:
        """What each placeholder that counts stands for, for each index of its stack axis."""
        if len(stack) != len(self.counted):
            more = len(stack) > len(self.counted)
            raise ValueError(
                f"{path!r} stacks {len(stack)} axes {tuple(stack)}, but KeyMapping({self.flax!r}, "
                f"{self.torch!r}) counts {len(self.counted)}: {self.counted}. "
                + (
                    "Give names= a KeyMapping for it, whose name in PyTorch counts them, as "
                    "KeyMapping('layers/q/kernel', 'layers.{i}.q.weight') does."
                    if more
                    else "What is stacked is known with axes=lora_jax.kernel_axes(...)."
                )
            )
        choices = []
        for name, size in zip(self.counted, stack, strict=True):
            choice = name.split("|") if "|" in name else [str(i) for i in range(size)]
            if len(choice) != size:
                raise ValueError(f"{path!r} stacks {size}, but {{{name}}} names {len(choice)}.")
            choices.append(choice)
        return choices


def find(path: str, names: Sequence[KeyMapping]) -> KeyMapping | None:
    """The first name that is for a path."""
    return next((name for name in names if match(name.flax, path, "/") is not None), None)


def find_by_torch(torch: str, names: Sequence[KeyMapping]) -> tuple[str, KeyMapping] | None:
    """The path in Flax of a name in PyTorch, and the first name that is for it.

    Example:
      >>> names = [KeyMapping("layers/q/kernel", "layers.{i}.q.weight")]
      >>> path, name = find_by_torch("layers.1.q.weight", names)
      >>> path
      'layers/q/kernel'
    """
    for name in names:
        shared = match(name.torch, torch, ".")
        if shared is not None:
            path = {key: value.replace(".", "/") for key, value in shared.items()}
            return fill(name.flax, path), name
    return None
