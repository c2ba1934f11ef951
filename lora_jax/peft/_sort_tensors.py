"""PEFT's tensors by the leaf of the model that they are for: each is used, or refused by name."""

from __future__ import annotations

import dataclasses

import numpy as np

from lora_jax.core.rules._match_paths import nearest_paths
from lora_jax.peft._folder import PeftFiles
from lora_jax.peft._refusals import check_same_in_peft
from lora_jax.peft.config._module_config import CONFIG
from lora_jax.peft.names._keys import BASE_LAYER, without_base_layer
from lora_jax.peft.names._targets import nested_modules
from lora_jax.peft.torch._arrays import from_leaf
from lora_jax.peft.torch._torch_model import TorchModel, TorchParameter

# Arrays of a module by their role, with the PyTorch parameter that they adapt.
Part = tuple[TorchParameter, dict[str, np.ndarray]]
# Arrays of one leaf, by their index in the stack.
Stack = dict[tuple[int, ...], np.ndarray]


@dataclasses.dataclass(frozen=True)
class SortedTensors:
    """Tensors by the path of the leaf that they are for.

    Attributes:
      adapters: of adapted kernels, ``A``, ``B`` and ``m``.
      fully_trained: of leaves that are fully trained.
      biases: what is added to the biases of adapted layers (``lora_bias``).
    """

    adapters: dict[str, list[Part]] = dataclasses.field(default_factory=dict)
    fully_trained: dict[str, Stack] = dataclasses.field(default_factory=dict)
    biases: dict[str, Stack] = dataclasses.field(default_factory=dict)


def sort_tensors(files: PeftFiles, model: TorchModel) -> SortedTensors:
    """All tensors of an adapter by the leaf that they are for.

    Raises:
      ValueError: if a tensor is for no parameter of the model, or PEFT would compute something else
        with it; if a tensor is missing that the config, or the rest of a stack, asks for.
    """
    found = SortedTensors()
    _sort_modules(files, model, found)
    _sort_parameters(files, model, found)
    if twice := sorted((set(found.adapters) | set(found.biases)) & set(found.fully_trained)):
        raise ValueError(f"{files.tensors.path}: {twice[0]!r} is both adapted and fully trained.")
    _check_stacks(files, model, found)
    _check_targets(files, model, found)
    return found


def _sort_modules(files: PeftFiles, model: TorchModel, found: SortedTensors) -> None:
    """Puts the tensors of adapted modules into their places."""
    tensors, file = files.tensors, files.tensors.path
    alone = [t for name, t in model.by_name.items() if files.config.targets_parameter(name)]
    nested = nested_modules(alone)
    for module, keys in files.modules.items():
        if module not in nested and f"{BASE_LAYER}." in f"{module}.":
            raise ValueError(
                f"{file} has {module!r}: an adapter below another one, as PEFT makes them for "
                f"nn.MultiheadAttention, has no equal here."
            )
        torch = nested.get(module) or _lookup(f"{module}.weight", files, model)
        check_same_in_peft(torch, model, True, str(file))
        embedding = keys["A"].endswith("_embedding_A")
        if torch.kind == "plain" or embedding != (torch.kind == "embedding"):
            raise ValueError(
                f"{file} has {keys['A']!r}, but names says that it is {torch.kind}: {torch.path!r}."
            )
        arrays = {role: tensors[key] for role, key in keys.items()}
        if module in nested and torch.kind == "conv1d":
            # Of a parameter by itself PEFT does not know that it is (in, out).
            arrays = {"A": arrays["B"].T, "B": arrays["A"].T}
        if "bias" in arrays:
            leaf = model.by_name.get(f"{module}.bias")
            if leaf is None:
                raise ValueError(
                    f"{file} has {keys['bias']!r}, but the layer of {torch.path!r} has no bias "
                    f"that it could be added to: give it one of zeros (use_bias=True), and names "
                    f"one for {module + '.bias'!r}."
                )
            found.biases.setdefault(leaf.path, {})[leaf.index] = arrays.pop("bias")
        found.adapters.setdefault(torch.path, []).append((torch, arrays))


def _sort_parameters(files: PeftFiles, model: TorchModel, found: SortedTensors) -> None:
    """Puts fully trained parameters into their places; copies of the base must equal it."""
    for name, key in files.parameters.items():
        plain, array = without_base_layer(name), files.tensors[key]
        where = f"{files.tensors.path}: {key!r}"
        torch = _lookup(plain, files, model)
        if plain.endswith((".weight", ".bias")) and not files.config.trains(name):
            ours = from_leaf(model, torch)
            if array.shape != ours.shape or not np.array_equal(array.astype(ours.dtype), ours):
                raise ValueError(
                    f"{where} is the base that the adapter was trained on, and another one than "
                    f"params has at {torch.path!r}. Put it into params first."
                )
            continue
        check_same_in_peft(torch, model, None, where)
        if torch.index in found.fully_trained.setdefault(torch.path, {}):
            raise ValueError(f"{where} is there in two forms.")
        found.fully_trained[torch.path][torch.index] = array


def _check_stacks(files: PeftFiles, model: TorchModel, found: SortedTensors) -> None:
    """Checks that what is stacked in a leaf is there for the whole stack."""
    indices = {path: {t.index for t, _ in parts} for path, parts in found.adapters.items()}
    stacks = (*found.fully_trained.items(), *found.biases.items())
    for path, there in (indices | {path: set(arrays) for path, arrays in stacks}).items():
        axes = model.axes(path)
        # Of kernels side by side some may be adapted, but the same ones in every layer of a scan.
        some = path in found.adapters and axes is not None and axes.fused > 1
        for torch in model.torch(path):
            if some and all(torch.index[-1] != index[-1] for index in there):
                continue
            if torch.index not in there:
                raise ValueError(
                    f"{files.tensors.path} lacks {torch.name!r}: {path!r} holds "
                    f"{len(model.torch(path))} such kernels in one, which are adapted together or "
                    f"not at all."
                )


def _check_targets(files: PeftFiles, model: TorchModel, found: SortedTensors) -> None:
    """Checks that there is something for all that the config names."""
    file, config = files.tensors.path, files.config
    adapted = {torch for parts in found.adapters.values() for torch, _ in parts}
    for name, torch in model.by_name.items():
        if torch in adapted or torch.index in found.fully_trained.get(torch.path, ()):
            continue
        # PEFT also lists modules that heads may have, such as "score", which this model need not
        # have.
        if config.saves(name):
            raise ValueError(f"{file} lacks {name!r}, of modules_to_save in {CONFIG}.")
        weight = torch.kind != "plain" and name.endswith(".weight")
        if weight and not config.restricted and config.targets(torch.module):
            raise ValueError(f"{file} lacks {torch.module!r}, of target_modules in {CONFIG}.")
        if config.targets_parameter(name):
            raise ValueError(f"{file} lacks {name!r}, of target_parameters in {CONFIG}.")


def _lookup(name: str, files: PeftFiles, model: TorchModel) -> TorchParameter:
    """The parameter of the model that has a name in PyTorch."""
    if name not in model.by_name:
        near = ", ".join(nearest_paths(name, model.by_name)) or "none"
        raise ValueError(
            f"{files.tensors.path} has something for {name!r}, but names gives no parameter of "
            f"this model that name. Nearest: {near}."
        )
    return model.by_name[name]
