"""Flax NNX: `nnx.LoRALinear`."""

from typing import Any

import jax
from flax.traverse_util import flatten_dict

from benchmarks.contenders.training import Problem, check_paths, cross_entropy
from benchmarks.models import arrays
from benchmarks.models.cases import Case


def lora(case: Case) -> Problem:
    """A model of NNX in the functional form: split and merge.

    It has no scale, so ``V`` is scaled.
    """
    from flax import nnx

    from benchmarks.models.nnx import make

    graph, abstract, rest = nnx.split(
        nnx.eval_shape(lambda: make(case, with_lora=True)), nnx.LoRAParam, ...
    )
    base = flatten_dict(arrays.params(case), sep="/")
    factors = {}
    for path, (u, v) in arrays.factors(case).items():
        factors[f"{path}/lora/lora_a"] = u
        factors[f"{path}/lora/lora_b"] = case.scale * v

    def loss(adapters: Any, frozen: Any, batch: Any) -> jax.Array:
        ids, labels = batch
        return cross_entropy(nnx.merge(graph, adapters, frozen)(ids), labels)

    return Problem(loss, filled(abstract, factors), filled(rest, base))


def filled(state: Any, values: dict[str, Any]) -> Any:
    """A state with these arrays, by the paths that the model has in Linen."""
    from flax import nnx

    from benchmarks.models.nnx import linen_path

    flat = dict(nnx.to_flat_state(state))
    check_paths(values, {linen_path(path) for path in flat})
    return nnx.from_flat_state(
        {path: leaf.replace(values[linen_path(path)]) for path, leaf in flat.items()}
    )
