"""The output of an adapted layer, in the place of the method that Flax would call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from lora_jax._compat import is_intercepted_inside
from lora_jax.core.products._adapted_kernel import AdaptedKernel
from lora_jax.layers._entry import Entry


def layer_output(
    entry: Entry,
    kernels: tuple[AdaptedKernel | None, ...],
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """The output of a layer by its handler.

    Args:
      entry: has the handler.
      kernels: one for each name; ``None`` where the module does not have it.
      next_fun: as an interceptor of Flax has it; so the others.
      args: of the method.
      kwargs: of the method.
      context: says which layer, and which method.

    Raises:
      ValueError: if the model intercepts the method too, which would be skipped.
    """
    for kernel in kernels if is_intercepted_inside(next_fun, context) else ():
        if kernel is not None:
            kernel.refuse("the model intercepts its calls itself, by nn.intercept_methods")
    method = getattr(context.orig_method, "func", context.orig_method)
    return entry.output(context.module, kernels, method, args, kwargs)
