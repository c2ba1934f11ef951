"""``adapter_config.json`` of PEFT: read and checked; what has no equal here is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from lora_jax.files._adapter_json import INDEX
from lora_jax.files._json import read_json
from lora_jax.peft.config._module_config import CONFIG, PeftConfig
from lora_jax.peft.config._patterns import compiled

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

# Values of other fields that mean nothing.
_INERT: tuple[Any, ...] = (None, False, "", [], {})

# What to do about fields that say something else than how training went.
_INSTEAD = {
    "ensure_weight_tying": "It ties what is trained of an embedding to its other uses. Where no "
    "embedding is adapted or fully trained it does nothing: set it to false there.",
    "trainable_token_indices": "Some rows of an embedding were trained: merge them into the base "
    "in PEFT, with merge_and_unload, or train all of the embedding, with modules_to_save.",
}


def read_config(folder: Path, tying: bool = False) -> PeftConfig:
    """The config of a folder.

    Args:
      folder: where it is.
      tying: whether the caller sees to ``ensure_weight_tying``.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is not a LoRA, has something that has no equal here, or makes no sense.
    """
    file, content = folder / CONFIG, _content(folder)
    fields = _Fields(file, content)
    if tying:
        fields.boolean("ensure_weight_tying")
    ranks, alphas = fields.mapping("rank_pattern"), fields.mapping("alpha_pattern")
    config = PeftConfig(
        r=fields.integer("r", 8),
        alpha=fields.number("lora_alpha", 8),
        rank_pattern={k: fields.checked_rank(k, v) for k, v in ranks.items()},
        alpha_pattern={k: fields.checked_alpha(k, v) for k, v in alphas.items()},
        rslora=fields.boolean("use_rslora"),
        dora=fields.boolean("use_dora"),
        dropout=fields.number("lora_dropout", 0.0, positive=False),
        bias=fields.one_of("bias", ("none", "all", "lora_only")),
        lora_bias=fields.boolean("lora_bias"),
        modules_to_save=fields.strings("modules_to_save"),
        target_modules=fields.targets("target_modules"),
        target_parameters=fields.strings("target_parameters"),
        fan_in_fan_out=fields.boolean("fan_in_fan_out"),
        restricted=_restricted(content),
        package=_package(content),
    )
    _check_makes_sense(config, file)
    _check_keeps_base(content.get("init_lora_weights", True), file)
    for name, value in content.items():
        if name not in fields.read and name not in _WITHOUT_MEANING and value not in _INERT:
            instead = f" {_INSTEAD[name]}" if name in _INSTEAD else ""
            raise ValueError(
                f"{file}: {name} is {value!r}, for which there is no equal here.{instead}"
            )
    return config


def _content(folder: Path) -> dict[str, Any]:
    """What stands in the file: a JSON object of a LoRA."""
    file = folder / CONFIG
    try:
        content = read_json(file)
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
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object.")
    if (kind := content.get("peft_type")) != "LORA":
        raise ValueError(f"{file}: peft_type is {kind!r}, and only LORA is read.")
    return content


def _check_makes_sense(config: PeftConfig, file: Path) -> None:
    """Checks that patterns can be matched, and that fields go together, as in PEFT."""
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


def _check_keeps_base(initialization: object, file: Path) -> None:
    """Checks that the base stayed as it is when the adapter was made."""
    plain = initialization.lower() if isinstance(initialization, str) else initialization
    if isinstance(initialization, list | dict) or plain not in _INITIALIZATIONS:
        raise ValueError(
            f"{file}: init_lora_weights is {initialization!r}, which changes the base when the "
            f"adapter is made. Save it with PEFT's path_initial_model_for_weight_conversion."
        )


def _restricted(content: Mapping[str, Any]) -> bool:
    """Whether more than the names in target_modules decides, or these are not understood here."""
    if content.get("layers_to_transform") is not None or content.get("exclude_modules"):
        return True
    targets = content.get("target_modules")
    if isinstance(targets, str):
        try:
            compiled(targets, "({})")
        except ValueError:
            return True
    return False


def _package(content: Mapping[str, Any]) -> str:
    """As PEFT has it where no task is given, in ``transformers.models.gpt2.modeling_gpt2``."""
    mapping = content.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    found = (
        re.match(r"transformers\.models\.(\w+)\.", library) if isinstance(library, str) else None
    )
    return found[1] if found else ""


class _Fields:
    """Reads fields, checks their types, and knows which were read."""

    def __init__(self, file: Path, content: Mapping[str, Any]) -> None:
        self._file, self._content = file, content
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
        return self._content.get(name, default)

    def _optional(self, name: str, default: Any) -> Any:
        """Likewise, and the default for ``null`` too: of rank and alpha alone PEFT knows none."""
        value = self._get(name, default)
        return default if value is None else value

    def _error(self, name: str, expected: str, value: object) -> ValueError:
        return ValueError(f"{self._file}: {name!r} must be {expected}, got {value!r}.")
