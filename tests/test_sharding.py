"""Adapted layers on several devices: the same numbers as on one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_like, random_variables, relative_error
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_models import Decoder

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


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_sharded_decoder_equals_one_device(variant):
    """Scanned on axis 1, with the factors sharded too: U over its inputs, V over its outputs."""
    model, tokens = Decoder(vocabulary=16, layers=2), jnp.arange(16).reshape(4, 4)
    variables = random_variables(model, tokens)
    axes = lora_jax.kernel_axes(model, variables, tokens)
    config = lora_jax.LoraConfig([lora_jax.Rule("|".join(axes), rank=2, variant=variant)])
    params = nn.unbox(variables["params"])
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config, axes=axes)
    adapters = random_like(adapters)

    @jax.jit
    @jax.value_and_grad
    def step(adapters, frozen, tokens):
        return (lora_jax.lora_apply(model, {"params": frozen}, adapters, tokens) ** 2).sum()

    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))

    def shard(path, leaf):
        """The last axis that the mesh divides, for V and kernels; the last but one for U."""
        name = jax.tree_util.keystr(path)
        spec = [None] * leaf.ndim
        axis = leaf.ndim - 2 if name.endswith(".U") else leaf.ndim - 1
        if leaf.ndim > 1 and leaf.shape[axis] % 2 == 0:
            spec[axis] = "model"
        return jax.device_put(leaf, NamedSharding(mesh, P(*spec)))

    sharded = jax.tree_util.tree_map_with_path(shard, (adapters, frozen))
    batch = jax.device_put(tokens, NamedSharding(mesh, P("data")))
    value, grads = step(*sharded, batch)
    expected, expected_grads = step(adapters, frozen, tokens)
    assert relative_error(value, expected) < 1e-5
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert relative_error(got, want) < 1e-4
