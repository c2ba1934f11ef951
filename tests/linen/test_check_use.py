"""Adapters that a call does not use, and kernels that it reads outside of their layers."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from helpers import dense_case, random_variables, relative_error
from zoo import Parts

import lora_jax
from lora_jax import LoraConfig, Rule, lora_init_model

KEY, IDS = jax.random.key(0), jnp.arange(5)[None]


def init(model, x):
    frozen, adapters = dense_case(model, x)
    return {"params": frozen}, adapters


def test_a_use_of_which_nothing_comes_is_the_same_again():
    """With a layer in the cache of nn.jit as without."""
    layer = nn.jit(nn.Dense)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = layer(6, name="layer")(x)
            self.sow("losses", "loss", layer(6, name="aux")(x))
            return x

    x = jnp.ones((2, 6))
    frozen, adapters = dense_case(Model(), x)
    for _ in range(2):
        lora_jax.lora_apply(Model(), {"params": frozen}, adapters, x)
        jax.jit(lambda x: lora_jax.lora_apply(Model(), {"params": frozen}, adapters, x))(x)


def test_the_use_in_another_model_is_no_use():
    """Of an adapter of the same structure, by a layer that nn.jit has in its cache."""

    class Model(nn.Module):
        calls: bool

        @nn.compact
        def __call__(self, x):
            layer = nn.jit(nn.Dense)(6, name="layer_of_two_models")
            return nn.Dense(3, name="head")(layer(x) if self.calls else x)

    x = jnp.ones((2, 6))
    frozen, adapters = dense_case(Model(True), x)
    for _ in range(2):
        lora_jax.lora_apply(Model(True), {"params": frozen}, adapters, x)
    with pytest.raises(ValueError, match=r"'layer_of_two_models/kernel' was not used"):
        lora_jax.lora_apply(Model(False), {"params": frozen}, adapters, x)


class OverridesCall(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.ones, (x.shape[-1], self.features))


class OwnLayer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.ones, (x.shape[-1], 6))


def test_adapter_of_an_unknown_module():
    x = jnp.ones((2, 6))
    model = nn.Sequential([nn.Dense(6), OwnLayer()])
    with pytest.raises(
        ValueError, match=r"'layers_1/kernel'.*no handler for .*OwnLayer.*nn\.Dense"
    ):
        lora_jax.lora_apply(model, *init(model, x), x)
    model = nn.Sequential([nn.Dense(6), OverridesCall(6)])
    with pytest.raises(ValueError, match=r"'layers_1/kernel'.*OverridesCall.*super\(\)\.__call__"):
        lora_jax.lora_apply(model, *init(model, x), x)


def test_adapter_that_the_call_did_not_use():
    model, x = Parts(), jnp.ones((2, 6))
    variables, adapters = init(model, x)
    lora_jax.lora_apply(model, variables, adapters, x)
    with pytest.raises(ValueError, match=r"'head/kernel'.*Parts\.encode.*allow_unused=True"):
        lora_jax.lora_apply(model, variables, adapters, x, method="encode")
    with pytest.raises(ValueError, match=r"'head/kernel'.*Parts\.encode.*allow_unused=True"):
        lora_jax.lora_apply(model, variables, adapters, x, method=Parts.encode)
    y = lora_jax.lora_apply(model, variables, adapters, x, method="encode", allow_unused=True)
    merged = lora_jax.lora_merge(variables["params"], adapters)
    assert relative_error(y, model.apply({"params": merged}, x, method="encode")) < 1e-5


def test_adapter_that_the_call_did_not_use_after_one_that_did():
    class Optional(nn.Module):
        @nn.compact
        def __call__(self, x, head=True):
            x = nn.Dense(6, name="encoder")(x)
            return nn.Dense(3, name="head")(x) if head else x

    model, x = Optional(), jnp.ones((2, 6))
    variables, adapters = init(model, x)
    lora_jax.lora_apply(model, variables, adapters, x)
    with pytest.raises(ValueError, match=r"'head/kernel'.*was not used"):
        lora_jax.lora_apply(model, variables, adapters, x, head=False)


@pytest.mark.parametrize("transform", [nn.remat, lambda cls: cls])
def test_adapter_that_a_later_call_does_not_use_in_a_transform(transform):
    class Optional(nn.Module):
        @nn.compact
        def __call__(self, x, head=True):
            x = transform(nn.Dense)(6, name="body")(x)
            return transform(nn.Dense)(3, name="head")(x) if head else x

    model, x = Optional(), jnp.ones((2, 6))
    frozen, adapters = dense_case(model, x)
    lora_jax.lora_apply(model, {"params": frozen}, adapters, x)
    with pytest.raises(ValueError, match=r"'head/kernel'.*was not used"):
        lora_jax.lora_apply(model, {"params": frozen}, adapters, x, head=False)


# --- kernels that are read elsewhere ---


class Tied(nn.Module):
    """An embedding with another use, of every kind."""

    use: str

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 8, name="embed")
        x = nn.Dense(8, name="dense")(embed(ids))
        match self.use:
            case "attribute":
                return x @ embed.embedding.T
            case "variables":
                return x @ self.variables["params"]["embed"]["embedding"].T
            case "attend":
                return embed.attend(x)
            case "dense":
                return x @ self.variables["params"]["dense"]["kernel"].T
        return x * embed.embedding.shape[0]


@pytest.mark.parametrize(
    ("use", "tied"),
    [
        ("attribute", "embed/embedding"),
        ("variables", "embed/embedding"),
        ("dense", "dense/kernel"),
        ("attend", ""),
        ("shape", ""),
    ],
)
def test_ties_are_seen_without_axes(use, tied):
    model = Tied(use)
    params = random_variables(model, IDS)["params"]
    config = LoraConfig([Rule(".*(embedding|kernel)", 2)])
    frozen, adapters = lora_jax.lora_init(KEY, params, config)
    adapters = jax.tree.map(lambda a: a + 0.1, adapters)

    def apply(adapters, frozen):
        return lora_jax.lora_apply(model, {"params": frozen}, adapters, IDS)

    if tied:
        for call in (apply, jax.jit(apply)):
            with pytest.raises(ValueError, match=rf"also reads '{tied}' outside .*tied="):
                call(adapters, frozen)
    else:
        merged = model.apply({"params": lora_jax.lora_merge(frozen, adapters)}, IDS)
        assert jnp.allclose(jax.jit(apply)(adapters, frozen), merged, atol=1e-5)


class TwoCalls(nn.Module):
    """Its embedding is tied in one of its calls only."""

    def setup(self):
        self.embed, self.dense = nn.Embed(11, 8), nn.Dense(8)

    def encode(self, ids):
        return self.dense(self.embed(ids))

    def logits(self, h):
        return self.dense(h) @ self.embed.embedding.T

    def __call__(self, ids):
        return self.logits(self.encode(ids))


def test_ties_of_one_call_are_not_those_of_another():
    model, h = TwoCalls(), jnp.ones((2, 3, 8))
    variables = random_variables(model, IDS)
    config = LoraConfig([Rule(".*(embedding|kernel)", 2)])
    frozen, adapters = lora_init_model(KEY, model, variables, config, IDS, method="encode")
    adapters = jax.tree.map(lambda a: a + 0.1, adapters)
    base = {"params": frozen}
    lora_jax.lora_apply(model, base, adapters, IDS, method="encode")
    for args, kwargs in (((IDS,), {}), ((h,), {"method": "logits", "allow_unused": True})):
        with pytest.raises(ValueError, match="also reads 'embed/embedding' outside"):
            lora_jax.lora_apply(model, base, adapters, *args, **kwargs)


@dataclasses.dataclass
class Config:  # without a hash, as those of Hugging Face
    width: int = 3


class Counts(nn.Module):
    looks: bool = False
    config: Any = dataclasses.field(default_factory=Config)
    calls = 0  # of all instances

    @nn.compact
    def __call__(self, x):
        Counts.calls += 1
        y = nn.Dense(self.config.width, name="dense")(x)
        return y if not self.looks or float(y.sum()) < 1e9 else -y


@pytest.mark.parametrize("looks", [False, True])
def test_a_call_is_looked_at_for_ties_once(looks):
    model, x = Counts(looks), jnp.ones((2, 5 + looks))
    params = Counts().init(KEY, x)["params"]
    frozen, adapters = lora_jax.lora_init(KEY, params, LoraConfig([Rule(".*kernel", 2)]))
    Counts.calls = 0
    for _ in range(3):
        y = lora_jax.lora_apply(model, {"params": frozen}, adapters, x)
    assert Counts.calls == 4
    assert jnp.allclose(y, model.apply({"params": params}, x))
