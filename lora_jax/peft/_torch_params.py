"""The parameters of a Flax model, and the PyTorch ones that they are."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import empty_node

from lora_jax._compat import GPT2_CONV1D
from lora_jax.core._axes import KernelAxes
from lora_jax.core._model_axes import ModelAxes
from lora_jax.files._host import host
from lora_jax.peft._names import (
    CONV1D,
    CONV1D_LAYERS,
    EXPERTS,
    KeyMapping,
    Torch,
    find,
    torch_names,
)
from lora_jax.peft._torch_layout import from_kernel, output_axis, to_kernel
from lora_jax.trees._paths import unbox

# Kinds that are matrices in PyTorch, or stacks of them.
MATRICES = ("linear", "conv1d", *EXPERTS)

# Classes of layers, by which PyTorch's are known.
_CONV1D = GPT2_CONV1D.rpartition(".")[0]
_DENSE_GENERAL = "flax.linen.linear.DenseGeneral"


class TorchParams:
    """The parameters of a Flax model, and the PyTorch ones that they are.

    Args:
      leaves: the parameters by their paths.
      names: their names in PyTorch.
      axes: those of the model's kernels, where they are known.
      own: axes that an adapter has, which come first.
    """

    def __init__(
        self,
        leaves: Mapping[str, Any],
        names: Sequence[KeyMapping],
        axes: Mapping[str, KernelAxes] | None,
        own: Mapping[str, KernelAxes] | None = None,
    ) -> None:
        self.leaves = {p: unbox(leaf) for p, leaf in leaves.items() if leaf is not empty_node}
        self._names, self._axes, self._own = names, axes, own or {}
        self.model_axes = axes if isinstance(axes, ModelAxes) else None
        self._torch: dict[str, list[Torch]] = {}
        self._by_name: dict[str, Torch] | None = None

    def shape(self, path: str) -> tuple[int, ...]:
        """Shape of a leaf."""
        return tuple(self.leaves[path].shape)

    def axes(self, path: str) -> KernelAxes | None:
        """How a leaf is a matrix, where it is one; of fused kernels, all parts that have a name."""
        own, said = self._own.get(path), self._said(path)
        axes = own or said or self._plain(path)
        if axes is None or axes.fused == 1:
            return axes
        # Which of them are adapted, the adapter says; here it is those that the name counts.
        name = find(path, self._names)
        count = len(name.counted[-1].split("|")) if name is not None and name.counted else 0
        for one in (said, own):
            if one is not None and one.fused == axes.fused and len(one.parts) == count:
                return dataclasses.replace(axes, parts=one.parts)
        return dataclasses.replace(axes, parts=()) if count == axes.fused else axes

    def _said(self, path: str) -> KernelAxes | None:
        """The axes that the model or a name says, or that follow from the class of the layer."""
        name = find(path, self._names)
        if name is not None and name.axes is not None and name.axes.fused > 1:
            return name.axes  # which the model does not know
        if self._axes is not None and path in self._axes:
            return self._axes[path]
        if name is not None and name.axes is not None:
            return name.axes
        return CONV1D if self._may_be_conv1d(path) and self._layer(path) == "conv1d" else None

    def _plain(self, path: str) -> KernelAxes | None:
        """The axes of a plain matrix, or of a convolution, of which nothing is said."""
        name, ndim = find(path, self._names), len(self.shape(path))
        if ndim > 2 and name is not None and name.kind in ("conv", "weight"):
            return KernelAxes(tuple(range(ndim - 1)), (ndim - 1,))
        plain = name is not None and name.kind in ("plain", "unused")
        return KernelAxes() if ndim == 2 and not plain else None

    def _may_be_conv1d(self, path: str) -> bool:
        """Whether PyTorch may have a ``Conv1D`` for it, as far as its name says."""
        name = find(path, self._names)
        return name is not None and name.kind in ("weight", "conv1d")

    def _kind(self, path: str) -> str:
        """How PyTorch stores a leaf; empty without a name."""
        name = find(path, self._names)
        if name is None or name.kind != "weight":
            return "" if name is None else name.kind
        # FullyTrained, FlaxConv1D and linear layers alike are PyTorch's transposed.
        return self._layer(path) or "linear"

    def _layer(self, path: str) -> str:
        """The kind that follows from the layer of a kernel; empty where nothing says it.

        Its class decides. Where that is not known, the bias does, which every ``Conv1D`` of PyTorch
        has; a name alone never.
        """
        name, shape = find(path, self._names), self.shape(path)
        model, above = self.model_axes, path.rpartition("/")[0]
        layer = "" if model is None else model.layers.get(path, "")
        said = (self._axes or {}).get(path) or (name.axes if name else None)
        axes = said or self._own.get(path)
        stacks = axes.batch if axes else () if model is None else model.batch.get(path, ())
        if len(shape) - len(stacks) > 2:
            return "linear" if layer == _DENSE_GENERAL else "conv"
        if layer == _CONV1D:
            return "conv1d"
        either = above.rpartition("/")[2] in CONV1D_LAYERS
        if axes is not None and axes.inputs > axes.outputs:
            return "linear" if not either else "" if layer else "conv1d"
        bias = self.leaves.get(f"{above}/bias")
        if said is not None or layer.startswith("flax.") or bias is None or len(shape) != 2:
            return "linear"
        outputs = output_axis(shape, tuple(bias.shape))
        if outputs is None and either:
            return ""
        return "conv1d" if outputs == 0 else "linear"

    def batch_axes(self, path: str) -> tuple[int, ...]:
        """The axes that stack a leaf, where that is known."""
        axes = self.axes(path)
        if axes is not None and axes.ndim == len(self.shape(path)):
            return axes.batch
        if isinstance(self._axes, ModelAxes):
            return tuple(self._axes.batch.get(path, ()))
        return ()

    def stack(self, path: str) -> tuple[int, ...]:
        """Sizes of what is stacked in a leaf; kernels side by side come last."""
        axes = self.axes(path)
        if axes is not None and axes.ndim == len(self.shape(path)):
            return axes.batch_shape(self.shape(path))
        return tuple(self.shape(path)[axis] for axis in self.batch_axes(path))

    def window(self, path: str, kind: str) -> tuple[int, ...]:
        """The window of a convolution; empty for what is none."""
        if kind != "conv":
            return ()
        shape, stacks = self.shape(path), self.batch_axes(path)
        return tuple(n for axis, n in enumerate(shape) if axis not in stacks)[:-2]

    def torch(self, path: str) -> list[Torch]:
        """PyTorch's parameters for a leaf.

        Raises:
          ValueError: no name is for it.
        """
        if path not in self._torch:
            found = self._found(path)
            if not found:
                raise ValueError(
                    f"names has no name in PyTorch for {path!r}: add a lora_jax.peft.KeyMapping "
                    "for it."
                )
            self._torch[path] = found
        return self._torch[path]

    def _found(self, path: str) -> list[Torch]:
        return list(torch_names(path, self._kind(path), self.stack(path), self._names))

    def check_orientation(self, path: str) -> None:
        """Errors where it is not known which axis of an adapted kernel are its inputs.

        Raises:
          ValueError: nothing says it, or the adapter has them the other way round.
        """
        own, said = self._own.get(path), self._said(path)
        if own and said and own.batch == said.batch and own.inputs == said.outputs:
            raise ValueError(
                f"{path!r} has an adapter with inputs {own.inputs} and outputs {own.outputs}, but "
                f"its layer has inputs {said.inputs} and outputs {said.outputs}: make the adapter "
                f"with lora_init(..., axes=lora_jax.kernel_axes(...))."
            )
        name = find(path, self._names)
        decided = said and name and name.kind != "weight"
        if self._may_be_conv1d(path) and not (decided or self._layer(path)):
            raise ValueError(
                f"{path!r} of shape {self.shape(path)} may be of a FlaxConv1D, as GPT-2's, which "
                f"stores (out, in), or of a linear layer, as GPT-Neo's, that stores (in, out). Its "
                f"name does not say it. Pass axes=lora_jax.kernel_axes(...) or, for a class of "
                f"your own, names= with a lora_jax.peft.KeyMapping that says its kind and axes."
            )

    def complete(self, path: str) -> list[Torch]:
        """PyTorch's parameters for a leaf, which together are all of it.

        Raises:
          ValueError: no name is for it, or for some of the kernels that are fused in it; or it is
            not known whether it is a ``Conv1D``, where that matters.
        """
        axes = self.axes(path)
        if axes is not None and axes.fused > len(axes.parts):
            raise ValueError(
                f"{path!r} has {axes.fused} kernels side by side, of which names names "
                f"{len(axes.parts)}: name all of them, as {{q|k|v}} does."
            )
        if self._said(path) is not None or self._kind(path) == "conv1d":
            self.check_orientation(path)
        return self.torch(path)

    def adapted(self, path: str, axes: KernelAxes) -> dict[Torch, tuple[int, ...]]:
        """PyTorch's parameters that an adapter is for, with their index in its arrays.

        Args:
          path: the kernel's.
          axes: the adapter's; of fused kernels it may have some.

        Raises:
          ValueError: no name is for one of them.
        """
        named = self.axes(path)
        if axes.fused == 1 or named is None:
            return {torch: torch.index for torch in self.torch(path)}
        if lost := sorted(set(axes.parts) - set(named.parts)):
            raise ValueError(
                f"names has no name in PyTorch for part {lost[0]} of {path!r}: name all parts that "
                f"are adapted, as {{q|k|v}} does."
            )
        places = {torch: named.parts[torch.index[-1]] for torch in self.torch(path)}
        return {
            torch: (*torch.index[:-1], axes.parts.index(part))
            for torch, part in places.items()
            if part in axes.parts
        }

    @property
    def by_name(self) -> Mapping[str, Torch]:
        """All that have a name, by it."""
        if self._by_name is None:
            self._by_name = {}
            for path, leaf in self.leaves.items():
                if hasattr(leaf, "shape"):
                    for torch in self._found(path):
                        if torch.name in self._by_name:
                            other = self._by_name[torch.name].path
                            raise ValueError(
                                f"names gives {path!r} and {other!r} one name: {torch.name!r}."
                            )
                        self._by_name[torch.name] = torch
        return self._by_name

    def untied(self, path: str, kind: str) -> bool:
        """Whether others read the parameter too, who keep the base as they do in PEFT."""
        if self.model_axes is None:
            return kind == "embedding"
        return path in self.model_axes.tied or (
            kind == "embedding" and path in self.model_axes.shared
        )

    def modules(self) -> set[str]:
        """PyTorch's modules of kernels, as far as their names are known."""
        found = set()
        for path in self.leaves:
            with contextlib.suppress(ValueError):
                found |= {
                    torch.module
                    for torch in self._found(path)
                    if torch.kind not in ("plain", *EXPERTS) and torch.name.endswith(".weight")
                }
        return found

    def to_leaf(
        self, path: str, arrays: Mapping[tuple[int, ...], np.ndarray], file: Path
    ) -> np.ndarray:
        """A leaf from PyTorch's layout.

        Args:
          path: its path.
          arrays: those of PyTorch, by their index in the stack.
          file: where they are from, for errors.

        Raises:
          ValueError: arrays that do not fit.
        """
        torches = {torch.index: torch for torch in self.complete(path)}
        first = torches[min(torches)]
        shape, axes = self.shape(path), self.axes(path)
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
                stacks = self.batch_axes(path)
                rest = tuple(n for axis, n in enumerate(shape) if axis not in stacks)
                flat = stacked.ndim == 2 and math.prod(rest) == stacked.shape[1]
                if stacked.shape[1:] != rest and not flat:  # a bias of several heads is flat
                    raise ValueError
                out = stacked.reshape(*self.stack(path), *rest)
                out = np.moveaxis(out, range(len(stacks)), stacks)
        except (ValueError, TypeError):
            raise ValueError(
                f"{file}: {first.name!r} is {arrays[first.index].shape}, which does not fit "
                f"{path!r} of shape {shape}."
            ) from None
        return out if out.dtype.itemsize >= 4 else out.astype(np.float32)

    def torch_shape(self, torch: Torch) -> tuple[int, ...]:
        """The shape that a parameter has in PyTorch."""
        shape, axes = self.shape(torch.path), self.axes(torch.path)
        if torch.kind in MATRICES and axes is not None and axes.ndim == len(shape):
            one = (*self.stack(torch.path)[len(torch.index) :], *axes.matrix_shape(shape))
        else:
            stacks = self.batch_axes(torch.path)
            one = tuple(n for axis, n in enumerate(shape) if axis not in stacks)
        if torch.name.endswith(".bias"):
            return (math.prod(one),)
        return tuple(from_kernel(torch.kind, np.broadcast_to(np.zeros(()), one)).shape)

    def from_leaf(self, torch: Torch, leaf: Any = None) -> np.ndarray:
        """One of PyTorch's arrays of a leaf, or of another in its place."""
        leaf = self.leaves[torch.path] if leaf is None else leaf
        array, axes = host(leaf, torch.path), self.axes(torch.path)
        if torch.kind in MATRICES and axes is not None and axes.ndim == array.ndim:
            array = np.asarray(axes.as_matrix(jnp.asarray(array)))
        else:
            stacks = self.batch_axes(torch.path)
            array = np.moveaxis(array, stacks, range(len(stacks)))
        array = from_kernel(torch.kind, array[torch.index])
        return array.reshape(-1) if torch.name.endswith(".bias") else array
