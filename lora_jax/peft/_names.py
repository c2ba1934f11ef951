"""Parameters by their names in Flax and in PyTorch: templates that are read in both directions."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_jax.core._axes import KernelAxes

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
      axes: how Flax stores it, where it is no matrix ``(in, out)`` and nothing else says so.

    Raises:
      TypeError: a field of the wrong type.
      ValueError: a kind that does not exist, a placeholder of Flax's name that PyTorch's name
        lacks.

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
        ours, theirs = _placeholders(self.flax), _placeholders(self.torch)
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
        ours = _placeholders(self.flax)
        return tuple(name for name in _placeholders(self.torch) if name not in ours)

    def match(self, path: str, stack: Sequence[int]) -> list[tuple[tuple[int, ...], str]] | None:
        """PyTorch's names of a parameter, each with its index in the stack.

        ``None`` if the name is of another parameter.

        Args:
          path: the path in ``params``.
          stack: sizes of the stack axes.

        Raises:
          ValueError: PyTorch's name does not count as many axes as there are.
        """
        found = _regex(self.flax).fullmatch(path)
        if not found:
            return None
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
        ours = dict(zip(_placeholders(self.flax), found.groups(), strict=True))
        fixed = {name: value.replace("/", ".") for name, value in ours.items()}
        out = []
        for index in itertools.product(*(range(size) for size in stack)):
            counted = {n: c[i] for n, c, i in zip(self.counted, choices, index, strict=True)}
            filled = functools.partial(_filled, fixed | counted)
            out.append((index, _PLACEHOLDER.sub(filled, self.torch)))
        return out


_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def _filled(values: Mapping[str, str], found: re.Match[str]) -> str:
    return values[found[1]]


def _placeholders(template: str) -> tuple[str, ...]:
    return tuple(_PLACEHOLDER.findall(template))


@functools.lru_cache(maxsize=1024)
def _regex(template: str) -> re.Pattern[str]:
    parts = _PLACEHOLDER.split(template)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = "(.+)" if part.endswith("*") else "([^/]+)"
        else:
            parts[i] = re.escape(part)
    return re.compile("".join(parts))


# How transformers' FlaxConv1D stores its kernel, and what layers of that class, and of PyTorch's
# Conv1D, are called. GPT-Neo and others call linear layers so.
CONV1D = KernelAxes(inputs=(1,), outputs=(0,))
CONV1D_LAYERS = ("c_attn", "q_attn", "c_fc", "c_proj")

_GEMMA = "model.layers.{i}.self_attn."
_GEMMA_MLP = "model.layers.{i}.mlp."

FAMILIES: Mapping[str, tuple[KeyMapping, ...]] = {
    # Flax models of Hugging Face have the names of those for PyTorch, but for the last part.
    "transformers": (
        KeyMapping("{path*}/kernel", "{path*}.weight", "weight"),
        # T5's and BART's encoder and decoder have it under their own names; PEFT's embeddings
        # look up tokens, which positions are not.
        KeyMapping("shared/embedding", "shared.weight", "unused"),
        KeyMapping("{path*}/shared/embedding", "{path*}.shared.weight", "unused"),
        KeyMapping("{path*}/embed_positions/embedding", "{path*}.embed_positions.weight", "unused"),
        KeyMapping("{path*}/embedding", "{path*}.weight", "embedding"),
        KeyMapping("{path*}/scale", "{path*}.weight", "plain"),
        KeyMapping("{path*}/{leaf}", "{path*}.{leaf}", "plain"),
        KeyMapping("{leaf}", "{leaf}", "plain"),
    ),
    # Google's gemma, to the models of Hugging Face.
    "gemma": (
        KeyMapping(
            "layer_{i}/attn/q_einsum/w", _GEMMA + "q_proj.weight", axes=KernelAxes((1,), (0, 2))
        ),
        KeyMapping(
            "layer_{i}/attn/kv_einsum/w",
            _GEMMA + "{k_proj|v_proj}.weight",
            axes=KernelAxes((2,), (0, 1, 3), fused=2, parts=(0, 1)),
        ),
        KeyMapping(
            "layer_{i}/attn/attn_vec_einsum/w",
            _GEMMA + "o_proj.weight",
            axes=KernelAxes((0, 1), (2,)),
        ),
        KeyMapping(
            "layer_{i}/mlp/gating_einsum",
            _GEMMA_MLP + "{gate_proj|up_proj}.weight",
            axes=KernelAxes((2,), (0, 1), fused=2, parts=(0, 1)),
        ),
        KeyMapping("layer_{i}/mlp/linear", _GEMMA_MLP + "down_proj.weight"),
        KeyMapping("embedder/input_embedding", "model.embed_tokens.weight", "embedding"),
    ),
}
"""Names by family: each of them a value of ``names``."""


@dataclasses.dataclass(frozen=True)
class Torch:
    """A PyTorch parameter, as a part of a Flax one.

    Attributes:
      name: its name in the state dict.
      path: path of the Flax parameter.
      index: which of the stacked ones it is; empty where nothing is stacked.
      kind: how PyTorch stores it.
      order: which of the names it has; the parameters of a module are in the order of their names.
    """

    name: str
    path: str
    index: tuple[int, ...]
    kind: str
    order: int = 0

    @property
    def module(self) -> str:
        """The module that has it."""
        return self.name.rpartition(".")[0]


def as_names(names: str | Sequence[KeyMapping | tuple[Any, ...]]) -> tuple[KeyMapping, ...]:
    """What the user gave as ``names``.

    Raises:
      TypeError: neither a family nor names.
      ValueError: a family that does not exist.
    """
    if isinstance(names, str):
        if names not in FAMILIES:
            raise ValueError(
                f"There are no names for {names!r}, but for {sorted(FAMILIES)}. Give a list of "
                f"lora_jax.peft.KeyMapping for another model."
            )
        return FAMILIES[names]
    if not isinstance(names, Sequence):
        raise TypeError(
            f"names must be a family or a list of KeyMapping, got {type(names).__name__}."
        )
    return tuple(name if isinstance(name, KeyMapping) else KeyMapping(*name) for name in names)


def torch_names(
    path: str, kind: str, stack: Sequence[int], names: Sequence[KeyMapping]
) -> Iterator[Torch]:
    """PyTorch's parameters for a Flax one; none if no name is for it."""
    name = find(path, names)
    if name is not None:
        if kind in EXPERTS:
            if not stack:
                raise ValueError(
                    f"{path!r} holds experts by its KeyMapping, but nothing is stacked in it. "
                    f"What is stacked is known with axes=lora_jax.kernel_axes(...)."
                )
            stack = stack[:-1]
        for index, torch in name.match(path, stack) or ():
            yield Torch(torch, path, index, kind, names.index(name))


def find(path: str, names: Sequence[KeyMapping]) -> KeyMapping | None:
    """The first name that is for a path."""
    return next((name for name in names if _regex(name.flax).fullmatch(path)), None)
