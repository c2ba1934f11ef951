"""What is refused because PEFT would compute something else than the model."""

from __future__ import annotations

from lora_jax.core._model_axes import Convolution
from lora_jax.peft.torch._torch_model import TorchModel, TorchParameter


def check_same_in_peft(
    torch: TorchParameter, model: TorchModel, untied: bool | None, where: str
) -> None:
    """Checks that PEFT would compute the same as the model.

    Args:
      torch: what is adapted, or fully trained.
      model: the parameters.
      untied: whether the adapter is for one use only; ``None`` for what is fully trained.
      where: the file, for errors.

    Raises:
      ValueError: if PEFT would not, or if that cannot be known without ``axes``.
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
    convolution = axes.convolutions.get(path, Convolution())
    reason = _unlike(convolution)
    if reason and (untied is not None or convolution.transposed):
        raise ValueError(f"{where}: {path!r} has no equal in PEFT: {reason}.")
    several = path in axes.tied or path in axes.shared
    if torch.kind == "embedding" and several and not untied:
        raise ValueError(
            f"{where}: the model uses {path!r} several times. In PEFT only its lookup would be "
            f"{'trained' if untied is None else 'adapted'}, and the other uses keep the base."
            + ("" if untied is None else _advice(path in axes.shared))
        )
    if untied is None and "BatchNorm" in axes.layers.get(path, ""):
        raise ValueError(
            f"{where}: {path!r} is of a BatchNorm, whose running statistics PEFT saves too, and "
            f"which are not parameters here."
        )


def _unlike(convolution: Convolution) -> str | None:
    """Why PEFT would compute something else with an adapter of a convolution."""
    if convolution.transposed:
        return "PEFT has no transposed convolutions"
    if convolution.dilated:
        return "PEFT does not dilate its factors"
    if convolution.padding not in (None, "SAME", "VALID"):
        return f"PEFT does not pad its factors with {convolution.padding}"
    if convolution.groups != 1:
        return "PEFT's factors have no groups"
    return None


def _advice(in_layers: bool) -> str:
    """What to do where an embedding has several uses: some of them in layers, or outside of all."""
    if in_layers:  # which are all adapted, so that there is nothing to untie
        return " Merge it, lora_merge or lora_jax.export, or leave it out."
    return " Adapt it with tied='untie'."
