"""What is seen in an abstract call: handlers compute with zeros, and it is noted how.

A kernel on which the result depends all the same is read in another place too.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lora_jax.core._axes import KernelAxes
from lora_jax.core._model_axes import Convolution
from lora_jax.core.products._adapted_kernel import AdaptedKernel
from lora_jax.trees._paths import Key

# The name of the input of a product is this and the path of its kernel.
MARK = "lora_jax: what is multiplied by "


class LabelledParameter(Protocol):
    """Which parameter a layer has, and which of its axes are left there.

    Attributes:
      path: of the parameter in the model.
      axes: those that are left.
      batch: those that transforms have sliced off.
    """

    @property
    def path(self) -> str:
        """Its path."""

    @property
    def axes(self) -> tuple[int, ...]:
        """Those that are left."""

    @property
    def batch(self) -> tuple[int, ...]:
        """Those that were sliced off."""


@dataclasses.dataclass
class AxesSeen:
    """What was seen in an abstract call.

    Attributes:
      cuts: whether every product shall forget its input, to find the layers before a result.
      given: the parameters, as no transform has sliced or mapped them yet.
      kernels: for each parameter its axes, where a handler computes with it.
      layers: the class of its module.
      batch: the axes that transforms have sliced off.
      refused: why it cannot be adapted in its layer.
      handled: what to say where its layer has a handler which did not compute with it.
      methods: the methods that compute with it.
      convolutions: how it is used in a convolution.
      not_contracted: the parameters with a use that is not a product ``x W``.
      widths: sizes that the output of its layer may have in the last axis.
      modules: the paths of the modules that were called.
      results: shape and dtype of each array in the result.
    """

    cuts: bool = False
    given: dict[str, Any] = dataclasses.field(default_factory=dict)
    kernels: dict[str, KernelAxes] = dataclasses.field(default_factory=dict)
    layers: dict[str, str] = dataclasses.field(default_factory=dict)
    batch: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    handled: dict[str, str] = dataclasses.field(default_factory=dict)
    methods: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    convolutions: dict[str, Convolution] = dataclasses.field(default_factory=dict)
    not_contracted: set[str] = dataclasses.field(default_factory=set)
    widths: dict[str, set[int]] = dataclasses.field(default_factory=dict)
    modules: set[Key] = dataclasses.field(default_factory=set)
    results: list[tuple[tuple[int, ...], Any]] = dataclasses.field(default_factory=list)

    def called(self, module: Any, label: LabelledParameter) -> None:
        """A module was called that has this parameter."""
        self.layers.setdefault(label.path, _name(module))
        self.batch.setdefault(label.path, label.batch)

    def kernel(
        self, module: Any, method: str, layer: str, label: LabelledParameter, value: Any
    ) -> AdaptedKernel:
        """The kernel that a handler gets, of which it is noted what is done with it.

        Args:
          module: whose kernel it is.
          method: of the module.
          layer: what the layer is called in messages.
          label: says which parameter it is.
          value: the kernel.
        """
        self.layers[label.path] = _name(module)
        self.methods.setdefault(label.path, set()).add(method)
        if convolution := _convolution(module):
            self.convolutions[label.path] = convolution
        self.handled[label.path] = f"the handler of {layer} did not compute with it"
        return AdaptedKernel(label.path, value, observer=_OneKernel(self, label, value))


@dataclasses.dataclass
class _OneKernel:
    """Notes what the handler of a layer does with one kernel."""

    seen: AxesSeen
    label: LabelledParameter
    value: jax.Array

    def use(self, layer: KernelAxes, contracted: bool) -> None:
        """The handler computes with the kernel, as a layer that sees these axes of it."""
        label = self.label
        if not contracted:
            self.seen.not_contracted.add(label.path)
        if layer.ndim != len(label.axes):
            self.refuse(f"its handler computes with {layer.ndim} axes of {len(label.axes)}")
            return
        axes = KernelAxes(
            inputs=tuple(label.axes[i] for i in layer.inputs),
            outputs=tuple(label.axes[i] for i in layer.outputs),
            batch=(*label.batch, *(label.axes[i] for i in layer.batch)),
        )
        shape = self.seen.given[label.path].shape
        k, last = axes.matrix_shape(shape)[1], shape[axes.outputs[-1]]
        self.seen.widths[label.path] = {k, last}
        before = self.seen.kernels.setdefault(label.path, axes)
        if before != axes:
            self.refuse(f"its handler uses it as {before} and as {axes}")

    def product(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """The product; where it is cut, one that depends on the kernel instead of the input."""
        if not self.seen.cuts:
            return y
        checkpoint_name(x, MARK + self.label.path)
        return jnp.zeros_like(y) + jnp.sum(self.value).astype(y.dtype)

    def refuse(self, reason: str) -> None:
        """The handler cannot adapt the kernel."""
        self.seen.refused[self.label.path] = reason


def _convolution(module: Any) -> Convolution | None:
    """How a module convolves; ``None`` where it does not."""
    if not hasattr(module, "kernel_dilation"):
        return None
    dilation, padding = module.kernel_dilation, getattr(module, "padding", None)
    return Convolution(
        transposed=hasattr(module, "transpose_kernel"),
        dilated=dilation not in (None, 1) and any(n != 1 for n in np.ravel(dilation)),
        padding=padding if isinstance(padding, str) else None,
        groups=getattr(module, "feature_group_count", 1),
    )


def _name(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
