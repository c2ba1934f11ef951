"""Layers that read the same input have one copy of it, whose gradient is added up by itself."""

import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import pytest
from helpers import checking_leaks, random_like, relative_error

import lora_jax
from lora_jax.core.products import _shared_input

X = jnp.linspace(-1.0, 1.0, 24).reshape(2, 3, 4)


class Attention(nn.Module):
    """Three layers read the input, and one the result."""

    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(4, name=name)(x) for name in "qkv")
        return nn.Dense(4, name="o")(q * k + v)


class Closures(nn.Module):
    """A layer reads the input inside of a transform that began after it, and two outside."""

    @nn.compact
    def __call__(self, x):
        def body(module, carry, _):
            return carry + nn.Dense(4, name="inside")(x), None

        loop = nn.scan(body, variable_broadcast="params", split_rngs={"params": False}, length=2)
        carry, _ = loop(self, jnp.zeros_like(x), None)
        return carry + nn.Dense(4, name="b")(x) * nn.Dense(4, name="c")(x)


class Rematerialised(nn.Module):
    """Each layer is inside of a transform of its own."""

    @nn.compact
    def __call__(self, x):
        return nn.remat(nn.Dense)(4, name="a")(x) + nn.remat(nn.Dense)(4, name="b")(x)


def pair(model):
    params = model.init(jax.random.key(0), X)["params"]
    config = lora_jax.LoraConfig([lora_jax.Rule(".*kernel", 2, variant="dora")])
    frozen, adapters = lora_jax.lora_init(jax.random.key(1), params, config)
    return frozen, random_like(adapters)


def copies(jaxpr):
    """Equations that copy, in a jaxpr and in those inside of it."""
    found = 0
    for eqn in jaxpr.eqns:
        found += eqn.primitive.name == "copy"
        for value in eqn.params.values():
            inside = getattr(value, "jaxpr", value)
            found += copies(inside) if hasattr(inside, "eqns") else 0
    return found


@pytest.mark.skipif(
    not hasattr(jax.extend.core, "get_opaque_trace_state"), reason="this jax does not say it"
)
def test_queries_keys_and_values_share_their_input():
    frozen, adapters = pair(Attention())
    apply = jax.make_jaxpr(
        lambda adapters, x: lora_jax.lora_apply(Attention(), {"params": frozen}, adapters, x)
    )
    assert copies(apply(adapters, X).jaxpr) == 2


@pytest.mark.parametrize("model", [Attention(), Closures(), Rematerialised()], ids=repr)
def test_a_copy_stays_in_its_transform(model):
    frozen, adapters = pair(model)

    def loss(adapters, x):
        return jnp.sum(lora_jax.lora_apply(model, {"params": frozen}, adapters, x) ** 2)

    def merged_loss(adapters, x):
        merged = lora_jax.lora_merge(frozen, adapters)
        return jnp.sum(model.apply({"params": merged}, x) ** 2)

    with checking_leaks():
        got = jax.jit(jax.grad(loss, (0, 1)))(adapters, X)
    expected = jax.jit(jax.grad(merged_loss, (0, 1)))(adapters, X)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_error(one, other) < 1e-5


def test_without_a_state_of_traces_nothing_is_shared(monkeypatch):
    monkeypatch.setattr(_shared_input, "trace_state", object)
    frozen, adapters = pair(Attention())
    apply = jax.make_jaxpr(
        lambda adapters, x: lora_jax.lora_apply(Attention(), {"params": frozen}, adapters, x)
    )
    assert copies(apply(adapters, X).jaxpr) == 0
