"""Arrays of a model in PyTorch's layout, and back: stacked, fused and flat ones too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.files._to_host import host
from lora_jax.peft.names._key_mapping import EXPERTS
from lora_jax.peft.torch._layout import from_kernel, to_kernel
from lora_jax.peft.torch._torch_model import TorchModel, TorchParameter

# Kinds that are matrices in PyTorch, or stacks of them.
MATRICES = ("linear", "conv1d", *EXPERTS)


def to_leaf(
    model: TorchModel, path: str, arrays: Mapping[tuple[int, ...], np.ndarray], file: Path
) -> np.ndarray:
    """A leaf from PyTorch's layout, in float32 or more.

    Args:
      model: the model that has the leaf.
      path: its path.
      arrays: those of PyTorch, by their index in the stack.
      file: where they are from, for errors.

    Raises:
      ValueError: if the arrays do not fit.
    """
    torches = {torch.index: torch for torch in model.complete(path)}
    first = torches[min(torches)]
    shape, axes = model.shape(path), model.axes(path)
    try:
        stacked = np.stack([to_kernel(first.kind, arrays[index]) for index in sorted(torches)])
        if first.kind in MATRICES and axes is not None and axes.ndim == len(shape):
            matrix = stacked.reshape(*axes.batch_shape(shape), *axes.matrix_shape(shape))
            if stacked.shape[-2:] != matrix.shape[-2:]:
                raise ValueError
            # In NumPy as in JAX; from_matrix is for fused kernels.
            like = jnp.zeros(shape, matrix.dtype)
            out = np.asarray(axes.from_matrix(jnp.asarray(matrix), like))
        else:
            batch = model.batch_axes(path)
            rest = tuple(n for axis, n in enumerate(shape) if axis not in batch)
            flat = stacked.ndim == 2 and math.prod(rest) == stacked.shape[1]
            if stacked.shape[1:] != rest and not flat:  # a bias of several heads is flat
                raise ValueError
            out = stacked.reshape(*model.stack(path), *rest)
            out = np.moveaxis(out, range(len(batch)), batch)
    except (ValueError, TypeError):
        raise ValueError(
            f"{file}: {first.name!r} is {arrays[first.index].shape}, which does not fit "
            f"{path!r} of shape {shape}."
        ) from None
    return out if out.dtype.itemsize >= 4 else out.astype(np.float32)


def from_leaf(model: TorchModel, torch: TorchParameter, leaf: Any = None) -> np.ndarray:
    """One of PyTorch's arrays of a leaf of the model, or of another one in its place."""
    leaf = model.leaves[torch.path] if leaf is None else leaf
    array, axes = host(leaf, torch.path), model.axes(torch.path)
    if torch.kind in MATRICES and axes is not None and axes.ndim == array.ndim:
        array = np.asarray(axes.as_matrix(jnp.asarray(array)))
    else:
        batch = model.batch_axes(torch.path)
        array = np.moveaxis(array, batch, range(len(batch)))
    array = from_kernel(torch.kind, array[torch.index])
    return array.reshape(-1) if torch.name.endswith(".bias") else array


def torch_shape(model: TorchModel, torch: TorchParameter) -> tuple[int, ...]:
    """The shape that a parameter has in PyTorch."""
    shape, axes = model.shape(torch.path), model.axes(torch.path)
    if torch.kind in MATRICES and axes is not None and axes.ndim == len(shape):
        one = (*model.stack(torch.path)[len(torch.index) :], *axes.matrix_shape(shape))
    else:
        batch = model.batch_axes(torch.path)
        one = tuple(n for axis, n in enumerate(shape) if axis not in batch)
    if torch.name.endswith(".bias"):
        return (math.prod(one),)
    return tuple(from_kernel(torch.kind, np.broadcast_to(np.zeros(()), one)).shape)
