"""A folder of PEFT without a model: its config and the names of its tensors, which must agree."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lora_jax.core._rule import scale
from lora_jax.files._bytes import StrPath
from lora_jax.files._checkpoint import Checkpoint
from lora_jax.files._tensors import Tensors
from lora_jax.peft._config import CONFIG, PeftConfig, read_config

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# How the name of a tensor of an adapter ends, behind the module's name.
_ROLES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
    "lora_B.bias": "bias",
}

# Copies of modules that are saved whole.
_COPY = re.compile(r"\.(original_module|modules_to_save)(?=\.)")

# How the names of parameters end that PEFT saves without training them: of heads with their bias.
_COPIES = (".weight", ".base_layer.bias", "lm_head.bias", ".decoder.bias")

# What wraps a model, or a part of it, and gets into the names: of torch.compile and of FSDP.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# The adapter's name, where PyTorch's own state dict has it.
_NAMED = re.compile(
    r"\.(?:lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"\.(?!(?:weight|bias)$)([^.]+)(?=\.|$)"
)


@dataclasses.dataclass(frozen=True)
class PeftFiles:
    """What a folder holds, by PyTorch's names and without a model.

    Attributes:
      config: what the config says.
      tensors: the file of arrays.
      modules: for each adapted module the keys of its tensors by ``"A"``, ``"B"``, ``"m"`` and
        ``"bias"``.
      whole: for each parameter that is saved whole its key.
      before: for some of these the key of the parameter before it was trained.
      left_out: parts of keys that name no module, as ``"_orig_mod."``.
    """

    config: PeftConfig
    tensors: Tensors | Checkpoint
    modules: Mapping[str, Mapping[str, str]]
    whole: Mapping[str, str]
    before: Mapping[str, str] = dataclasses.field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def scale(self, module: str) -> float:
        """``s`` of a module."""
        config = self.config
        return scale(config.rank_of(module), config.alpha_of(module), config.rslora)

    def trains(self, name: str) -> bool:
        """Whether a parameter that is saved whole was trained, and is no copy of the base's."""
        plain = name.replace(".base_layer.", ".")
        if plain.endswith(".weight"):
            return name == plain and self.config.saves(plain)
        return self.config.saves(plain) or self.config.bias != "none"

    def without(self, prefix: str) -> PeftFiles:
        """The same, where all names begin with something that names no module.

        Raises:
          ValueError: the config's patterns say it too.
        """
        _check_patterns(self.config, prefix, str(self.tensors.path))
        return dataclasses.replace(
            self,
            modules={name.removeprefix(prefix): keys for name, keys in self.modules.items()},
            whole={name.removeprefix(prefix): key for name, key in self.whole.items()},
            before={name.removeprefix(prefix): key for name, key in self.before.items()},
            left_out=(*self.left_out, prefix),
        )


def _check_patterns(config: PeftConfig, part: str, where: str) -> None:
    """Errors where a pattern has a part of a name that is left out, and would match no more."""
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if part.removesuffix(".") in pattern:
            raise ValueError(
                f"{where}: {part!r} in its keys names no module, but {CONFIG} has the pattern "
                f"{pattern!r}: take it out of both."
            )


