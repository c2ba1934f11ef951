"""Trees as :mod:`lora_jax.peft` takes them, of adapters on disk whose model nobody has."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from lora_jax import peft
from lora_jax.cli._layouts import kinds_of
from lora_jax.core._adapter import Adapter
from lora_jax.core._axes import KernelAxes
from lora_jax.files._bytes import StrPath
from lora_jax.files._read import read
from lora_jax.peft import _files as peft_files
from lora_jax.peft._lora_bias import LoraBias
from lora_jax.peft._names import CONV1D, CONV1D_LAYERS, EXPERTS, KeyMapping, find
from lora_jax.peft._torch_params import TorchParams
from lora_jax.trees._paths import flatten, path_of


def nested(flat: Mapping[str, Any]) -> Any:
    """Leaves by their paths as nested dicts."""
    return unflatten_dict({tuple(path.split("/")): leaf for path, leaf in flat.items()})


def adapter(U: np.ndarray, V: np.ndarray, axes: KernelAxes) -> Adapter:
    """A LoRA adapter of a matrix, with ``s = 1``."""
    rank = U.shape[1]
    return Adapter(jnp.asarray(U), jnp.asarray(V), rank=rank, alpha=float(rank), axes=axes)


def kernel_shape(node: Adapter) -> tuple[int, ...]:
    """A shape that the kernel of an adapter may have: what several axes share stands in one."""
    axes, stack = node.axes, list(node.U.shape[:-2])
    shape = [1] * axes.ndim
    for axis, size in zip(axes.batch, stack, strict=False):
        shape[axis] = size
    shape[axes.inputs[0]] = node.U.shape[-2]
    shape[axes.outputs[0]] = node.V.shape[-1] * axes.fused
    return tuple(shape)


def from_own(path: StrPath, names: Sequence[KeyMapping]) -> tuple[Any, Any, dict[str, KernelAxes]]:
    """``(frozen, adapters)`` of an adapter of ours, and its axes; the base is only shapes."""
    found = read(path).adapters_alone(path)
    base = {}
    for name, node in found.items():
        if isinstance(node, Adapter):
            its = find(name, names)
            if len(node.axes.inputs) > 1 and its is not None and its.kind in ("conv", "weight"):
                raise ValueError(
                    f"{path}: {name!r} may be a convolution, whose window is not in the files: "
                    f"convert it in Python, with lora_jax.peft.save and the model."
                )
            base[name] = jax.ShapeDtypeStruct(kernel_shape(node), jnp.float32)
        elif isinstance(node, LoraBias):
            base[name] = jax.ShapeDtypeStruct(node.value.shape, jnp.float32)
    axes = {name: node.axes for name, node in found.items() if isinstance(node, Adapter)}
    return nested(base), nested(found), axes


def _kinds(
    frozen: Any, names: Sequence[KeyMapping], axes: Mapping[str, KernelAxes]
) -> dict[str, str]:
    """How PyTorch stores what an adapter of ours is for, by PyTorch's names."""
    leaves = {path_of(key): leaf for key, leaf in flatten(frozen, "frozen").items()}
    model = TorchParams(leaves, names, axes, axes)
    return {torch.name: torch.kind for path in axes for torch in model.torch(path)}


def as_peft(
    path: StrPath, names: Sequence[KeyMapping], scratch: StrPath
) -> tuple[peft_files.PeftFiles, dict[str, str]]:
    """An adapter of ours in PEFT's format, and how PyTorch stores what it is for.

    Args:
      path: the adapter's folder.
      names: those of its parameters.
      scratch: an empty folder, in which it is written; no message names it.

    Raises:
      ValueError: it has no equal in PEFT, as far as can be known without its model.
    """
    frozen, tree, axes = from_own(path, names)
    try:
        peft.save(scratch, frozen, tree, names=names, axes=axes)
    except ValueError as error:
        said = str(error).replace(str(scratch), str(path))
        asks = " Only Python has the model: there lora_jax.export merges it."
        raise ValueError(said + (asks if "axes=" in said else "")) from None
    files = peft_files.read(scratch)
    files.tensors.path = Path(path)
    return files, _kinds(frozen, names, axes)


