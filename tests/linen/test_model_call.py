"""What is a model, and what the arguments of its call say of dropout."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import zoo
from helpers import dense_case, random_like, relative_error

import lora_jax


class Wrapped:
    """As the Flax models of Hugging Face are called."""

    def __init__(self, module):
        self.module = module

    def __call__(self, x, params=None, dropout_rng=None, train=False):
        rngs = {} if dropout_rng is None else {"dropout": dropout_rng}
        variables = params if "batch_stats" in params else {"params": params}
        return self.module.apply(variables, x, rngs=rngs)

    def twice(self, x, params=None):
        return 2 * self(x, params)


def test_model_that_takes_its_variables_as_params():
    module, x, key = zoo.Compact(), jnp.ones((3, 6)), jax.random.key(0)
    model = Wrapped(module)
    frozen, adapters = dense_case(module, x, dropout=0.5)
    variables = {"params": frozen}
    assert set(lora_jax.kernel_axes(model, variables, x)) == {"first/kernel", "second/kernel"}
    y = lora_jax.lora_apply(module, variables, adapters, x)
    assert jnp.array_equal(lora_jax.lora_apply(model, variables, adapters, x), y)
    twice = lora_jax.lora_apply(model, variables, adapters, x, method="twice")
    assert jnp.array_equal(twice, 2 * y)
    same = lora_jax.lora_apply(model, variables, adapters, x, dropout_rng=key)
    assert jnp.array_equal(same, y)
    dropped = lora_jax.lora_apply(model, variables, adapters, x, dropout_rng=key, train=True)
    assert relative_error(dropped, y) > 1e-2

    normed = zoo.Normed()
    variables = normed.init(key, x)
    config = lora_jax.LoraConfig([lora_jax.Rule(".*kernel", 2)])
    frozen, adapters = lora_jax.lora_init(key, variables["params"], config)
    got = lora_jax.lora_apply(
        Wrapped(normed), {**variables, "params": frozen}, random_like(adapters), x
    )
    assert relative_error(got, normed.apply(variables, x)) > 1e-2


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=False, train=True):
        return nn.Dense(50, use_bias=False)(x)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_dropout_is_on_only_with_an_rng_and_in_training(variant):
    model, x = Dropped(), jnp.ones((3, 40))
    frozen, adapters = dense_case(model, x, dropout=0.5, variant=variant)
    rngs = {"dropout": jax.random.key(5)}

    def apply(*args, **kwargs):
        return lora_jax.lora_apply(model, {"params": frozen}, adapters, x, *args, **kwargs)

    off = model.apply({"params": lora_jax.lora_merge(frozen, adapters)}, x)
    assert relative_error(apply(), off) < 1e-5
    assert relative_error(apply(rngs={"params": jax.random.key(5)}), off) < 1e-5
    assert relative_error(apply(rngs=rngs, deterministic=True), off) < 1e-5
    assert relative_error(apply(rngs=rngs, train=False), off) < 1e-5
    on = apply(rngs=rngs)
    assert relative_error(on, off) > 1e-2
    assert relative_error(apply(rngs=rngs, deterministic=False, train=True), on) < 1e-6
    assert relative_error(apply(rngs={"dropout": jax.random.key(6)}), on) > 1e-2


@pytest.mark.parametrize("args", [(True,), ()])
def test_dropout_sees_what_evaluates_in_any_place(args):
    """As an argument by position, or as the default of the method."""

    class Evaluates(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic=True):
            return nn.Dense(5)(x)

    model, x = Evaluates(), jnp.ones((3, 6))
    frozen, adapters = dense_case(model, x, dropout=0.5)
    rngs = {"dropout": jax.random.key(0)}

    def apply(*args, **kwargs):
        return lora_jax.lora_apply(model, {"params": frozen}, adapters, x, *args, **kwargs)

    assert jnp.array_equal(apply(*args, rngs=rngs), apply())
    assert relative_error(apply(False, rngs=rngs), apply()) > 1e-2


def test_single_key_is_no_dropout_rng():
    model, x = nn.Dense(5), jnp.ones((3, 6))
    frozen, adapters = dense_case(model, x, dropout=0.5)
    off = lora_jax.lora_apply(model, {"params": frozen}, adapters, x)
    key = jax.random.key(0)
    assert jnp.array_equal(
        lora_jax.lora_apply(model, {"params": frozen}, adapters, x, rngs=key), off
    )


def test_method_that_is_bound():
    class Encodes(nn.Module):
        def setup(self):
            self.dense = nn.Dense(50)

        def __call__(self, x):
            return self.dense(x)

        def encode(self, x, deterministic=True):
            return self.dense(x)

    model, x = Encodes(), jnp.ones((2, 6))
    frozen, adapters = dense_case(model, x, dropout=0.5)
    rngs = {"dropout": jax.random.key(0)}

    def apply(*args, **kwargs):
        return lora_jax.lora_apply(model, {"params": frozen}, adapters, x, *args, **kwargs)

    for method in ("encode", Encodes.encode, model.encode):
        assert jnp.array_equal(apply(method=method, rngs=rngs), apply())
        assert relative_error(apply(False, method=method, rngs=rngs), apply()) > 1e-2
