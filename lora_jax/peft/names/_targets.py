"""PEFT's name for what it adapts: a module, or a parameter by itself."""

from __future__ import annotations

from collections.abc import Iterable

from lora_jax.peft.names._key_mapping import EXPERTS
from lora_jax.peft.names._keys import BASE_LAYER
from lora_jax.peft.torch._torch_model import TorchParameter


def target_of(torch: TorchParameter) -> str:
    """What PEFT calls the target: a module, or a parameter that is adapted by itself."""
    return torch.name if torch.kind in EXPERTS else torch.module


def nested_modules(torches: Iterable[TorchParameter]) -> dict[str, TorchParameter]:
    """Parameters that are adapted by themselves, by the modules that PEFT has for them.

    It wraps the module once for each of its parameters, in their order, the first innermost.
    """
    modules: dict[str, list[TorchParameter]] = {}
    for torch in torches:
        modules.setdefault(torch.module, []).append(torch)
    return {
        module + BASE_LAYER * depth: torch
        for module, ones in modules.items()
        for depth, torch in enumerate(sorted(ones, key=lambda t: t.order, reverse=True))
    }
