"""The nodes of an adapter tree as PEFT's tensors and config; what PEFT has not is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.core._adapter import Adapter
from lora_jax.files._host import host
from lora_jax.peft._config import PeftConfig, by_pattern
from lora_jax.peft._lora_bias import LoraBias
from lora_jax.peft._names import EXPERTS, Torch
from lora_jax.peft._torch_layout import from_factors
from lora_jax.peft._torch_params import TorchParams

_NAMES = {
    False: {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"},
    True: {"A": "lora_embedding_A", "B": "lora_embedding_B", "m": "lora_magnitude_vector"},
}
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def from_adapter(
    adapter: Adapter, torch: Torch, index: tuple[int, ...], window: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """The inverse of :func:`to_adapter`, for one kernel of the stack."""
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
    arrays = from_factors(torch.kind, U, V, m, window)
    return {_NAMES[torch.kind == "embedding"][role]: array for role, array in arrays.items()}


def biases_of_B(
    shifts: Mapping[str, LoraBias], model: TorchParams, adapted: Mapping[str, Adapter]
) -> list[Torch]:
    """The biases of adapted modules to which something is added: of all of them, or of none."""
    torches = [torch for path in shifts for torch in model.torch(path)]
    for torch in torches:
        adapter = adapted.get(torch.module)
        if adapter is None or not torch.name.endswith(".bias"):
            raise ValueError(
                f"Something is added to {torch.path!r}, which PEFT has for biases of adapted "
                f"layers only (lora_bias)."
            )
        if adapter.variant != "lora":
            raise ValueError(f"PEFT has no DoRA with lora_bias, as at {torch.path!r}.")
        if adapter.scale != shifts[torch.path].scale:
            raise ValueError(
                f"{torch.path!r} has something added with the scale {shifts[torch.path].scale}, "
                f"and its layer is adapted with {adapter.scale}: PEFT has one for both."
            )
    if torches and (lacking := sorted(set(adapted) - {torch.module for torch in torches})):
        raise ValueError(
            f"PEFT's lora_bias is for all adapted modules or for none, and nothing is added to a "
            f"bias of {lacking[0]!r}."
        )
    return torches


def whole_modules(
    model: TorchParams, paths: Sequence[str], adapted: Mapping[str, Adapter]
) -> tuple[dict[str, Torch], str]:
    """What is fully trained, by PyTorch's names, and which value of ``bias`` says so."""
    saved = {torch.name: torch for path in paths for torch in model.complete(path)}
    biases = {n: t for n, t in saved.items() if t.module in adapted}
    for name in biases:
        if not name.endswith(".bias"):
            raise ValueError(f"{name!r} is fully trained beside an adapter, which PEFT has not.")
    all_biases = {name for name in model.by_name if name.endswith(".bias")} if saved else set()
    if saved and set(saved) == all_biases and len(biases) < len(saved):
        return saved, "all"
    in_module = {torch.module for torch in saved.values()} - set(adapted)
    for name, torch in model.by_name.items() if saved else ():
        if torch.module in in_module and name not in saved:
            raise ValueError(
                f"Of the module {torch.module!r} a part is fully trained, and {torch.path!r} is "
                f"not: PEFT saves modules whole or not at all."
            )
        if biases and torch.module in adapted and name.endswith(".bias") and name not in saved:
            raise ValueError(
                f"Some biases of adapted modules are fully trained, and {torch.path!r} is not: "
                f"PEFT trains all of them or none."
            )
    return saved, "lora_only" if biases else "none"


def modules_to_save(
    model: TorchParams,
    saved: Mapping[str, Torch],
    adapted: Mapping[str, Adapter],
    task_type: str | None,
) -> list[str]:
    """PEFT's list of modules that are fully trained, which names no other module.

    PEFT compares ends of names, takes a module with all that is in it, and adds the head of a task.
    """
    modules = {torch.module for torch in saved.values()} - set(adapted)
    if "" in modules:
        raise ValueError("PEFT cannot save a parameter that is in no module.")
    heads = _HEADS.get(task_type or "", ())

    def up(module: str) -> str:
        parts = module.split(".")
        above = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return next((m for m in above if m in modules or m.endswith(heads or ("\0",))), module)

    out = sorted({up(module) for module in modules})
    if not (out or heads):
        return out
    rule = PeftConfig(1, 1.0, modules_to_save=(*out, *heads))
    for name, torch in model.by_name.items():
        if name not in saved and rule.saves(name):
            raise ValueError(
                f"PEFT would train {name!r} whole too, as its name ends like one of "
                f"{[*out, *heads]}: train {torch.path!r} whole"
                + (", or leave out task_type." if heads else ".")
            )
    return out


def excluded(model: TorchParams, adapted: Mapping[str, Adapter]) -> list[str]:
    """Modules that are not adapted, and whose names end like those that are."""
    rule = PeftConfig(1, 1.0, target_modules=tuple(adapted))
    out = sorted(m for m in model.modules() - set(adapted) if rule.targets(m))
    no = PeftConfig(1, 1.0, target_modules=tuple(out))
    for module in adapted:
        if no.targets(module):
            raise ValueError(
                f"PEFT cannot adapt {module!r} and leave {out} as they are, by ends of names."
            )
    return out


def config_of(modules: Mapping[str, Adapter], torches: Sequence[Torch]) -> dict[str, Any]:
    """The config of adapters by module, or by parameter."""
    kinds = {torch.kind for torch in torches}
    parameters = sorted(torch.name for torch in torches if torch.kind in EXPERTS)
    same: dict[str, Any] = {}
    for name, what in (("variant", "LoRA and DoRA"), ("rslora", "rsLoRA and plain LoRA")):
        values = {getattr(adapter, name) for adapter in modules.values()}
        if len(values) > 1:
            raise ValueError(f"PEFT has no {what} in one adapter: save them as two.")
        same[name] = values.pop()
    if same["variant"] == "scaled":
        raise ValueError("PEFT has no adapters after cache_norm: save those of before.")
    embeddings = {torch.module for torch in torches if torch.kind == "embedding"}
    rates = {a.dropout or 0.0 for module, a in modules.items() if module not in embeddings}
    if any(modules[module].dropout for module in embeddings):
        raise ValueError("PEFT has no dropout for embeddings.")
    if len(rates) > 1:
        raise ValueError(f"PEFT has one dropout for all modules, and these have {sorted(rates)}.")
    rank, ranks = by_pattern({module: adapter.rank for module, adapter in modules.items()})
    alpha, alphas = by_pattern({module: _number(a.alpha) for module, a in modules.items()})
    return {
        "r": rank,
        "rank_pattern": ranks,
        "lora_alpha": alpha,
        "alpha_pattern": alphas,
        "use_dora": same["variant"] == "dora",
        "use_rslora": same["rslora"],
        "lora_dropout": max(rates, default=0.0),
        "fan_in_fan_out": "conv1d" in kinds,
        "target_modules": sorted(set(modules) - set(parameters)),
        "target_parameters": parameters or None,
    }


def _number(x: float) -> float:
    """As an integer where it is one, as PEFT writes it."""
    return int(x) if float(x).is_integer() else float(x)
