"""The parameters of a Flax model: how each is a matrix, and how PyTorch stores it.

A kernel of two axes is ``(in, out)`` in ``nn.Dense``, and ``(out, in)`` in the ``FlaxConv1D`` of
GPT-2; in PyTorch each is the transpose. Which one it is, the axes, the class of the layer or its
bias say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import empty_node

from lora_jax._compat import GPT2_CONV1D
from lora_jax.core._axes import KernelAxes
from lora_jax.core._boxes import content
from lora_jax.core._model_axes import ModelAxes
from lora_jax.peft.names._key_mapping import KeyMapping, find
from lora_jax.peft.torch._layout import CONV1D, CONV1D_LAYERS, output_axis

# Classes of layers, by which PyTorch's are known.
_CONV1D_CLASS = GPT2_CONV1D.rpartition(".")[0]
_DENSE_GENERAL = "flax.linen.linear.DenseGeneral"


class FlaxModel:
    """The parameters of a Flax model.

    Args:
      leaves: the parameters by their paths.
      names: their names in PyTorch, with the kinds that they say.
      axes: those of the model's kernels, where they are known.
      adapter_axes: axes that adapters have, which come first.
    """

    def __init__(
        self,
        leaves: Mapping[str, Any],
        names: Sequence[KeyMapping],
        axes: Mapping[str, KernelAxes] | None,
        adapter_axes: Mapping[str, KernelAxes] | None = None,
    ) -> None:
        self.leaves = {p: content(leaf) for p, leaf in leaves.items() if leaf is not empty_node}
        self.names, self._axes, self._adapter_axes = names, axes, adapter_axes or {}
        self.model_axes = axes if isinstance(axes, ModelAxes) else None

    def shape(self, path: str) -> tuple[int, ...]:
        """Shape of a leaf."""
        return tuple(self.leaves[path].shape)

    def axes(self, path: str) -> KernelAxes | None:
        """How a leaf is a matrix, where it is one; of fused kernels, all parts that have a name."""
        of_adapter, stated = self._adapter_axes.get(path), self.stated_axes(path)
        axes = of_adapter or stated or self._plain_axes(path)
        if axes is None or axes.fused == 1:
            return axes
        # Which of them are adapted, the adapter says; here it is those that the name counts.
        name = find(path, self.names)
        count = len(name.counted[-1].split("|")) if name is not None and name.counted else 0
        for one in (stated, of_adapter):
            if one is not None and one.fused == axes.fused and len(one.parts) == count:
                return dataclasses.replace(axes, parts=one.parts)
        return dataclasses.replace(axes, parts=()) if count == axes.fused else axes

    def stated_axes(self, path: str) -> KernelAxes | None:
        """The axes that the model or a name states, or that follow from the class of the layer."""
        name = find(path, self.names)
        if name is not None and name.axes is not None and name.axes.fused > 1:
            return name.axes  # which the model does not know
        if self._axes is not None and path in self._axes:
            return self._axes[path]
        if name is not None and name.axes is not None:
            return name.axes
        return CONV1D if self._may_be_conv1d(path) and self._layer_kind(path) == "conv1d" else None

    def _plain_axes(self, path: str) -> KernelAxes | None:
        """The axes of a plain matrix, or of a convolution, for which nothing states them."""
        name, ndim = find(path, self.names), len(self.shape(path))
        if ndim > 2 and name is not None and name.kind in ("conv", "weight"):
            return KernelAxes(tuple(range(ndim - 1)), (ndim - 1,))
        plain = name is not None and name.kind in ("plain", "unused")
        return KernelAxes() if ndim == 2 and not plain else None

    def batch_axes(self, path: str) -> tuple[int, ...]:
        """The batch axes of a leaf, where they are known: layers of a scan, experts."""
        axes = self.axes(path)
        if axes is not None and axes.ndim == len(self.shape(path)):
            return axes.batch
        return () if self.model_axes is None else tuple(self.model_axes.batch.get(path, ()))

    def stack(self, path: str) -> tuple[int, ...]:
        """Sizes of what is stacked in a leaf; kernels side by side come last."""
        axes = self.axes(path)
        if axes is not None and axes.ndim == len(self.shape(path)):
            return axes.batch_shape(self.shape(path))
        return tuple(self.shape(path)[axis] for axis in self.batch_axes(path))

    def window(self, path: str, kind: str) -> tuple[int, ...]:
        """The window of a convolution; empty for other kinds."""
        if kind != "conv":
            return ()
        shape, batch = self.shape(path), self.batch_axes(path)
        return tuple(n for axis, n in enumerate(shape) if axis not in batch)[:-2]

    def untied(self, path: str, kind: str) -> bool:
        """Whether others read the parameter too, who keep the base as they do in PEFT."""
        if self.model_axes is None:
            return kind == "embedding"
        return path in self.model_axes.tied or (
            kind == "embedding" and path in self.model_axes.shared
        )

    def kind(self, path: str) -> str:
        """How PyTorch stores a leaf, as in :class:`KeyMapping`; empty without a name."""
        name = find(path, self.names)
        if name is None or name.kind != "weight":
            return "" if name is None else name.kind
        # Where nothing says which: FlaxConv1D and linear layers alike are PyTorch's transposed.
        return self._layer_kind(path) or "linear"

    def _may_be_conv1d(self, path: str) -> bool:
        """Whether PyTorch may have a ``Conv1D`` for it, as far as its name says."""
        name = find(path, self.names)
        return name is not None and name.kind in ("weight", "conv1d")

    def _layer_kind(self, path: str) -> str:
        """The kind that follows from the layer of a kernel; empty where nothing says it.

        Its class decides. Where that is not known, the bias does, which every ``Conv1D`` of PyTorch
        has; a name alone never.
        """
        name, shape = find(path, self.names), self.shape(path)
        model, above = self.model_axes, path.rpartition("/")[0]
        layer = "" if model is None else model.layers.get(path, "")
        stated = (self._axes or {}).get(path) or (name.axes if name else None)
        axes = stated or self._adapter_axes.get(path)
        batch = axes.batch if axes else () if model is None else model.batch.get(path, ())
        if len(shape) - len(batch) > 2:
            return "linear" if layer == _DENSE_GENERAL else "conv"
        if layer == _CONV1D_CLASS:
            return "conv1d"
        either = above.rpartition("/")[2] in CONV1D_LAYERS
        if axes is not None and axes.inputs > axes.outputs:
            return "linear" if not either else "" if layer else "conv1d"
        bias = self.leaves.get(f"{above}/bias")
        if stated is not None or layer.startswith("flax.") or bias is None or len(shape) != 2:
            return "linear"
        outputs = output_axis(shape, tuple(bias.shape))
        if outputs is None and either:
            return ""
        return "conv1d" if outputs == 0 else "linear"

    def check_orientation(self, path: str) -> None:
        """Checks that it is known which axis of a kernel are its inputs.

        Raises:
          ValueError: if nothing says it, or the adapter has them the other way round.
        """
        adapter, layer = self._adapter_axes.get(path), self.stated_axes(path)
        if adapter and layer and (adapter.batch, adapter.inputs) == (layer.batch, layer.outputs):
            raise ValueError(
                f"{path!r} has an adapter with inputs {adapter.inputs} and outputs "
                f"{adapter.outputs}, but its layer has inputs {layer.inputs} and outputs "
                f"{layer.outputs}: make the adapter with "
                f"lora_init(..., axes=lora_jax.kernel_axes(...))."
            )
        name = find(path, self.names)
        decided = layer and name and name.kind != "weight"
        if self._may_be_conv1d(path) and not (decided or self._layer_kind(path)):
            raise ValueError(
                f"{path!r} of shape {self.shape(path)} may be of a FlaxConv1D, as GPT-2's, which "
                f"stores (out, in), or of a linear layer, as GPT-Neo's, that stores (in, out). Its "
                f"name does not say it. Pass axes=lora_jax.kernel_axes(...) or, for a class of "
                f"your own, names= with a lora_jax.peft.KeyMapping that says its kind and axes."
            )