def read(path: StrPath, tying: bool = False) -> PeftFiles:
    """Reads the config and the names of a folder, and checks that they fit each other.

    Args:
      path: the folder.
      tying: whether the caller sees to ``ensure_weight_tying``.

    Raises:
      FileNotFoundError: there is no such adapter.
      ValueError: files that are damaged, or hold what has no equal here.
    """
    folder = Path(path)
    config = read_config(folder, tying)
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise ValueError(
            f"{folder} has its weights as a pickle, adapter_model.bin, which can run any code: "
            f"convert it with PEFT's save_pretrained(..., safe_serialization=True)."
        )
    tensors: Tensors | Checkpoint
    if not (folder / WEIGHTS).exists() and (folder / f"{WEIGHTS}.index.json").exists():
        tensors = Checkpoint(folder)
    else:
        tensors = Tensors(folder / WEIGHTS)
    names, left_out = _names(tensors)
    for part in left_out:
        if part.removesuffix(".") in _WRAPPERS:
            _check_patterns(config, part, str(tensors.path))
    modules: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    before: dict[str, str] = {}
    for name, key in names.items():
        plain = _COPY.sub("", name) if config.modules_to_save else name
        if plain != name:  # a copy, which PEFT writes beside with bias="all"
            if ".original_module." in name:
                before[plain] = key
                continue
            other = names.get(plain)
            if other is not None and np.array_equal(tensors[key], tensors[other]):
                continue
            if other is not None or not left_out:
                raise ValueError(f"{tensors.path}: {key!r} is no copy of {PREFIX + plain!r}.")
            name = plain  # of a state dict, where the copy is all there is
        end = next((end for end in _ROLES if name.endswith(f".{end}")), None)
        if end is None:
            whole[name] = key
        elif (
            modules.setdefault(name.removesuffix(f".{end}"), {}).setdefault(_ROLES[end], key) != key
        ):
            raise ValueError(f"{tensors.path}: {key!r} is there in two forms.")
    needed = {"A", "B", *(("m",) if config.dora else ()), *(("bias",) if config.lora_bias else ())}
    for module, roles in modules.items():
        # Embeddings have no bias, whatever the config says.
        lacks = needed - set(roles) - ({"bias"} if "embedding" in roles.get("A", "") else set())
        if lacks or set(roles) - needed:
            raise ValueError(
                f"{tensors.path}: {module!r} has {', '.join(sorted(roles))}, but by {CONFIG} it "
                f"should have {', '.join(sorted(needed))}."
                + (" Were the magnitudes of DoRA dropped?" if lacks == {"m"} else "")
            )
        for role in ("A", "B"):
            shape = tensors.info[roles[role]].shape
            if len(shape) < 2 or 0 in shape:
                raise ValueError(
                    f"{tensors.path}: {roles[role]!r} is {shape}, which is no matrix with numbers."
                )
    for name, key in whole.items():
        biases = config.bias != "none" and name.endswith(".bias")
        # PEFT also saves layers that it does not train, such as embeddings of a new size.
        if not (biases or config.saves(name) or name.endswith(_COPIES)):
            raise ValueError(
                f"{tensors.path}: {key!r} is neither of an adapter nor of modules_to_save in "
                f"{CONFIG}."
            )
    return PeftFiles(config, tensors, modules, whole, before, left_out)


def _names(tensors: Tensors | Checkpoint) -> tuple[dict[str, str], tuple[str, ...]]:
    """The keys by what they name in the model, and the parts of keys that name no module of it."""
    adapters = sorted({found[1] for key in tensors if (found := _NAMED.search(key))})
    if len(adapters) > 1:
        raise ValueError(
            f"{tensors.path} has several adapters in one, {', '.join(adapters)}: save each with "
            f"PEFT's save_pretrained."
        )
    names: dict[str, str] = {}
    left_out: dict[str, None] = {f"{adapter}.": None for adapter in adapters}
    bare = not any(PREFIX in key for key in tensors)
    for key in tensors:
        parts = key.split(".")
        left_out |= dict.fromkeys(f"{part}." for part in parts if part in _WRAPPERS)
        name = ".".join(part for part in parts if part not in _WRAPPERS)
        if name.startswith(f"module.{PREFIX}"):
            name, left_out["module."] = name.removeprefix("module."), None
        if not (bare or name.startswith(PREFIX)):
            raise ValueError(f"{tensors.path}: {key!r} does not begin with {PREFIX!r}.")
        name = name.removeprefix(PREFIX)
        if found := _NAMED.search(name):
            name = name[: found.start(1) - 1] + name[found.end(1) :]
        for adapter in adapters:
            name = name.replace(f".modules_to_save.{adapter}.", ".modules_to_save.")
        if name in names:
            raise ValueError(f"{tensors.path}: {key!r} and {names[name]!r} are two of one kind.")
        names[name] = key
    return names, tuple(left_out)
