"""`gemma.peft`: LoRA by modules that wrap those of Linen."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from benchmarks.contenders.training import Problem, model_loss
from benchmarks.models import arrays, linen
from benchmarks.models.cases import Case


def lora(case: Case) -> Problem:
    """As in the README of the folder `gemma/peft`, and in `gm.nn.LoRA`, which is made of it.

    It has no scale, so ``V`` is scaled. Its dtype is the base's, as in `gm.nn.LoRA`.
    """
    from gemma import peft

    plain, dtype = model_loss(linen.make(case)), jnp.dtype(case.dtype)

    def replace(module: nn.Module) -> nn.Module:
        if isinstance(module, nn.Dense) and module.name != "head":
            return peft.LoRADense(rank=case.rank, dtype=dtype, wrapped=module)
        return module

    def loss(adapters: Any, params: Any, batch: Any) -> jax.Array:
        with peft.ModuleInterceptor(replace):
            return plain(peft.merge_params(params, adapters), batch)

    adapters = {}
    for path, (u, v) in arrays.factors(case).items():
        adapters[f"{path}/lora/a"] = u.astype(dtype)
        adapters[f"{path}/lora/b"] = (case.scale * v).astype(dtype)
    return Problem(loss, unflatten_dict(adapters, sep="/"), arrays.params(case))
