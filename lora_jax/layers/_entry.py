"""One method of a layer, and the handler that computes it with adapted kernels."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.core.products._adapted_kernel import AdaptedKernel

# How a method is found again: by the function in the class body, so that a subclass that calls
# super().__call__ reaches it once, where the product is, and a lifted class reaches it inside its
# transform; or by the name of that function, in packages that are not imported here.
MethodKey = Callable[..., Any] | str
# A layer, its kernels and the arguments of the call, to the layer's output.
Handler = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Entry:
    """How one method of a layer is adapted.

    Attributes:
      layer: what the layer is called in messages.
      kernels: the names of its kernels, or a function of the module that gives them.
      handler: computes the output. A handler of this library has the arguments ``(layer, kernels,
        method, *args, **kwargs)``, with the layer's own method as a function of a layer; a user's
        has ``(layer, *kernels, *args, **kwargs)``.
      built_in: whether the handler is of this library.
    """

    layer: str
    kernels: tuple[str, ...] | Callable[[Any], tuple[str, ...]]
    handler: Handler
    built_in: bool = True

    def names(self, layer: Any) -> tuple[str, ...]:
        """The names of the kernels of a layer."""
        return self.kernels(layer) if callable(self.kernels) else self.kernels

    def output(
        self,
        layer: Any,
        kernels: tuple[AdaptedKernel | None, ...],
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """The output of a layer, in the place of its method.

        Args:
          layer: the layer.
          kernels: one for each name; ``None`` where the layer does not have it.
          method: the layer's own, as a function of a layer.
          args: of the method.
          kwargs: of the method.
        """
        if self.built_in:
            return self.handler(layer, kernels, method, *args, **kwargs)
        return self.handler(layer, *kernels, *args, **kwargs)


def body(method: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it stands in the class body, below what Flax wraps around it."""
    function: Callable[..., Any] = inspect.unwrap(getattr(method, "func", method))
    return function


def keys_of(method: Callable[..., Any]) -> tuple[MethodKey, MethodKey]:
    """What a method may be entered by: its function, and the function's name."""
    function = body(method)
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    return function, f"{module}.{name}"
