"""``adapter_config.json`` as PEFT writes it, for adapters by the names of their modules."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lora_jax.core._adapter import Adapter
from lora_jax.core.variants._cached_norm import CachedNorm
from lora_jax.core.variants._dora import DoRA
from lora_jax.peft.config._module_config import PeftConfig
from lora_jax.peft.config._patterns import by_pattern
from lora_jax.peft.names._key_mapping import EXPERTS
from lora_jax.peft.torch._torch_model import TorchModel, TorchParameter

# What PEFT 0.21 writes for an adapter where nothing else is given.
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
# The modules that PEFT trains in full for a type of task.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def config_of(
    modules: Mapping[str, Adapter], torches: Collection[TorchParameter]
) -> dict[str, Any]:
    """What the config says of adapters.

    Args:
      modules: adapters by their target, a module or a parameter.
      torches: the parameters that they adapt.

    Raises:
      ValueError: if they differ in what PEFT has once in an adapter.
    """
    kinds = {torch.kind for torch in torches}
    parameters = sorted(torch.name for torch in torches if torch.kind in EXPERTS)
    same: dict[str, Any] = {}
    for name, what in (("kind", "LoRA and DoRA"), ("rslora", "rsLoRA and plain LoRA")):
        values = {getattr(adapter, name) for adapter in modules.values()}
        if len(values) > 1:
            raise ValueError(f"PEFT has no {what} in one adapter: save them as two.")
        same[name] = values.pop()
    if same["kind"] == CachedNorm.name:
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
        "use_dora": same["kind"] == DoRA.name,
        "use_rslora": same["rslora"],
        "lora_dropout": max(rates, default=0.0),
        "fan_in_fan_out": "conv1d" in kinds,
        "target_modules": sorted(set(modules) - set(parameters)),
        "target_parameters": parameters or None,
    }


def modules_to_save(
    model: TorchModel,
    saved: Mapping[str, TorchParameter],
    adapted: Mapping[str, Adapter],
    task_type: str | None,
) -> list[str]:
    """PEFT's list of modules that are fully trained, which names no other module.

    PEFT compares ends of names, takes a module with all that is in it, and adds the head of a task.

    Raises:
      ValueError: if PEFT would train another parameter too.
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
                f"PEFT would train {name!r} fully too, as its name ends like one of "
                f"{[*out, *heads]}: train {torch.path!r} fully"
                + (", or leave out task_type." if heads else ".")
            )
    return out


def excluded(model: TorchModel, adapted: Mapping[str, Adapter]) -> list[str]:
    """Modules that are not adapted, and whose names end like those that are: ``exclude_modules``.

    Raises:
      ValueError: if ends of names cannot say which modules are adapted.
    """
    rule = PeftConfig(1, 1.0, target_modules=tuple(adapted))
    out = sorted(m for m in model.modules() - set(adapted) if rule.targets(m))
    no = PeftConfig(1, 1.0, target_modules=tuple(out))
    for module in adapted:
        if no.targets(module):
            raise ValueError(
                f"PEFT cannot adapt {module!r} and leave {out} as they are, by ends of names."
            )
    return out


def _number(x: float) -> float:
    """As an integer where it is one, as PEFT writes it."""
    return int(x) if float(x).is_integer() else float(x)
