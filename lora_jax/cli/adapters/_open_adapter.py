"""An adapter on disk, in either format and without a model, as matrices."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.cli.adapters._adapted_matrix import AdaptedMatrix, Array
from lora_jax.core._adapter import Adapter
from lora_jax.core._fully_trained import as_node
from lora_jax.files._adapter_json import INDEX
from lora_jax.files._bytes import StrPath
from lora_jax.files._read_folder import read as read_lora_jax
from lora_jax.peft._folder import PeftFiles, read
from lora_jax.peft.config._module_config import CONFIG, PeftConfig
from lora_jax.peft.names._key_mapping import EXPERTS
from lora_jax.peft.names._keys import wrapped_module
from lora_jax.peft.torch._layout import to_factors

ADDED = " (added)"


@dataclasses.dataclass(frozen=True)
class OpenedAdapter:
    """An adapter on disk.

    Attributes:
      format: ``"lora_jax"`` or ``"PEFT"``.
      matrices: by path, or by the name of the module in PyTorch; each of those that are stacked.
      fully_trained: parameters that were fully trained; and what is added to one of the base's,
        its scale multiplied, by a name that says so.
      facts: what else the files say.
    """

    format: str
    matrices: Mapping[str, AdaptedMatrix]
    fully_trained: Mapping[str, Array]
    facts: Mapping[str, str]


def is_peft(path: StrPath) -> bool:
    """Whether a folder holds an adapter of PEFT, and not one of lora_jax."""
    return (Path(path) / CONFIG).exists() and not (Path(path) / INDEX).exists()


def open_adapter(path: StrPath) -> OpenedAdapter:
    """Reads an adapter of any format.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if files are damaged, or of another kind.
    """
    return opened(read(path, tying=True)) if is_peft(path) else _open_lora_jax(path)


def _open_lora_jax(path: StrPath) -> OpenedAdapter:
    """The matrices of an adapter of lora_jax."""
    stored = read_lora_jax(path)
    matrices: dict[str, AdaptedMatrix] = {}
    fully_trained: dict[str, Array] = {}
    added: dict[str, Array] = {}
    for name, leaf in stored.adapters.items():
        node = as_node(leaf)
        if isinstance(node, Adapter):
            matrices |= _matrices(name, node)
        elif node.in_base:
            (array,) = node.arrays.values()
            added[name + ADDED] = np.asarray(node.merge(np.zeros_like(array)))
        else:
            fully_trained[name] = np.asarray(node.merge(None))
    fully_trained |= added
    for name, arrays in stored.collections.items():
        fully_trained |= {f"{name}: {path}": array for path, array in arrays.items()}
    facts = {"written by": f"lora_jax {stored.library}"}
    facts |= {key: str(value) for key, value in stored.metadata.items()}
    facts["hashes of the base"] = str(len(stored.base)) if stored.base else "none"
    return OpenedAdapter("lora_jax", matrices, fully_trained, facts)


def _matrices(name: str, node: Adapter) -> dict[str, AdaptedMatrix]:
    """Each matrix of an adapter of lora_jax, stacked ones by their index."""
    settings: dict[str, Any] = {"variant": node.kind}
    settings |= {field: getattr(node, field) for field in ("materialize", "untied")}
    settings |= dataclasses.asdict(node.axes)
    del settings["alone"]
    found = {}
    for index in itertools.product(*map(range, node.U.shape[:-2])):
        U, V, m = node.U[index], node.V[index], None if node.m is None else node.m[index]
        at = "".join(f"[{i}]" for i in index)
        found[name + at] = AdaptedMatrix(U, V, m, node.scale, settings)
    return found


def opened(files: PeftFiles) -> OpenedAdapter:
    """The matrices of an adapter of PEFT.

    Raises:
      ValueError: if arrays are not of the rank that the config says, or have no one rank.
    """
    config, tensors = files.config, files.tensors
    matrices: dict[str, AdaptedMatrix] = {}
    fully_trained: dict[str, Array] = {}
    for module, keys in files.modules.items():
        matrices |= _matrices_of_module(module, keys, files)
        if "bias" in keys:
            added = tensors[keys["bias"]].astype(np.float32)
            fully_trained[f"{module}.bias{ADDED}"] = config.scale_of(module) * added
    fully_trained |= {name: tensors[key] for name, key in files.parameters.items()}
    facts = {"r": str(config.r), "lora_alpha": f"{config.alpha:g}"}
    facts |= {n: str(getattr(config, n)) for n in ("rslora", "dora") if getattr(config, n)}
    return OpenedAdapter("PEFT", matrices, fully_trained, facts)


def _matrices_of_module(
    module: str, keys: Mapping[str, str], files: PeftFiles
) -> dict[str, AdaptedMatrix]:
    """The matrix of a module of PEFT, or of each of its experts."""
    config, file = files.config, files.tensors.path
    arrays = {role: files.tensors[key] for role, key in keys.items() if role != "bias"}
    A, B = arrays["A"], arrays["B"]
    alone = _parameters(config, module)
    targets = alone or [module]
    if len({(config.rank_of(target), config.alpha_of(target)) for target in targets}) > 1:
        raise ValueError(
            f"{file}: {module!r} is for one of {', '.join(alone)}, of different ranks or alphas, "
            f"and only the model says which: load it with lora_jax.peft.load."
        )
    r, s = config.rank_of(targets[0]), config.scale_of(targets[0])
    if alone and A.ndim == 2 and A.shape[0] > r and A.shape[0] % r == 0:
        experts = A.shape[0] // r
        both = to_factors(EXPERTS[0], arrays, (A.shape[1], B.shape[0]), r, experts)
        return {
            f"{module}[{e}]": AdaptedMatrix(both["U"][e], both["V"][e], None, s)
            for e in range(experts)
        }
    if A.shape[0] != r or B.size != r * B.shape[0]:
        raise ValueError(
            f"{file}: {module!r} has A {A.shape} and B {B.shape}, which is not of rank {r}, as "
            f"{CONFIG} says."
        )
    if "m" in arrays and arrays["m"].size != B.shape[0]:
        raise ValueError(f"{file}: {module!r} has m {arrays['m'].shape}, but {B.shape[0]} outputs.")
    matrix = (A.size // A.shape[0], B.shape[0])
    both = to_factors("conv" if A.ndim > 2 else "linear", arrays, matrix, r, 1)
    return {module: AdaptedMatrix(both["U"], both["V"], both.get("m"), s)}


def _parameters(config: PeftConfig, module: str) -> list[str]:
    """The parameters of a module that may be adapted by themselves, by their names."""
    name = wrapped_module(module)
    parts = (target.rpartition(".") for target in config.target_parameters)
    return [f"{name}.{last}" for above, _, last in parts if f".{name}".endswith(f".{above}")]