def from_peft(path: StrPath, names: Sequence[KeyMapping]) -> tuple[Any, Any]:
    """``(frozen, adapters)`` of an adapter of PEFT; the base is only shapes."""
    files = peft_files.read(path)
    base: dict[str, Any] = {}
    axes: dict[str, KernelAxes] = {}
    for module, keys in files.modules.items():
        info = files.tensors.info
        A, B = info[keys["A"]].shape, info[keys["B"]].shape
        if "bias" in keys:
            flax, _ = _flax_path(f"{module}.bias", names, str(path))
            base[flax] = jax.ShapeDtypeStruct(info[keys["bias"]].shape, jnp.float32)
        flax, name = _flax_path(f"{module}.weight", names, str(path))
        if name.counted or name.kind in EXPERTS:
            raise ValueError(
                f"{path}: {flax!r} stacks kernels, and which axis that is only the model says: "
                f"load it in Python, with lora_jax.peft.load and axes=."
            )
        window, d, k = A[2:], A[1], B[0]
        shape = (*window, d, k)
        if name.kind == "weight" and not window:
            axes[flax] = _axes_in(files, module, flax)
        if axes.get(flax, name.axes) == CONV1D:
            shape = (k, d)
        base[flax] = jax.ShapeDtypeStruct(shape, jnp.float32)
    for name_, key in files.whole.items():
        flax, name = _flax_path(name_.replace(".base_layer", ""), names, str(path))
        one = files.tensors.info[key]
        shape = (
            one.shape[::-1]
            if name.kind in ("linear", "weight") and len(one.shape) == 2
            else one.shape
        )
        if len(one.shape) > 2:
            raise ValueError(f"{path}: {key!r} has {len(one.shape)} axes: load it in Python.")
        base[flax] = np.zeros(shape, np.float32)
    return peft.load(path, nested(base), names=names, axes=axes)


def _axes_in(files: peft_files.PeftFiles, module: str, flax: str) -> KernelAxes:
    """The axes that Flax's kernel has, by what an adapter of PEFT says of its model."""
    layer, config = module.rpartition(".")[2], files.config
    if layer not in CONV1D_LAYERS:
        return KernelAxes()
    said = kinds_of({config.package}, layer)
    if not said and config.fan_in_fan_out:
        said = {"conv1d"}  # no model calls both classes so
    if not said and all(m.rpartition(".")[2] in CONV1D_LAYERS for m in files.modules):
        said = {"linear"}
    if not said:
        raise ValueError(
            f"{files.tensors.path}: {module!r} may be a Conv1D, as in GPT-2, or a linear layer, as "
            f"in GPT-Neo, and only the model says how Flax stores {flax!r}. Load it in Python, "
            f"with lora_jax.peft.load and axes=, or give --names that say its kind."
        )
    return CONV1D if said == {"conv1d"} else KernelAxes()


def _flax_path(torch: str, names: Sequence[KeyMapping], where: str) -> tuple[str, KeyMapping]:
    """The path in Flax that a name in PyTorch is of: the first of names that fits."""
    for name in names:
        parts = re.split(r"\{([^{}]*)\}", name.torch)
        pattern = "".join(
            re.escape(part) if i % 2 == 0 else ("(.+)" if part.endswith("*") else r"([^.]+)")
            for i, part in enumerate(parts)
        )
        found = re.fullmatch(pattern, torch)
        if found:
            values = dict(zip(parts[1::2], found.groups(), strict=True))
            fill = {key: value.replace(".", "/") for key, value in values.items()}
            pieces = re.split(r"\{([^{}]*)\}", name.flax)
            path = "".join(fill[p] if i % 2 else p for i, p in enumerate(pieces))
            return path, name
    raise ValueError(f"{where}: no name is for {torch!r}: give --names.")
