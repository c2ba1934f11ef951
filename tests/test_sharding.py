"""Adapted layers on several devices: the same numbers as on one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_like, random_variables, relative_error
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(64, name="up")(x))
        return nn.Dense(32, name="down")(x)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_sharded_equals_one_device(variant):
    model, x = Model(), random_like(jnp.zeros((8, 6, 32)), scale=1.0)
    params = random_variables(model, x)["params"]
    config = lora_jax.LoraConfig([lora_jax.Rule(".*/kernel", rank=4, variant=variant)])
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config)
    adapters = random_like(adapters)

    @jax.jit
    @jax.value_and_grad
    def step(adapters, frozen, x):
        return (lora_jax.lora_apply(model, {"params": frozen}, adapters, x) ** 2).sum()

    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    specs = {"up": P(None, "model"), "down": P("model", None)}
    sharded = {
        name: {
            "kernel": jax.device_put(leaves["kernel"], NamedSharding(mesh, specs[name])),
            "bias": jax.device_put(leaves["bias"], NamedSharding(mesh, P())),
        }
        for name, leaves in frozen.items()
    }
    everywhere = jax.device_put(adapters, NamedSharding(mesh, P()))
    batch = jax.device_put(x, NamedSharding(mesh, P("data")))
    value, grads = step(everywhere, sharded, batch)
    expected, expected_grads = step(adapters, frozen, x)
    assert relative_error(value, expected) < 1e-5
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert relative_error(got, want) < 1e-4
    merged = jax.jit(lora_jax.lora_merge)(sharded, everywhere)
    for name, leaves in lora_jax.lora_merge(frozen, adapters).items():
        assert relative_error(merged[name]["kernel"], leaves["kernel"]) < 1e-5
