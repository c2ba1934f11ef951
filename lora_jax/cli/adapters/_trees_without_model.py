"""Trees for :mod:`lora_jax.peft` of adapters on disk, without their model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from lora_jax import peft
from lora_jax.cli.base._layouts import kinds_of
from lora_jax.core._adapter import Adapter
from lora_jax.core._axes import KernelAxes
from lora_jax.core._fully_trained import as_node
from lora_jax.files._bytes import StrPath
from lora_jax.files._read_folder import read as read_lora_jax
from lora_jax.peft._folder import PeftFiles, read
from lora_jax.peft.names._key_mapping import EXPERTS, KeyMapping, find, find_by_torch
from lora_jax.peft.names._keys import without_base_layer
from lora_jax.peft.torch._layout import CONV1D, CONV1D_LAYERS
from lora_jax.peft.torch._torch_model import TorchModel
from lora_jax.trees._paths import flatten, path_of


def nested(flat: Mapping[str, Any]) -> Any:
    """Leaves by their paths as nested dicts."""
    return unflatten_dict({tuple(path.split("/")): leaf for path, leaf in flat.items()})


def lora_adapter(U: np.ndarray, V: np.ndarray, axes: KernelAxes) -> Adapter:
    """A LoRA adapter of a matrix, with ``s = 1``."""
    rank = U.shape[1]
    return Adapter(jnp.asarray(U), jnp.asarray(V), rank=rank, alpha=float(rank), axes=axes)


def kernel_shape(node: Adapter) -> tuple[int, ...]:
    """A shape that the kernel of an adapter may have: what several axes share stands in one."""
    axes, shape = node.axes, [1] * node.axes.ndim
    for axis, size in zip(axes.batch, node.U.shape[:-2], strict=False):
        shape[axis] = size
    shape[axes.inputs[0]] = node.U.shape[-2]
    shape[axes.outputs[0]] = node.V.shape[-1] * axes.fused
    return tuple(shape)


def trees_of_lora_jax(
    path: StrPath, names: Sequence[KeyMapping]
) -> tuple[Any, Any, dict[str, KernelAxes]]:
    """``(frozen, adapters)`` of an adapter of lora_jax, and its axes; the base is only shapes.

    Raises:
      ValueError: if only the model knows a shape.
    """
    found = read_lora_jax(path).adapters_alone(path)
    base = {}
    for name, leaf in found.items():
        node = as_node(leaf)
        if isinstance(node, Adapter):
            mapping = find(name, names)
            maybe_conv = mapping is not None and mapping.kind in ("conv", "weight")
            if len(node.axes.inputs) > 1 and maybe_conv:
                raise ValueError(
                    f"{path}: {name!r} may be a convolution, whose window is not in the files: "
                    f"convert it in Python, with lora_jax.peft.save and the model."
                )
            base[name] = jax.ShapeDtypeStruct(kernel_shape(node), jnp.float32)
        elif node.in_base:
            (array,) = node.arrays.values()
            base[name] = jax.ShapeDtypeStruct(array.shape, jnp.float32)
    axes = {name: node.axes for name, node in found.items() if isinstance(node, Adapter)}
    return nested(base), nested(found), axes


def _kinds(
    frozen: Any, names: Sequence[KeyMapping], axes: Mapping[str, KernelAxes]
) -> dict[str, str]:
    """How PyTorch stores what an adapter of lora_jax is for, by PyTorch's names."""
    leaves = {path_of(key): leaf for key, leaf in flatten(frozen, "frozen").items()}
    model = TorchModel(leaves, names, axes, axes)
    return {torch.name: torch.kind for path in axes for torch in model.torch(path)}


