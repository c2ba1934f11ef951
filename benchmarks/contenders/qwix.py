"""Qwix: LoRA by an interceptor, for models in Linen."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks.contenders.training import Problem, check_paths, model_loss
from benchmarks.models import arrays, data, linen
from benchmarks.models.cases import Case, kernel_names

NAMES = ("kernel_lora_a", "kernel_lora_b")


def lora(case: Case) -> Problem:
    """As in https://qwix.readthedocs.io/en/latest/lora.html for Linen, not quantized.

    Its page ends with the adapted model. The gradient is taken for the leaves that it added only,
    as Tunix does with qwix's NNX models.
    """
    model, made = adapted(case, linen.make(case), r"layers_\d+/({})")
    adapters = {
        f"{path}/{name}": value.astype(made[f"{path}/{name}"].dtype)
        for path, pair in arrays.factors(case).items()
        for name, value in zip(NAMES, pair, strict=True)
    }
    check_paths(adapters, set(made))
    return Problem(_loss(model), unflatten_dict(adapters, sep="/"), arrays.params(case))


def lora_float32(case: Case) -> Problem:
    """The same with adapters in float32, as others have them whatever the base is in.

    Qwix computes in the wider dtype of the two.
    """
    problem = lora(case)
    return dataclasses.replace(problem, trained=jax.tree.map(jnp.float32, problem.trained))


def abstract_lora(case: Case, model: Any, pattern: str, dtype: Any = None) -> tuple[Any, Any]:
    """The same of another model: its adapters as shapes, and its loss of tokens alone.

    Args:
      case: its case.
      model: the model.
      pattern: of the paths of its layers, with ``{}`` for their names.
      dtype: that adapters are kept in, to be cast for the model, as a loop over layers does not
        take what is computed in a wider one; by default that of their kernels, as qwix makes them.
    """
    model, made = adapted(case, model, pattern)
    plain, own = _loss(model), jnp.dtype(case.dtype)
    shapes = {
        path: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype) for path, leaf in made.items()
    }

    def loss(adapters: Any, params: Any, ids: Any) -> jax.Array:
        return plain(jax.tree.map(lambda leaf: leaf.astype(own), adapters), params, (ids, ids))

    return unflatten_dict(shapes, sep="/"), loss


def adapted(case: Case, model: Any, pattern: str) -> tuple[Any, dict[str, Any]]:
    """The model with qwix's adapters, and the shapes of them by their paths."""
    import qwix

    names = "|".join(kernel_names(case))
    provider = qwix.LoraProvider(
        module_path=pattern.format(names), rank=case.rank, alpha=case.scale * case.rank
    )
    model = qwix.apply_lora_to_model(model, provider)
    ids, _ = data.batch(case)
    made = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), ids)["params"], sep="/")
    return model, {path: leaf for path, leaf in made.items() if path.endswith(NAMES)}


def _loss(model: Any) -> Any:
    plain = model_loss(model)

    def loss(adapters: Any, params: Any, batch: Any) -> jax.Array:
        flat = flatten_dict(params, sep="/") | flatten_dict(adapters, sep="/")
        return plain(unflatten_dict(flat, sep="/"), batch)

    return loss
