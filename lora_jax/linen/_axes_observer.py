"""The interceptor of an abstract call, which tells what each layer does with its kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from lora_jax._compat import Maps, Probe, is_nnx_in_linen
from lora_jax.core._boxes import unbox
from lora_jax.core.products._adapted_kernel import AdaptedKernel
from lora_jax.layers._axes_seen import AxesSeen
from lora_jax.layers._entry import Entry
from lora_jax.layers._handlers import Handlers, entry_of
from lora_jax.linen._axis_labels import LABEL, Label
from lora_jax.linen._layer_output import layer_output
from lora_jax.linen._refuse_mapped import MAPPED


@dataclasses.dataclass
class AxesObserver:
    """The interceptor of an abstract call.

    Attributes:
      handlers: of the call.
      seen: what was seen.
    """

    handlers: Handlers
    seen: AxesSeen
    _maps: Maps = dataclasses.field(default_factory=Maps)

    def intercept(
        self,
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        """Runs the handler of a known layer, and notes what it does with its kernels."""
        module, seen = context.module, self.seen
        if module.scope is None or isinstance(module, Probe):
            return next_fun(*args, **kwargs)
        if is_nnx_in_linen(module):
            return next_fun(*args, **kwargs)
        seen.modules.add(module.path)
        labels = {
            name: label
            for name, label in module.variables.get("params", {}).items()
            if isinstance(label, Label)
        }
        for label in labels.values():
            seen.called(module, label)
        entry = entry_of(self.handlers, context.orig_method)
        if entry is None:
            return next_fun(*args, **kwargs)
        names = entry.names(module)
        known = {name: labels[name + LABEL] for name in names if name + LABEL in labels}
        if not known:
            why = f"the handler of {entry.layer} is for {' and '.join(map(repr, names))}"
            seen.handled |= {label.path: why for label in labels.values()}
            return next_fun(*args, **kwargs)
        kernels = tuple(
            self._kernel(module, context.method_name, entry, name, known.get(name))
            for name in names
        )
        return layer_output(entry, kernels, next_fun, args, kwargs, context)

    def _kernel(
        self, module: nn.Module, method: str, entry: Entry, name: str, label: Label | None
    ) -> AdaptedKernel | None:
        if label is None:
            return None
        value = unbox(module.get_variable("params", name))
        kernel = self.seen.kernel(module, method, entry.layer, label, value)
        as_given = value is self.seen.given[label.path]
        if not as_given and self._maps.may_be_of_params(module):
            self.seen.refused[label.path] = MAPPED
        return kernel