def as_peft(
    path: StrPath, names: Sequence[KeyMapping], scratch: StrPath
) -> tuple[PeftFiles, dict[str, str]]:
    """An adapter of lora_jax in PEFT's format, and how PyTorch stores what it is for.

    Args:
      path: the adapter's folder.
      names: those of its parameters.
      scratch: an empty folder, in which it is written; no message names it.

    Raises:
      ValueError: if it has no equal in PEFT, as far as can be known without its model.
    """
    frozen, tree, axes = trees_of_lora_jax(path, names)
    try:
        peft.save(scratch, frozen, tree, names=names, axes=axes)
    except ValueError as error:
        message = str(error).replace(str(scratch), str(path))
        instead = " Only Python has the model: there lora_jax.export merges it."
        raise ValueError(message + (instead if "axes=" in message else "")) from None
    files = read(scratch)
    files.tensors.path = Path(path)
    return files, _kinds(frozen, names, axes)


def trees_of_peft(path: StrPath, names: Sequence[KeyMapping]) -> tuple[Any, Any]:
    """``(frozen, adapters)`` of an adapter of PEFT; the base is only shapes.

    Raises:
      ValueError: if no name is for a parameter, or only the model knows how Flax stores it.
    """
    files = read(path)
    base: dict[str, Any] = {}
    axes: dict[str, KernelAxes] = {}
    for module, keys in files.modules.items():
        info = files.tensors.info
        A, B = info[keys["A"]].shape, info[keys["B"]].shape
        if "bias" in keys:
            flax, _ = _flax_path(f"{module}.bias", names, path)
            base[flax] = jax.ShapeDtypeStruct(info[keys["bias"]].shape, jnp.float32)
        flax, mapping = _flax_path(f"{module}.weight", names, path)
        if mapping.counted or mapping.kind in EXPERTS:
            raise ValueError(
                f"{path}: {flax!r} stacks kernels, and which axis that is only the model says: "
                f"load it in Python, with lora_jax.peft.load and axes=."
            )
        window, d, k = A[2:], A[1], B[0]
        shape = (*window, d, k)
        if mapping.kind == "weight" and not window:
            axes[flax] = _axes_in(files, module, flax)
        if axes.get(flax, mapping.axes) == CONV1D:
            shape = (k, d)
        base[flax] = jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, key in files.parameters.items():
        flax, mapping = _flax_path(without_base_layer(name), names, path)
        shape = files.tensors.info[key].shape
        if len(shape) > 2:
            raise ValueError(f"{path}: {key!r} has {len(shape)} axes: load it in Python.")
        transposed = mapping.kind in ("linear", "weight") and len(shape) == 2
        base[flax] = np.zeros(shape[::-1] if transposed else shape, np.float32)
    return peft.load(path, nested(base), names=names, axes=axes)


def _axes_in(files: PeftFiles, module: str, flax: str) -> KernelAxes:
    """The axes that Flax's kernel has, by what an adapter of PEFT says of its model."""
    layer, config = module.rpartition(".")[2], files.config
    if layer not in CONV1D_LAYERS:
        return KernelAxes()
    kinds = kinds_of({config.package}, layer)
    if not kinds and config.fan_in_fan_out:
        kinds = {"conv1d"}  # no model calls both classes so
    if not kinds and all(m.rpartition(".")[2] in CONV1D_LAYERS for m in files.modules):
        kinds = {"linear"}
    if not kinds:
        raise ValueError(
            f"{files.tensors.path}: {module!r} may be a Conv1D, as in GPT-2, or a linear layer, as "
            f"in GPT-Neo, and only the model says how Flax stores {flax!r}. Load it in Python, "
            f"with lora_jax.peft.load and axes=, or give --names that say its kind."
        )
    return CONV1D if kinds == {"conv1d"} else KernelAxes()


def _flax_path(torch: str, names: Sequence[KeyMapping], path: StrPath) -> tuple[str, KeyMapping]:
    """The path in Flax that a name in PyTorch is of: the first of names that fits."""
    found = find_by_torch(torch, names)
    if found is None:
        raise ValueError(f"{path}: no name is for {torch!r}: give --names.")
    return found
