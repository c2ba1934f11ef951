"""What adapters are compared with: the least that any of them costs, and full fine-tuning."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.contenders.training import Problem, model_loss
from benchmarks.models import arrays, linen
from benchmarks.models.cases import Case


def floor(case: Case) -> Problem:
    """The gradient of a vector that is added to the embeddings: the least that an adapter costs."""
    plain = model_loss(linen.make(case))

    def loss(vector: Any, params: Any, batch: Any) -> jax.Array:
        out: jax.Array = with_vector(lambda: plain(params, batch), vector)
        return out

    return Problem(loss, jnp.zeros(case.width), arrays.params(case))


def with_vector(call: Callable[[], Any], vector: jax.Array) -> Any:
    """Calls a model with a vector added to its embeddings."""

    def intercept(
        next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        y = next_fun(*args, **kwargs)
        here = context.module.name == "embed" and context.method_name == "__call__"
        return y + vector.astype(y.dtype) if here else y

    with nn.intercept_methods(intercept):
        return call()


def full(case: Case) -> Problem:
    """All parameters are trained."""
    plain = model_loss(linen.make(case))
    return Problem(lambda params, _, batch: plain(params, batch), arrays.params(case), {})
