"""Qwix: LoRA by an interceptor, for models in Linen."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks.contenders.training import Problem, check_paths, model_loss
from benchmarks.models import arrays, data, linen
from benchmarks.models.cases import Case, kernel_names


def lora(case: Case) -> Problem:
    """As in https://qwix.readthedocs.io/en/latest/lora.html for Linen, not quantized.

    Its page ends with the adapted model. The gradient is taken for the leaves that it added only,
    as Tunix does with qwix's NNX models.
    """
    import qwix

    names = "|".join(kernel_names(case))
    provider = qwix.LoraProvider(
        module_path=rf"layers_\d+/({names})", rank=case.rank, alpha=case.scale * case.rank
    )
    model = qwix.apply_lora_to_model(linen.make(case), provider)
    plain = model_loss(model)
    names = ("kernel_lora_a", "kernel_lora_b")

    def loss(adapters: Any, params: Any, batch: Any) -> jax.Array:
        flat = flatten_dict(params, sep="/") | flatten_dict(adapters, sep="/")
        return plain(unflatten_dict(flat, sep="/"), batch)

    ids, _ = data.batch(case)
    made = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), ids)["params"], sep="/")
    adapters = {
        f"{path}/{name}": value.astype(made[f"{path}/{name}"].dtype)
        for path, pair in arrays.factors(case).items()
        for name, value in zip(names, pair, strict=True)
    }
    check_paths(adapters, {path for path in made if path.endswith(names)})
    return Problem(loss, unflatten_dict(adapters, sep="/"), arrays.params(case))


def lora_float32(case: Case) -> Problem:
    """The same with adapters in float32, as others have them whatever the base is in.

    Qwix computes in the wider dtype of the two.
    """
    problem = lora(case)
    return dataclasses.replace(problem, trained=jax.tree.map(jnp.float32, problem.trained))
