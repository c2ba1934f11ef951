"""Trees as :mod:`lora_jax.peft` takes them, of adapters on disk whose model nobody has."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from lora_jax import peft, peft_files, store
from lora_jax.adapter import Adapter, Shift
from lora_jax.names import EXPERTS, Name, find
from lora_jax.tensors import StrPath


def nested(flat: Mapping[str, Any]) -> Any:
    """Leaves by their paths as nested dicts."""
    return unflatten_dict({tuple(path.split("/")): leaf for path, leaf in flat.items()})


def adapter(U: np.ndarray, V: np.ndarray) -> Adapter:
    """A LoRA adapter of a plain matrix, with ``s = 1``."""
    rank = U.shape[1]
    return Adapter(jnp.asarray(U), jnp.asarray(V), rank=rank, alpha=float(rank))


def kernel_shape(node: Adapter) -> tuple[int, ...]:
    """A shape that the kernel of an adapter may have: what several axes share stands in one."""
    axes, stack = node.axes, list(node.U.shape[:-2])
    shape = [1] * axes.ndim
    for axis, size in zip(axes.stacks, stack, strict=False):
        shape[axis] = size
    shape[axes.inputs[0]] = node.U.shape[-2]
    shape[axes.outputs[0]] = node.V.shape[-1] * axes.fused
    return tuple(shape)


def from_own(path: StrPath, names: Sequence[Name]) -> tuple[Any, Any]:
    """``(frozen, adapters)`` of an adapter of ours; the base is only shapes."""
    found = store.read(path).adapters_alone(path)
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
        elif isinstance(node, Shift):
            base[name] = jax.ShapeDtypeStruct(node.value.shape, jnp.float32)
    return nested(base), nested(found)


def from_peft(path: StrPath, names: Sequence[Name]) -> tuple[Any, Any]:
    """``(frozen, adapters)`` of an adapter of PEFT; the base is only shapes."""
    files = peft_files.read(path)
    base: dict[str, Any] = {}
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
        if name.axes is not None:
            shape = (k, d) if name.axes.inputs == (1,) else shape
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
    return peft.load(path, nested(base), names=names)


def _flax_path(torch: str, names: Sequence[Name], where: str) -> tuple[str, Name]:
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
