"""How the layers of a base on disk store their weights, where there is no model to ask.

In PyTorch a matrix is that of an ``nn.Linear``, ``(out, in)``, or of transformers' ``Conv1D``, as
in GPT-2, ``(in, out)``; in Flax each is the transpose. PEFT's ``fan_in_fan_out`` says which it is
only of the module that was wrapped last.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping

from lora_jax.files._checkpoint import Checkpoint, said_in
from lora_jax.peft._folder import PeftFiles
from lora_jax.peft.config._module_config import PeftConfig
from lora_jax.peft.torch._layout import CONV1D_LAYERS, output_axis

# Types of transformers' models, or the packages that they are in, which call layers as
# CONV1D_LAYERS has it: those where they are Conv1D, and those where they are linear.
_CONV1D_TYPES = frozenset(
    {
        "clvp",
        "clvp_decoder",
        "decision_transformer",
        "gpt2",
        "imagegpt",
        "openai",
        "openai-gpt",
    }
)
_LINEAR_TYPES = frozenset({"gpt_bigcode", "gpt_neo", "starcoder2"})


class Layouts:
    """What a base says of how its layers store their weights, and what the user answers.

    Args:
      base: the base; ``config.json`` next to its files has the model's type.
      answer: ``"in-out"`` or ``"out-in"``, for layers where nothing else says it.
      types: of the model, as others know them.

    Attributes:
      asked: the weights of such layers.
    """

    def __init__(
        self, base: Checkpoint, answer: str | None = None, types: Iterable[str] = ()
    ) -> None:
        self._base, self._answer, self._given = base, answer, frozenset(types)
        self.asked: list[str] = []

    def kind(self, name: str, known: str = "", files: PeftFiles | None = None) -> str:
        """``"linear"`` or ``"conv1d"``, for a matrix by its name, PyTorch's or Flax's.

        Empty where neither the bias, nor layers of the same name, nor the model's type say it, or
        they do not agree, and there is no answer.

        Args:
          name: as ``"h.0.attn.c_proj.weight"`` or ``"h/0/attn/c_proj/kernel"``.
          known: what an adapter of lora_jax knows itself.
          files: those of an adapter of PEFT.

        Raises:
          ValueError: if the base says something else than an adapter of lora_jax.
        """
        if found := self._by_bias(name):
            return found
        layer = _layer(name)
        either = layer in CONV1D_LAYERS
        config = PeftConfig(1, 1.0) if files is None else files.config
        says = kinds_of(self._types | {config.package}, layer) | ({known} - {""})
        if either:
            says |= self._seen.get(layer, set())
            if files and {_layer(f"{module}.weight") for module in files.modules} == {layer}:
                says.add("conv1d" if config.fan_in_fan_out else "linear")
        if len(says) == 1:
            return says.pop()
        others = {kind for layer in self._seen.keys() - CONV1D_LAYERS for kind in self._seen[layer]}
        if not (says or either or config.fan_in_fan_out or "conv1d" in others):
            return "linear"
        if known:
            raise ValueError(
                f"{self._base.path}: {name!r} is of another class of layers, by the base, than the "
                f"adapter was made for, which is {known}: make it with axes=."
            )
        self.asked.append(name)
        if self._answer is None:
            return ""
        return "conv1d" if (self._answer == "in-out") == name.endswith(".weight") else "linear"

    def check(self) -> None:
        """Checks the answer, when all layers that it is for are known.

        Raises:
          ValueError: if nothing says how a weight is stored, or the answer cannot be that of all.
        """
        layers = dict.fromkeys(map(_layer, self.asked))
        known = [layer for layer in layers if layer in CONV1D_LAYERS]
        if self._answer is None and self.asked:
            name, shape = self.asked[0], self._base.info[self.asked[0]].shape
            raise ValueError(
                f"{self._base.path}: {name!r} {shape} may be stored (in, out) or (out, in): in "
                f"PyTorch as GPT-2's Conv1D or as a linear layer, in Flax the other way round. "
                f"Neither shapes nor a config.json next to it say which. Say it, of all layers "
                f"called {', '.join(layers)}, with --layout in-out or --layout out-in, or put the "
                f"model's config.json there."
            )
        if self._answer == "in-out" and known and len(known) < len(layers):
            raise ValueError(
                f"--layout in-out would be of all layers called {', '.join(layers)}, but in GPT-2 "
                f"only {', '.join(known)} would be Conv1D: put the model's config.json next to "
                f"{self._base.path}."
            )

    def _by_bias(self, name: str) -> str:
        """The kind by the bias, which every ``Conv1D`` has; empty where that does not say it."""
        bias = _bias(name)
        if bias not in self._base:
            return "linear"
        torch = name.endswith(".weight")
        outputs = output_axis(self._base.info[name].shape, self._base.info[bias].shape)
        if outputs is None:
            return ""
        return "linear" if outputs == (0 if torch else 1) else "conv1d"

    @functools.cached_property
    def _seen(self) -> Mapping[str, set[str]]:
        """What layers are by their biases, by the last part of their names."""
        seen: dict[str, set[str]] = {}
        for name, info in self._base.info.items():
            matrix = name.endswith((".weight", "/kernel")) and len(info.shape) == 2
            if matrix and _bias(name) in self._base and (kind := self._by_bias(name)):
                seen.setdefault(_layer(name), set()).add(kind)
        return seen

    @functools.cached_property
    def _types(self) -> frozenset[str]:
        return self._given | model_types(self._base)


def kinds_of(types: Iterable[str], layer: str) -> set[str]:
    """How a model stores the weights of a layer, by its type and the types of models in it.

    Example:
      >>> kinds_of({"gpt2"}, "c_proj"), kinds_of({"gpt2"}, "lm_head"), kinds_of({"opt"}, "fc1")
      ({'conv1d'}, {'linear'}, set())
    """
    kinds = set()
    if not _CONV1D_TYPES.isdisjoint(types):
        kinds.add("conv1d" if layer in CONV1D_LAYERS else "linear")
    if not _LINEAR_TYPES.isdisjoint(types):
        kinds.add("linear")
    return kinds


def model_types(base: Checkpoint) -> frozenset[str]:
    """The types of the model, and of those in it, by the ``config.json`` next to its files."""
    return frozenset(one for one in said_in(base.config, "model_type") if isinstance(one, str))


def _bias(name: str) -> str:
    return name[: -len("weight")] + "bias"  # "kernel" is as long


def _layer(name: str) -> str:
    return re.split(r"[./]", f".{name}")[-2]
