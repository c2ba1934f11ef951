"""``adapter_config.json`` of PEFT: what it says of every module, and what is refused in it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from lora_jax.files._checkpoint import PEFT_CONFIG
from lora_jax.files._format import INDEX
from lora_jax.files._json import read_json

CONFIG = PEFT_CONFIG

# What PEFT 0.21 writes for an adapter of which nothing is said.
DEFAULTS: Mapping[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": False,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}

# Initializations that leave the base as it is; the others subtract from it.
_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "true")

# Fields that only say how training went, or where targets were looked for.
_WITHOUT_MEANING = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}


# What to do about fields that say something else than how training went.
_INSTEAD = {
    "ensure_weight_tying": "It ties what is trained of an embedding to its other uses. Where no "
    "embedding is adapted or saved whole it does nothing: set it to false there.",
    "trainable_token_indices": "Some rows of an embedding were trained: merge them into the base "
    "in PEFT, with merge_and_unload, or train the embedding whole, with modules_to_save.",
}


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The fields of PEFT's ``LoraConfig`` that this library has an equal for.

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
      restricted: whether ``target_modules`` is not all that decides.
      fan_in_fan_out: whether the weight of the module that PEFT wrapped last is stored
        ``(in, out)``, as those of GPT-2.
      package: of transformers, where the base's class is: ``"gpt2"``; empty where it is not said.
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

    def targets(self, module: str) -> bool:
        """Whether the module is one of those that are adapted, as far as names say."""
        if isinstance(self.target_modules, str):
            return bool(_compiled(self.target_modules, "({})").fullmatch(module))
        return any(module == t or module.endswith(f".{t}") for t in self.target_modules)

    def saves(self, parameter: str) -> bool:
        """Whether a module that has the parameter is saved whole; PEFT looks at ends of names."""
        parts = parameter.split(".")[:-1]
        modules = (".".join(parts[: i + 1]) for i in range(len(parts)))
        return any(m.endswith(saved) for m in modules for saved in self.modules_to_save)

    def targets_parameter(self, name: str) -> bool:
        """Whether the parameter is adapted by itself, whatever its module is."""
        return any(name == t or name.endswith(f".{t}") for t in self.target_parameters)


def read_config(folder: Path, tying: bool = False) -> PeftConfig:
    """The config of a folder.

    Args:
      folder: where it is.
      tying: whether the caller sees to ``ensure_weight_tying``.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is no LoRA, has something that has no equal here, or makes no sense.
    """
    file = folder / CONFIG
    try:
        said = read_json(file)
    except (FileNotFoundError, NotADirectoryError):
        ours = (folder / INDEX).exists()
        try:
            inside = sorted(one.parent.name for one in folder.glob(f"*/{CONFIG}"))
        except OSError:
            inside = []
        raise FileNotFoundError(
            f"There is no adapter of PEFT in {folder}: {CONFIG} is missing."
            + (" It holds adapters of lora_jax, which lora_jax.load reads." if ours else "")
            + (f" Folders in it that have one: {', '.join(inside[:8])}." if inside else "")
        ) from None
    if not isinstance(said, dict):
        raise ValueError(f"{file} is no JSON object.")
    if said.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {said.get('peft_type')!r}, and only LORA is read.")
    get = _Reader(file, said)
    if tying:
        get.boolean("ensure_weight_tying")
    config = PeftConfig(
        r=get.integer("r", 8),
        alpha=get.number("lora_alpha", 8),
        rank_pattern={k: get.checked_rank(k, v) for k, v in get.mapping("rank_pattern").items()},
        alpha_pattern={k: get.checked_alpha(k, v) for k, v in get.mapping("alpha_pattern").items()},
        rslora=get.boolean("use_rslora"),
        dora=get.boolean("use_dora"),
        dropout=get.number("lora_dropout", 0.0, positive=False),
        bias=get.one_of("bias", ("none", "all", "lora_only")),
        lora_bias=get.boolean("lora_bias"),
        modules_to_save=get.strings("modules_to_save"),
        target_modules=get.targets("target_modules"),
        target_parameters=get.strings("target_parameters"),
        fan_in_fan_out=get.boolean("fan_in_fan_out"),
        restricted=_restricted(said),
        package=_package(said),
    )
    try:
        config.rank_of(""), config.alpha_of("")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if not 0 <= config.dropout < 1:
        raise ValueError(f"{file}: lora_dropout must be in [0, 1), got {config.dropout}.")
    if config.lora_bias and config.dora:
        raise ValueError(f"{file}: lora_bias with use_dora makes no sense in PEFT.")
    if config.lora_bias and config.bias != "none":
        raise ValueError(
            f"{file}: lora_bias with bias={config.bias!r} trains every bias twice, for which there "
            f"is no equal here: train it again with one of the two."
        )
    if config.target_parameters and (config.dora or config.lora_bias or config.dropout):
        raise ValueError(
            f"{file}: target_parameters with use_dora, lora_bias or lora_dropout makes no sense in "
            f"PEFT."
        )
    start = said.get("init_lora_weights", True)
    plain = start.lower() if isinstance(start, str) else start
    if isinstance(start, list | dict) or plain not in _INITIALIZATIONS:
        raise ValueError(
            f"{file}: init_lora_weights is {start!r}, which changes the base when the adapter is "
            f"made. Save it with PEFT's path_initial_model_for_weight_conversion."
        )
    for name, value in said.items():
        if name not in get.read and name not in _WITHOUT_MEANING and value not in _INERT:
            instead = f" {_INSTEAD[name]}" if name in _INSTEAD else ""
            raise ValueError(
                f"{file}: {name} is {value!r}, for which there is no equal here.{instead}"
            )
    return config


def _restricted(said: Mapping[str, Any]) -> bool:
    """Whether the names in target_modules are not all that decides, or are not understood here."""
    if said.get("layers_to_transform") is not None or said.get("exclude_modules"):
        return True
    targets = said.get("target_modules")
    if isinstance(targets, str):
        try:
            _compiled(targets, "({})")
        except ValueError:
            return True
    return False


def _package(said: Mapping[str, Any]) -> str:
    """As PEFT has it where no task is said, in ``transformers.models.gpt2.modeling_gpt2``."""
    mapping = said.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    found = (
        re.match(r"transformers\.models\.(\w+)\.", library) if isinstance(library, str) else None
    )
    return found[1] if found else ""


_INERT: tuple[Any, ...] = (None, False, "", [], {})


class _Reader:
    """Reads fields, checks their types, and knows which were read."""

    def __init__(self, file: Path, said: Mapping[str, Any]) -> None:
        self._file, self._said = file, said
        self.read = {"peft_type", "init_lora_weights"}

    def integer(self, name: str, default: int) -> int:
        return self.checked_rank(name, self._get(name, default))

    def number(self, name: str, default: float, positive: bool = True) -> float:
        if positive:
            return self.checked_alpha(name, self._get(name, default))
        value = self._optional(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._error(name, "a number", value)
        return float(value)

    def boolean(self, name: str) -> bool:
        value = self._optional(name, False)
        if not isinstance(value, bool):
            raise self._error(name, "true or false", value)
        return value

    def one_of(self, name: str, choices: Sequence[str]) -> str:
        value = self._optional(name, choices[0])
        if not isinstance(value, str) or value not in choices:
            raise self._error(name, f"one of {', '.join(choices)}", value)
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        value = self._get(name, None) or {}
        if not isinstance(value, dict):
            raise self._error(name, "an object", value)
        return value

    def strings(self, name: str) -> tuple[str, ...]:
        value = self._get(name, None) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._error(name, "a list of strings", value)
        return tuple(value)

    def targets(self, name: str) -> tuple[str, ...] | str:
        value = self._get(name, None)
        return value if isinstance(value, str) else self.strings(name)

    def checked_rank(self, name: str, value: object) -> int:
        if type(value) is not int or not 0 < value < 2**31:
            raise self._error(name, "a rank of at least 1", value)
        return value

    def checked_alpha(self, name: str, value: object) -> float:
        try:
            isreal = isinstance(value, int | float) and not isinstance(value, bool)
            number = float(cast(float, value)) if isreal else math.nan
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and number > 0):
            raise self._error(name, "a positive number", value)
        return number

    def _get(self, name: str, default: Any) -> Any:
        self.read.add(name)
        return self._said.get(name, default)

    def _optional(self, name: str, default: Any) -> Any:
        """Likewise, and the default for ``null`` too: of rank and alpha alone PEFT knows none."""
        value = self._get(name, default)
        return default if value is None else value

    def _error(self, name: str, expected: str, value: object) -> ValueError:
        return ValueError(f"{self._file}: {name!r} must be {expected}, got {value!r}.")


def first_match(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    r"""The value of the first pattern that matches a module, as PEFT: ``(.*\.)?(pattern)$``."""
    for pattern, value in patterns.items():
        if pattern == module or _compiled(pattern, r"(.*\.)?({})$").match(module):
            return value
    return default


def by_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, and patterns for the modules that have another one.

    A pattern is the module's name, and anchored where names alone would match another module too.
    """
    common = Counter(values.values()).most_common(1)[0][0]
    # In the order in which they are written.
    others = {module: values[module] for module in sorted(values) if values[module] != common}
    for start, escaped in (("", str), ("^", re.escape)):
        patterns = dict(sorted((start + escaped(m), value) for m, value in others.items()))
        if all(first_match(patterns, m, common) == value for m, value in values.items()):
            break
    return common, patterns


