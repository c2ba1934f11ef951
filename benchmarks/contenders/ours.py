"""This library: LoRA and DoRA of every kernel of a case."""

from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

import lora_jax
from benchmarks.contenders.nnx import filled
from benchmarks.contenders.training import Problem, cross_entropy
from benchmarks.models import arrays, linen
from benchmarks.models.cases import Case, kernel_names


def config(case: Case, **options: Any) -> lora_jax.LoraConfig:
    """An adapter for each kernel of the case."""
    names = "|".join(kernel_names(case))
    pattern, alpha = rf"layers_\d+/({names})/kernel", case.scale * case.rank
    return lora_jax.LoraConfig([lora_jax.Rule(pattern, rank=case.rank, alpha=alpha, **options)])


def library(case: Case, *, variant: str, product: str = "auto", **options: Any) -> Problem:
    """This library."""
    model, params = linen.make(case), arrays.params(case)
    made = adapters(case, config(case, variant=variant, **options), params)

    def loss(adapters: Any, frozen: Any, batch: Any) -> jax.Array:
        ids, labels = batch
        logits = lora_jax.lora_apply(model, {"params": frozen}, adapters, ids, product=product)
        return cross_entropy(logits, labels)

    return Problem(loss, made, params, lora_jax.lora_merge)


def library_nnx(case: Case, *, variant: str) -> Problem:
    """This library with the model in Flax NNX."""
    from flax import nnx

    from benchmarks.models.nnx import make

    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(case)))
    params = arrays.params(case)
    state = filled(abstract, flatten_dict(params, sep="/"))
    made = adapters(case, config(case, variant=variant), params)
    layers = {str(i): made[f"layers_{i}"] for i in range(case.layers)}

    def loss(adapters: Any, frozen: Any, batch: Any) -> jax.Array:
        ids, labels = batch
        return cross_entropy(lora_jax.lora_apply(graphdef, frozen, adapters, ids), labels)

    return Problem(loss, {"layers": layers}, state, lora_jax.lora_merge)


def adapters(case: Case, config: lora_jax.LoraConfig, params: Any, count: int | None = None) -> Any:
    """The library's adapters with the factors of the case; ``count`` of them in a stack.

    In one program, which leaves out what `lora_init` draws.
    """

    @jax.jit
    def make(params: Any) -> Any:
        _, made = lora_jax.lora_init(jax.random.key(0), params, config)
        if count is not None:
            made = lora_jax.stack([made] * count)
        flat = flatten_dict(made, sep="/")
        for path, (U, V) in arrays.factors(case, stack=() if count is None else (count,)).items():
            flat[f"{path}/kernel"] = flat[f"{path}/kernel"].replace(U=U, V=V)
        return unflatten_dict(flat, sep="/")

    return make(params)
