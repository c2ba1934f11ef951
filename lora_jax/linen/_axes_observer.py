"""The interceptor of an abstract call: handlers compute with zeros, and it is noted how.

A kernel on which the result depends all the same is read in another place too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lora_jax._compat import Maps, Probe
from lora_jax.core._axes import KernelAxes
from lora_jax.core._boxes import unbox
from lora_jax.core._model_axes import Convolution
from lora_jax.core.products._adapted_kernel import AdaptedKernel
from lora_jax.linen._axis_labels import LABEL, Label
from lora_jax.linen._handlers import Handlers, entry_of
from lora_jax.linen._refuse_mapped import MAPPED
from lora_jax.trees._paths import Key

# The name of the input of a product is this and the path of its kernel.
MARK = "lora_jax: what is multiplied by "


@dataclasses.dataclass
class AxesObserver:
    """The interceptor of an abstract call, and what it saw.

    Attributes:
      handlers: of the call.
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

    handlers: Handlers
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
    _maps: Maps = dataclasses.field(default_factory=Maps)

    def intercept(
        self,
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        """Runs the handler of a known layer, and notes what it does with its kernels."""
        module = context.module
        if module.scope is None or isinstance(module, Probe):
            return next_fun(*args, **kwargs)
        self.modules.add(module.path)
        labels = {
            name: label
            for name, label in module.variables.get("params", {}).items()
            if isinstance(label, Label)
        }
        for label in labels.values():
            self.layers.setdefault(label.path, _name(module))
            self.batch.setdefault(label.path, label.batch)
        entry = entry_of(self.handlers, context.orig_method)
        names = entry.names(module) if entry else ()
        known = {name: labels[name + LABEL] for name in names if name + LABEL in labels}
        if entry is None:
            return next_fun(*args, **kwargs)
        if not known:
            why = f"the handler of {entry.layer} is for {' and '.join(map(repr, names))}"
            self.handled |= {label.path: why for label in labels.values()}
            return next_fun(*args, **kwargs)
        for name, label in known.items():
            self.layers[label.path] = _name(module)
            self.methods.setdefault(label.path, set()).add(context.method_name)
            if convolution := _convolution(module):
                self.convolutions[label.path] = convolution
            self.handled[label.path] = f"the handler of {entry.layer} did not compute with it"
            value = unbox(module.get_variable("params", name))
            as_given = value is self.given[label.path]
            if not as_given and self._maps.may_be_of_params(module):
                self.refused[label.path] = MAPPED
        kernels = tuple(self._kernel(module, name, known.get(name)) for name in names)
        return entry.output(kernels, next_fun, args, kwargs, context)

    def _kernel(self, module: nn.Module, name: str, label: Label | None) -> AdaptedKernel | None:
        if label is None:
            return None
        value = unbox(module.get_variable("params", name))
        return AdaptedKernel(label.path, value, observer=_OneKernel(self, label, value))


@dataclasses.dataclass
class _OneKernel:
    """Notes what the handler of a layer does with one kernel."""

    observer: AxesObserver
    label: Label
    value: jax.Array

    def use(self, layer: KernelAxes, contracted: bool) -> None:
        """The handler computes with the kernel, as a layer that sees these axes of it."""
        label = self.label
        if not contracted:
            self.observer.not_contracted.add(label.path)
        if layer.ndim != len(label.axes):
            self.refuse(f"its handler computes with {layer.ndim} axes of {len(label.axes)}")
            return
        axes = KernelAxes(
            inputs=tuple(label.axes[i] for i in layer.inputs),
            outputs=tuple(label.axes[i] for i in layer.outputs),
            batch=(*label.batch, *(label.axes[i] for i in layer.batch)),
        )
        shape = self.observer.given[label.path].shape
        k, last = axes.matrix_shape(shape)[1], shape[axes.outputs[-1]]
        self.observer.widths[label.path] = {k, last}
        before = self.observer.kernels.setdefault(label.path, axes)
        if before != axes:
            self.refuse(f"its handler uses it as {before} and as {axes}")

    def product(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """The product; where it is cut, one that depends on the kernel instead of the input."""
        if not self.observer.cuts:
            return y
        checkpoint_name(x, MARK + self.label.path)
        return jnp.zeros_like(y) + jnp.sum(self.value).astype(y.dtype)

    def refuse(self, reason: str) -> None:
        """The handler cannot adapt the kernel."""
        self.observer.refused[self.label.path] = reason


def _convolution(module: nn.Module) -> Convolution | None:
    """How a module convolves; ``None`` where it does not."""
    if not hasattr(module, "kernel_dilation"):
        return None
    dilation, padding = module.kernel_dilation, getattr(module, "padding", None)
    return Convolution(
        transposed=isinstance(module, nn.ConvTranspose),
        dilated=dilation not in (None, 1) and any(n != 1 for n in np.ravel(dilation)),
        padding=padding if isinstance(padding, str) else None,
        groups=getattr(module, "feature_group_count", 1),
    )


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
