"""The nodes of an adapter tree as PEFT's tensors; what PEFT does not have is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lora_jax.core._adapter import Adapter
from lora_jax.core._fully_trained import FullyTrained
from lora_jax.core._node import Node
from lora_jax.core.variants._lora import LoRA
from lora_jax.files._to_host import host
from lora_jax.peft._lora_bias import LoraBias
from lora_jax.peft._plain_variants import as_lora_or_dora
from lora_jax.peft._refusals import check_same_in_peft
from lora_jax.peft.names._key_mapping import EXPERTS
from lora_jax.peft.names._keys import BASE_LAYER, PREFIX, adapter_key
from lora_jax.peft.names._targets import nested_modules, target_of
from lora_jax.peft.torch._arrays import from_leaf
from lora_jax.peft.torch._layout import from_factors
from lora_jax.peft.torch._torch_model import TorchModel, TorchParameter

Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class SortedNodes:
    """Nodes by what PEFT has for them, each by the path of its leaf.

    Attributes:
      adapters: of kernels: PEFT's modules.
      biases: what is added to biases (``lora_bias``).
      fully_trained: leaves that are fully trained (``modules_to_save``, ``bias``).
    """

    adapters: dict[str, Adapter] = dataclasses.field(default_factory=dict)
    biases: dict[str, LoraBias] = dataclasses.field(default_factory=dict)
    fully_trained: dict[str, Any] = dataclasses.field(default_factory=dict)


def sort_nodes(nodes: Mapping[str, Node], base: Mapping[str, Any]) -> SortedNodes:
    """All nodes by what PEFT has for them.

    Args:
      nodes: of the adapters, by their paths.
      base: its leaves.

    Raises:
      ValueError: if PEFT has nothing for one, or there is no adapter.
    """
    found = SortedNodes()
    for path, node in nodes.items():
        node.check_alone(path)
        match node:
            case Adapter():
                found.adapters[path] = as_lora_or_dora(path, base[path], node)
            case LoraBias():
                found.biases[path] = node
            case FullyTrained():
                found.fully_trained[path] = node.value
            case _:
                raise ValueError(f"PEFT has nothing for a {type(node).__name__}, as at {path!r}.")
    if not found.adapters:
        raise ValueError("adapters has no adapter of a kernel, and PEFT saves nothing else.")
    return found


def adapted_parameters(
    kernels: Mapping[str, Adapter], model: TorchModel, file: str
) -> dict[TorchParameter, tuple[int, ...]]:
    """PyTorch's parameters that are adapted, each with its index in the adapter's arrays.

    Raises:
      ValueError: if PEFT could not adapt one, or would compute something else with it.
    """
    adapted: dict[TorchParameter, tuple[int, ...]] = {}
    targets: set[str] = set()
    for path, adapter in kernels.items():
        for torch, index in model.adapted(path, adapter.axes).items():
            check_same_in_peft(torch, model, adapter.untied, file)
            if target_of(torch) in targets or not (
                torch.kind in EXPERTS or torch.name.endswith(".weight")
            ):
                raise ValueError(
                    f"names gives {path!r} the name {torch.name!r}, which another kernel has too, "
                    f"or which does not end in '.weight': PEFT adapts modules by weights."
                )
            targets.add(target_of(torch))
            adapted[torch] = index
    return adapted


def adapter_tensors(
    kernels: Mapping[str, Adapter],
    adapted: Mapping[TorchParameter, tuple[int, ...]],
    model: TorchModel,
) -> Tensors:
    """``A``, ``B`` and ``m`` of every adapted parameter, by their keys."""
    nested = nested_modules(torch for torch in adapted if torch.kind in EXPERTS)
    wraps = {torch: module for module, torch in nested.items()}
    tensors: Tensors = {}
    for torch, index in adapted.items():
        window, module = model.window(torch.path, torch.kind), wraps.get(torch, torch.module)
        for role, array in _arrays(kernels[torch.path], torch, index, window).items():
            tensors[adapter_key(module, role, torch.kind == "embedding")] = array
    return tensors


def _arrays(
    adapter: Adapter, torch: TorchParameter, index: tuple[int, ...], window: tuple[int, ...]
) -> Tensors:
    """PEFT's arrays of one kernel of the stack, by their roles."""
    path = torch.path
    if torch.kind == "plain":
        raise ValueError(f"{path!r} has an adapter, but names says that it is plain.")
    if torch.kind == "embedding" and adapter.materialize:
        raise ValueError(
            f"{path!r} is an embedding whose W' all uses see (materialize); in PEFT only the "
            f"lookup does. Adapt it with tied='untie'."
        )
    if torch.kind in EXPERTS and (adapter.m is not None or adapter.dropout):
        raise ValueError(f"{path!r} holds experts, for which PEFT has neither DoRA nor dropout.")
    U, V = (host(getattr(adapter, n), f"{path}.{n}")[index] for n in ("U", "V"))
    m = None if adapter.m is None else host(adapter.m, f"{path}.m")[index]
    return from_factors(torch.kind, U, V, m, window)


