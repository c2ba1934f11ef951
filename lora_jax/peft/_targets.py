"""What PEFT adapts, how it calls it, and where it would compute something else than the model."""

from __future__ import annotations

from collections.abc import Iterable

from lora_jax.peft._names import EXPERTS, Torch
from lora_jax.peft._torch_params import TorchParams


def target_of(torch: Torch) -> str:
    """What PEFT calls the target: a module, or a parameter that is adapted by itself."""
    return torch.name if torch.kind in EXPERTS else torch.module


def check_equal(torch: Torch, model: TorchParams, untied: bool | None, where: str) -> None:
    """Errors where PEFT would compute something else.

    Args:
      torch: what is adapted, or fully trained.
      model: the parameters.
      untied: whether the adapter is for one use only; ``None`` for what is fully trained.
      where: the file.
    """
    axes, path = model.model_axes, torch.path
    if untied is not None:
        model.check_orientation(path)
    if torch.kind == "unused":
        raise ValueError(
            f"{where}: PyTorch's {torch.name!r} is not where the model computes with {path!r}, so "
            f"that in PEFT the same adapter, or a saved copy, would do something else."
        )
    if axes is None and (torch.kind == "conv" or (torch.kind == "embedding" and not untied)):
        raise ValueError(
            f"{where}: whether PEFT computes with {torch.name!r} as Flax with {path!r} depends on "
            f"the model (dilation, padding, groups; other uses of an embedding): pass "
            f"axes=lora_jax.kernel_axes(...)."
        )
    if axes is None:
        return
    reason = axes.unlike.get(path)
    if reason and (untied is not None or "transposed" in reason):
        raise ValueError(f"{where}: {path!r} has no equal in PEFT: {reason}.")
    several = path in axes.tied or path in axes.shared
    if torch.kind == "embedding" and several and not untied:
        raise ValueError(
            f"{where}: the model uses {path!r} several times. In PEFT only its lookup would be "
            f"{'trained' if untied is None else 'adapted'}, and the other uses keep the base."
            + ("" if untied is None else " Adapt it with tied='untie'.")
        )
    if untied is None and "BatchNorm" in axes.layers.get(path, ""):
        raise ValueError(
            f"{where}: {path!r} is of a BatchNorm, whose running statistics PEFT saves too, and "
            f"which are not parameters here."
        )


def nested_modules(torches: Iterable[Torch]) -> dict[str, Torch]:
    """Parameters that are adapted by themselves, by the modules that PEFT has for them.

    It wraps the module once for each of its parameters, in their order, the first innermost.
    """
    modules: dict[str, list[Torch]] = {}
    for torch in torches:
        modules.setdefault(torch.module, []).append(torch)
    return {
        module + ".base_layer" * depth: torch
        for module, ones in modules.items()
        for depth, torch in enumerate(sorted(ones, key=lambda t: t.order, reverse=True))
    }
