"""Saves adapters as a folder of PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import chex
import jax.numpy as jnp

from lora_jax.core._axes import KernelAxes
from lora_jax.files._array_names import named_pair
from lora_jax.files._bytes import StrPath, write_bytes
from lora_jax.files._collections import arrays_of, listed
from lora_jax.files._tensors import encode
from lora_jax.peft._folder import WEIGHTS
from lora_jax.peft._from_nodes import (
    adapted_parameters,
    adapter_tensors,
    lora_bias_tensors,
    saved_parameters,
    saved_tensors,
    sort_nodes,
)
from lora_jax.peft.config._module_config import CONFIG
from lora_jax.peft.config._write import DEFAULTS, config_of, excluded, modules_to_save
from lora_jax.peft.names._families import as_names
from lora_jax.peft.names._key_mapping import KeyMapping
from lora_jax.peft.names._targets import target_of
from lora_jax.peft.torch._torch_model import TorchModel


def save(
    path: StrPath,
    frozen: chex.ArrayTree,
    adapters: chex.ArrayTree,
    *,
    names: str | Sequence[KeyMapping | tuple[Any, ...]] = "transformers",
    axes: Mapping[str, KernelAxes] | None = None,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    dtype: Any = None,
    collections: Mapping[str, chex.ArrayTree] | None = None,
) -> None:
    """Saves adapters so that ``PeftModel.from_pretrained`` loads them.

    What has no equal in PEFT is refused: LoRA and DoRA in one adapter, or rsLoRA and plain LoRA;
    different dropouts; parts of a module that are fully trained; a :class:`lora_jax.LoraBias` of
    anything but the biases of all adapted layers. A variant of your own is saved as the LoRA or the
    DoRA that computes the same, by its normal form. ``detach_norm`` changes no result and is not
    saved. What training changed besides
    the parameters, such as ``batch_stats``, has no place in PEFT's files: PEFT's model keeps its
    own, and where these differ, so do the outputs.

    Args:
      path: the folder; it is made where there is none. Other files in it stay.
      frozen: the base.
      adapters: the adapters, trained.
      names: as for :func:`load`.
      axes: as for :func:`load`; needed for convolutions and embeddings, where PEFT may compute
        something else than the model, and where leaves that are fully trained are stacked.
      base_model_name_or_path: the base in PyTorch, which PEFT's readers look up.
      task_type: one of PEFT's, such as ``"SEQ_CLS"``.
      dtype: of the saved arrays; by default the one that they have.
      collections: as for :func:`lora_jax.save`; refused where there are any.

    Raises:
      ValueError: if adapters do not fit the base, are not finite, or have no equal in PEFT; if no
        name is for a parameter.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, lora_jax
      >>> params = {"query": {"kernel": jnp.ones((3, 2))}}
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("query/kernel", rank=1)])
      >>> frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config)
      >>> folder = Path(tempfile.mkdtemp())
      >>> lora_jax.peft.save(folder, frozen, adapters)
      >>> sorted(file.name for file in folder.iterdir())
      ['adapter_config.json', 'adapter_model.safetensors']
    """
    if others := arrays_of(collections or {}):
        raise ValueError(
            f"PEFT's files have no place for {listed(others)}, which training changed: save the "
            f"adapters with lora_jax.save, or train with what the base has, as by "
            f"BatchNorm(use_running_average=True)."
        )
    base, found = named_pair(frozen, adapters, either=True)
    nodes = sort_nodes(found, base)
    adapter_axes = {p: adapter.axes for p, adapter in nodes.adapters.items()}
    model = TorchModel(base | nodes.fully_trained, as_names(names), axes, adapter_axes)

    adapted = adapted_parameters(nodes.adapters, model, str(path))
    modules = {target_of(torch): nodes.adapters[torch.path] for torch in adapted}
    tensors = adapter_tensors(nodes.adapters, adapted, model)
    tensors |= lora_bias_tensors(nodes.biases, model, modules)
    saved, bias = saved_parameters(model, nodes.fully_trained, modules)
    to_save = modules_to_save(model, {} if bias == "all" else saved, modules, task_type)
    tensors |= saved_tensors(saved, bias, model, modules, str(path))
    if dtype is not None:
        tensors = {name: array.astype(jnp.dtype(dtype)) for name, array in tensors.items()}
    config = config_of(modules, adapted) | {
        "base_model_name_or_path": base_model_name_or_path,
        "task_type": task_type,
        "bias": bias,
        "lora_bias": bool(nodes.biases),
        "modules_to_save": to_save or None,
        "exclude_modules": excluded(model, modules) or None,
    }
    text = json.dumps({**DEFAULTS, **config}, indent=2, sort_keys=True, allow_nan=False)
    _write(Path(path), text.encode(), encode(tensors, {"format": "pt"}))


def _write(folder: Path, config: bytes, tensors: bytes) -> None:
    """Writes the two files, so that no one ever reads one of the old and one of the new.

    Until the second is there, the folder has no config, unless it stays the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / CONFIG
    if file.exists() and file.read_bytes() != config:
        file.unlink()
    write_bytes(folder / WEIGHTS, tensors)
    write_bytes(file, config)