def lora_bias_tensors(
    biases: Mapping[str, LoraBias], model: TorchModel, adapted: Mapping[str, Adapter]
) -> Tensors:
    """The biases of ``B`` by their keys: of all adapted modules, or of none.

    Raises:
      ValueError: if PEFT has no such biases.
    """
    torches = [torch for path in biases for torch in model.torch(path)]
    for torch in torches:
        adapter = adapted.get(torch.module)
        if adapter is None or not torch.name.endswith(".bias"):
            raise ValueError(
                f"Something is added to {torch.path!r}, which PEFT has for biases of adapted "
                f"layers only (lora_bias)."
            )
        if not isinstance(adapter.variant, LoRA):
            raise ValueError(f"PEFT has no DoRA with lora_bias, as at {torch.path!r}.")
        if adapter.scale != biases[torch.path].scale:
            raise ValueError(
                f"{torch.path!r} has something added with the scale {biases[torch.path].scale}, "
                f"and its layer is adapted with {adapter.scale}: PEFT has one for both."
            )
    if torches and (lacking := sorted(set(adapted) - {torch.module for torch in torches})):
        raise ValueError(
            f"PEFT's lora_bias is for all adapted modules or for none, and nothing is added to a "
            f"bias of {lacking[0]!r}."
        )
    values = {torch: biases[torch.path].value for torch in torches}
    return {
        adapter_key(torch.module, "bias"): from_leaf(model, torch, value)
        for torch, value in values.items()
    }


def saved_parameters(
    model: TorchModel, paths: Iterable[str], adapted: Mapping[str, Adapter]
) -> tuple[dict[str, TorchParameter], str]:
    """What is fully trained, by PyTorch's names, and which value of ``bias`` says so.

    Raises:
      ValueError: if PEFT cannot train just these.
    """
    saved = {torch.name: torch for path in paths for torch in model.complete(path)}
    biases = {n: t for n, t in saved.items() if t.module in adapted}
    for name in biases:
        if not name.endswith(".bias"):
            raise ValueError(f"{name!r} is fully trained next to an adapter, which PEFT has not.")
    all_biases = {name for name in model.by_name if name.endswith(".bias")} if saved else set()
    if saved and set(saved) == all_biases and len(biases) < len(saved):
        return saved, "all"
    in_module = {torch.module for torch in saved.values()} - set(adapted)
    for name, torch in model.by_name.items() if saved else ():
        if torch.module in in_module and name not in saved:
            raise ValueError(
                f"A part of the module {torch.module!r} is fully trained, and {torch.path!r} is "
                f"not: PEFT saves all of a module or nothing."
            )
        if biases and torch.module in adapted and name.endswith(".bias") and name not in saved:
            raise ValueError(
                f"Some biases of adapted modules are fully trained, and {torch.path!r} is not: "
                f"PEFT trains all of them or none."
            )
    return saved, "lora_only" if biases else "none"


def saved_tensors(
    saved: Mapping[str, TorchParameter],
    bias: str,
    model: TorchModel,
    adapted: Mapping[str, Adapter],
    file: str,
) -> Tensors:
    """Parameters that are fully trained, by their keys.

    Raises:
      ValueError: if PEFT would compute something else with one.
    """
    tensors: Tensors = {}
    for torch in saved.values():
        check_same_in_peft(torch, model, None, file)
        layer = BASE_LAYER if bias != "none" and torch.module in adapted else ""
        key = f"{PREFIX}{torch.module}{layer}.{torch.name.rpartition('.')[2]}"
        tensors[key] = from_leaf(model, torch)
    return tensors
