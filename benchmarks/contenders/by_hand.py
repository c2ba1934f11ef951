"""LoRA as one writes it without a library."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks.contenders.training import Problem, model_loss
from benchmarks.models import arrays, linen
from benchmarks.models.cases import Case


def by_hand(call: Callable[[], Any], adapters: Any, add: Callable[..., jax.Array]) -> Any:
    """Calls a model in which ``add(x, U, V)`` is added to what each adapted layer computes.

    Args:
      call: of the model.
      adapters: ``U`` and ``V`` by the path of the layer.
      add: what is added.
    """

    def intercept(
        next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        y = next_fun(*args, **kwargs)
        path = "/".join(context.module.path)
        if path not in adapters or context.method_name != "__call__":
            return y
        (x,) = args
        return y + add(x, *(array.astype(x.dtype) for array in adapters[path]))

    with nn.intercept_methods(intercept):
        return call()


def lora_plain(case: Case) -> Problem:
    """LoRA in twenty lines: an interceptor, and the gradient as it comes."""
    plain, scale = model_loss(linen.make(case)), case.scale

    def loss(adapters: Any, params: Any, batch: Any) -> jax.Array:
        def add(x: jax.Array, U: jax.Array, V: jax.Array) -> jax.Array:
            return scale * (x @ U) @ V

        out: jax.Array = by_hand(lambda: plain(params, batch), adapters, add)
        return out

    return Problem(loss, arrays.factors(case), arrays.params(case))


def merge(case: Case) -> Problem:
    """LoRA as ``W + s U V`` in the place of ``W``, and the gradient as it comes."""
    plain, scale = model_loss(linen.make(case)), case.scale

    def loss(adapters: Any, params: Any, batch: Any) -> jax.Array:
        flat = flatten_dict(params, sep="/")
        for path, (u, v) in adapters.items():
            w = flat[f"{path}/kernel"]
            flat[f"{path}/kernel"] = w + (scale * u @ v).astype(w.dtype)
        return plain(unflatten_dict(flat, sep="/"), batch)

    return Problem(loss, arrays.factors(case), arrays.params(case))
