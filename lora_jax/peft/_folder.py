"""A folder of PEFT without a model: its config and the names of its tensors, which must agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lora_jax.files._bytes import StrPath
from lora_jax.files._checkpoint import Checkpoint
from lora_jax.files._tensors import Tensors
from lora_jax.peft._lora_bias import LoraBias
from lora_jax.peft.config._module_config import CONFIG, PeftConfig
from lora_jax.peft.config._read import read_config
from lora_jax.peft.names._keys import PREFIX, WRAPPERS, names_of, split_role, without_copy

WEIGHTS = "adapter_model.safetensors"

# How the names of parameters end that PEFT saves without training them: of heads with their bias.
_COPIES = (".weight", ".base_layer.bias", "lm_head.bias", ".decoder.bias")


@dataclasses.dataclass(frozen=True)
class PeftFiles:
    """What a folder holds, by PyTorch's names and without a model.

    Attributes:
      config: what the config says.
      tensors: the file of arrays.
      modules: for each adapted module the keys of its tensors by ``"A"``, ``"B"``, ``"m"`` and
        ``"bias"``.
      parameters: for each parameter that is in the files itself, fully trained or a copy of the
        base's, its key.
      originals: for some of these the key of the parameter before it was trained.
      left_out: parts of keys that name no module, as ``"_orig_mod."``.
    """

    config: PeftConfig
    tensors: Tensors | Checkpoint
    modules: Mapping[str, Mapping[str, str]]
    parameters: Mapping[str, str]
    originals: Mapping[str, str] = dataclasses.field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def lora_bias(self, module: str) -> LoraBias:
        """What is added to the bias of a module."""
        value = self.tensors[self.modules[module]["bias"]].astype(np.float32)
        return LoraBias(jnp.asarray(value), self.config.scale_of(module))

    def without(self, prefix: str) -> PeftFiles:
        """The same, where all names begin with something that names no module.

        Raises:
          ValueError: if the config's patterns have it too.
        """
        _check_patterns(self.config, prefix, str(self.tensors.path))
        return dataclasses.replace(
            self,
            modules={name.removeprefix(prefix): keys for name, keys in self.modules.items()},
            parameters={name.removeprefix(prefix): key for name, key in self.parameters.items()},
            originals={name.removeprefix(prefix): key for name, key in self.originals.items()},
            left_out=(*self.left_out, prefix),
        )


def read(path: StrPath, tying: bool = False) -> PeftFiles:
    """Reads the config and the names of a folder, and checks that they fit each other.

    Args:
      path: the folder.
      tying: whether the caller sees to ``ensure_weight_tying``.

    Raises:
      FileNotFoundError: if there is no such adapter.
      ValueError: if files are damaged, or hold what has no equal here.
    """
    folder = Path(path)
    config = read_config(folder, tying)
    tensors = _tensors(folder)
    names, left_out = names_of(tensors, str(tensors.path))
    for part in left_out:
        if part.removesuffix(".") in WRAPPERS:
            _check_patterns(config, part, str(tensors.path))
    modules: dict[str, dict[str, str]] = {}
    parameters: dict[str, str] = {}
    originals: dict[str, str] = {}
    for name, key in names.items():
        plain = without_copy(name) if config.modules_to_save else name
        if plain != name:  # a copy, which PEFT writes too with bias="all"
            if ".original_module." in name:
                originals[plain] = key
                continue
            other = names.get(plain)
            if other is not None and np.array_equal(tensors[key], tensors[other]):
                continue
            if other is not None or not left_out:
                raise ValueError(f"{tensors.path}: {key!r} is not a copy of {PREFIX + plain!r}.")
            name = plain  # of a state dict, where the copy is all there is
        adapted = split_role(name)
        if adapted is None:
            parameters[name] = key
        elif modules.setdefault(adapted[0], {}).setdefault(adapted[1], key) != key:
            raise ValueError(f"{tensors.path}: {key!r} is there in two forms.")
    files = PeftFiles(config, tensors, modules, parameters, originals, left_out)
    _check_roles(files)
    _check_parameters(files)
    return files


def _tensors(folder: Path) -> Tensors | Checkpoint:
    """The tensors of a folder, in one file or in several."""
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise ValueError(
            f"{folder} has its weights as a pickle, adapter_model.bin, which can run any code: "
            f"convert it with PEFT's save_pretrained(..., safe_serialization=True)."
        )
    if not (folder / WEIGHTS).exists() and (folder / f"{WEIGHTS}.index.json").exists():
        return Checkpoint(folder)
    return Tensors(folder / WEIGHTS)


def _check_patterns(config: PeftConfig, part: str, file: str) -> None:
    """Checks that no pattern has a part of a name that is left out, and would match no more."""
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if part.removesuffix(".") in pattern:
            raise ValueError(
                f"{file}: {part!r} in its keys names no module, but {CONFIG} has the pattern "
                f"{pattern!r}: take it out of both."
            )


def _check_roles(files: PeftFiles) -> None:
    """Checks that each adapted module has the tensors that the config asks for, and no others."""
    config, tensors = files.config, files.tensors
    needed = {"A", "B", *(("m",) if config.dora else ()), *(("bias",) if config.lora_bias else ())}
    for module, roles in files.modules.items():
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
                    f"{tensors.path}: {roles[role]!r} is {shape}, which is not a matrix with "
                    f"numbers."
                )


def _check_parameters(files: PeftFiles) -> None:
    """Checks that parameters are in the files for a reason that the config gives."""
    config = files.config
    for name, key in files.parameters.items():
        biases = config.bias != "none" and name.endswith(".bias")
        # PEFT also saves layers that it does not train, such as embeddings of a new size.
        if not (biases or config.saves(name) or name.endswith(_COPIES)):
            raise ValueError(
                f"{files.tensors.path}: {key!r} is neither of an adapter nor of modules_to_save in "
                f"{CONFIG}."
            )