# What a pattern may be made of: names, classes, groups and lookarounds, and at most three
# repetitions, none of a group: nothing that could take longer than the cube of a name's length.
_TOKEN = re.compile(
    r"""(?P<group>\((?:\?(?:[:=!]|<[=!]))?)
    |(?P<optional>\)(?:\?|\{0,1\})\??)
    |(?P<repetition>(?:[*+?]|\{\d{1,2}(?:,\d{0,2})?\})\??)
    |\\[.\-dwDWsSbB]|\[\^?(?:[\w\-.]|\\[.\-dwDWsS])+\]|[\w\-.^$|)]""",
    re.VERBOSE,
)


def _is_plain(pattern: str) -> bool:
    """Whether a pattern is of that kind."""
    at, before, counts = 0, "", Counter[str | None]()
    while at < len(pattern):
        found = _TOKEN.match(pattern, at)
        if not found or (found.lastgroup == "repetition" and before.startswith(")")):
            return False
        counts[found.lastgroup] += 1
        at, before = found.end(), found[0]
    repetitions = counts["repetition"] + counts["optional"]
    return len(pattern) <= 2000 and repetitions <= 3 and counts["group"] <= 4


def _compiled(pattern: str, template: str) -> re.Pattern[str]:
    if not _is_plain(pattern):
        raise ValueError(
            f"The pattern {pattern[:200]!r} is too complex to be matched safely: only names, "
            f"classes, four groups and three repetitions are, and of a group none but '?'."
        )
    try:
        return re.compile(template.replace("{}", pattern))
    except re.error as error:
        raise ValueError(
            f"The pattern {pattern[:200]!r} is no regular expression: {error}."
        ) from None
