"""What ``adapter_config.json`` of PEFT says of a module: its rank and scale, what is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lora_jax.core.rules._rule import scale
from lora_jax.files._checkpoint import PEFT_CONFIG
from lora_jax.peft.config._patterns import compiled, first_match
from lora_jax.peft.names._keys import without_base_layer

CONFIG = PEFT_CONFIG


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The fields of PEFT's ``LoraConfig`` that this library has an equal for.

    Its methods say what holds for one module, as PEFT decides it: by ends of names and patterns.

    Attributes:
      r: rank where no pattern says another one.
      alpha: numerator of the scale, likewise.
      rank_pattern: rank by pattern; the first that matches the end of a module's name wins.
      alpha_pattern: likewise.
      rslora: whether the scale is ``alpha / sqrt(r)``.
      dora: whether there are magnitudes.
      dropout: of the inputs of the factors.
      bias: ``"none"``, ``"all"`` or ``"lora_only"``: the biases that are trained.
      lora_bias: whether ``B`` has a bias.
      modules_to_save: modules that are fully trained.
      target_modules: modules that are adapted: ends of names, or one regular expression.
      target_parameters: parameters that are adapted by themselves: ends of names.
      restricted: whether more than ``target_modules`` decides which modules are adapted.
      fan_in_fan_out: whether the weight of the module that PEFT wrapped last is stored
        ``(in, out)``, as those of GPT-2.
      package: of transformers, where the base's class is: ``"gpt2"``; empty where the config does
        not say it.
    """

    r: int
    alpha: float
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    bias: str = "none"
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] = ()
    target_modules: tuple[str, ...] | str = ()
    target_parameters: tuple[str, ...] = ()
    restricted: bool = False
    fan_in_fan_out: bool = False
    package: str = ""

    def rank_of(self, module: str) -> int:
        """The rank of a module, or of a parameter that is adapted by itself."""
        return int(first_match(self.rank_pattern, module, self.r))

    def alpha_of(self, module: str) -> float:
        """The numerator of a module's scale."""
        return float(first_match(self.alpha_pattern, module, self.alpha))

    def scale_of(self, module: str) -> float:
        """``s`` of a module: ``alpha / r``, or ``alpha / sqrt(r)`` (rsLoRA)."""
        return scale(self.rank_of(module), self.alpha_of(module), self.rslora)

    def targets(self, module: str) -> bool:
        """Whether the module is one of those that are adapted, as far as names say."""
        if isinstance(self.target_modules, str):
            return bool(compiled(self.target_modules, "({})").fullmatch(module))
        return any(module == t or module.endswith(f".{t}") for t in self.target_modules)

    def targets_parameter(self, name: str) -> bool:
        """Whether the parameter is adapted by itself, whatever its module is."""
        return any(name == t or name.endswith(f".{t}") for t in self.target_parameters)

    def saves(self, parameter: str) -> bool:
        """Whether ``modules_to_save`` has the parameter's module; PEFT looks at ends of names."""
        parts = parameter.split(".")[:-1]
        modules = (".".join(parts[: i + 1]) for i in range(len(parts)))
        return any(m.endswith(saved) for m in modules for saved in self.modules_to_save)

    def trains(self, parameter: str) -> bool:
        """Whether a parameter in the files was fully trained, and is not a copy of the base's."""
        name = without_base_layer(parameter)
        if name.endswith(".weight"):
            return parameter == name and self.saves(name)
        return self.saves(name) or self.bias != "none"
