"""Adapters to and from PEFT, the format of PyTorch's world.

PEFT's ``lora_A`` is ``U`` transposed, its ``lora_B`` is ``V`` transposed, its
``lora_magnitude_vector`` is ``m``, and its scale is not stored but follows from the config.

    frozen, adapters = lora_jax.peft.load("my-adapter", params, axes=axes)
    lora_jax.peft.save("my-adapter", frozen, adapters)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np

from lora_jax.core._adapter import Adapter
from lora_jax.core._axes import KernelAxes
from lora_jax.core._fully_trained import FullyTrained
from lora_jax.files._bytes import StrPath, write_bytes
from lora_jax.files._collections import arrays_of, listed
from lora_jax.files._kinds import check_alone
from lora_jax.files._load import in_box
from lora_jax.files._paths import named_pair
from lora_jax.files._tensors import encode
from lora_jax.peft._config import CONFIG, DEFAULTS
from lora_jax.peft._files import PREFIX, WEIGHTS, read
from lora_jax.peft._lora_bias import LoraBias
from lora_jax.peft._names import EXPERTS, KeyMapping, Torch, as_names
from lora_jax.peft._reading import check_complete, sort_tensors, to_adapter, to_shift
from lora_jax.peft._targets import check_equal, nested_modules, target_of
from lora_jax.peft._torch_params import TorchParams
from lora_jax.peft._writing import (
    biases_of_B,
    config_of,
    excluded,
    from_adapter,
    modules_to_save,
    whole_modules,
)
from lora_jax.trees._leaves import check_floating
from lora_jax.trees._pair import base_of, check_pair
from lora_jax.trees._paths import path_of, unbox, unflatten


def load(
    path: StrPath,
    params: chex.ArrayTree,
    *,
    names: str | Sequence[KeyMapping | tuple[Any, ...]] = "transformers",
    axes: Mapping[str, KernelAxes] | None = None,
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """Loads an adapter that PEFT saved: as :func:`lora_jax.lora_init`, with trained adapters.

    Whatever the folder says is used or refused. Factors and magnitudes become float32, as PEFT
    makes them, and magnitudes of float64 kernels float64. DoRA's norm is detached in the gradient,
    as in PEFT. The biases of ``B`` (``lora_bias``) are each a :class:`lora_jax.LoraBias` of the
    layer's own bias.

    Args:
      path: the folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
      params: the model's ``params`` collection.
      names: a family of :data:`FAMILIES`, or a list of :class:`KeyMapping` (or of tuples of its
        fields), of which the first that fits a path counts. Of kernels that lie side by side in one
        (``{q|k|v}``) those are adapted that the files have.
      axes: from :func:`lora_jax.kernel_axes`; needed for kernels that are no matrices, for what is
        stacked, for square kernels that may be those of GPT-2's ``FlaxConv1D``, for embeddings that
        are saved whole, and to merge adapters of embeddings.

    Returns:
      ``(frozen, adapters)``; modules that PEFT saved whole, and trained biases, are only in
      ``adapters``.

    Raises:
      FileNotFoundError: there is no such adapter.
      ValueError: files that are damaged, do not fit the model, or hold what has no equal here. The
        message names the file and the key.
    """
    files = read(path)
    frozen = base_of(params, "params")
    keys = {path_of(key): key for key in frozen}
    model = TorchParams({p: frozen[key] for p, key in keys.items()}, as_names(names), axes)
    parts, whole, shifts = sort_tensors(files, model)
    check_complete(files, model, parts, whole, shifts)

    adapters: dict[Any, Any] = {}
    for leaf_path, ones in parts.items():
        adapter = to_adapter(leaf_path, ones, files, model)
        check_pair(keys[leaf_path], adapter, frozen, name="params")
        adapters[keys[leaf_path]] = adapter
    for leaf_path, arrays in whole.items():
        value = model.to_leaf(leaf_path, arrays, files.tensors.path)
        leaf = frozen.pop(keys[leaf_path])
        check_floating(leaf_path, leaf, "params has")
        dtype = jnp.dtype(unbox(leaf).dtype).name
        node = FullyTrained(jnp.asarray(value), None if dtype == value.dtype.name else dtype)
        adapters[keys[leaf_path]] = in_box(leaf_path, node, leaf, str(path)).as_leaf()
    for leaf_path, found in shifts.items():
        shift = to_shift(leaf_path, found, files, model)
        check_pair(keys[leaf_path], shift, frozen, name="params")
        adapters[keys[leaf_path]] = shift
    return unflatten(frozen, params), unflatten(adapters, params)


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
    anything but the biases of all adapted layers. How this library computes an adapter
    (``product``, ``detach_norm``) changes no result and is not saved. What training changed beside
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
      ValueError: adapters that do not fit the base, that are not finite, or that have no equal in
        PEFT; parameters that no name is for.
    """
    if others := arrays_of(collections or {}):
        raise ValueError(
            f"PEFT's files have no place for {listed(others)}, which training changed: save the "
            f"adapters with lora_jax.save, or train with what the base has, as by "
            f"BatchNorm(use_running_average=True)."
        )
    base, found = named_pair(frozen, adapters, either=True)
    kernels = {p: node for p, node in found.items() if isinstance(node, Adapter)}
    if not kernels:
        raise ValueError("adapters has no adapter of a kernel, and PEFT saves nothing else.")
    for leaf_path, adapter in kernels.items():
        check_alone(leaf_path, adapter)
    shifts = {p: node for p, node in found.items() if isinstance(node, LoraBias)}
    whole = [p for p in found if p not in kernels and p not in shifts]
    flat = base | {p: found[p].value for p in whole}
    own = {p: adapter.axes for p, adapter in kernels.items()}
    model = TorchParams(flat, as_names(names), axes, own)

    tensors: dict[str, np.ndarray] = {}
    modules: dict[str, Adapter] = {}
    torches: dict[Torch, tuple[int, ...]] = {}  # with their index in the adapter's arrays
    for leaf_path, adapter in kernels.items():
        for torch, index in model.adapted(leaf_path, adapter.axes).items():
            check_equal(torch, model, adapter.untied, str(path))
            if target_of(torch) in modules or not (
                torch.kind in EXPERTS or torch.name.endswith(".weight")
            ):
                raise ValueError(
                    f"names gives {leaf_path!r} the name {torch.name!r}, which another kernel has "
                    f"too, or which does not end in '.weight': PEFT adapts modules by weights."
                )
            modules[target_of(torch)] = adapter
            torches[torch] = index
    nested = nested_modules(torch for torch in torches if torch.kind in EXPERTS)
    keys = {torch: key for key, torch in nested.items()}
    for torch, index in torches.items():
        adapter, window = kernels[torch.path], model.window(torch.path, torch.kind)
        for name, array in from_adapter(adapter, torch, index, window).items():
            tensors[f"{PREFIX}{keys.get(torch, torch.module)}.{name}"] = array
    for torch in biases_of_B(shifts, model, modules):
        name = f"{PREFIX}{torch.module}.lora_B.bias"
        tensors[name] = model.from_leaf(torch, shifts[torch.path].value)
    saved, bias = whole_modules(model, whole, modules)
    to_save = modules_to_save(model, {} if bias == "all" else saved, modules, task_type)
    for torch in saved.values():
        check_equal(torch, model, None, str(path))
        layer = ".base_layer" if bias != "none" and torch.module in modules else ""
        array = model.from_leaf(torch)
        tensors[f"{PREFIX}{torch.module}{layer}.{torch.name.rpartition('.')[2]}"] = array
    if dtype is not None:
        tensors = {name: array.astype(jnp.dtype(dtype)) for name, array in tensors.items()}
    config = config_of(modules, list(torches)) | {
        "base_model_name_or_path": base_model_name_or_path,
        "task_type": task_type,
        "bias": bias,
        "lora_bias": bool(shifts),
        "modules_to_save": to_save or None,
        "exclude_modules": excluded(model, modules) or None,
    }
    said = json.dumps({**DEFAULTS, **config}, indent=2, sort_keys=True, allow_nan=False).encode()
    content = encode(tensors, {"format": "pt"})
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / CONFIG
    # There are two files, so that no one ever reads one of the old and one of the new: until the
    # second is there, the folder has no config, unless it stays the same.
    if file.exists() and file.read_bytes() != said:
        file.unlink()
    write_bytes(folder / WEIGHTS, content)
    write_bytes(file, said)
