"""Which kernels `"all-linear"` is for: of linear layers, and of no output head."""

import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from helpers import random_variables

import lora_jax
from lora_jax import LoraConfig, Rule, kernel_axes, lora_init_model

KEY, IDS = jax.random.key(0), jnp.arange(5)[None]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(nn.LayerNorm()(x))
        x = x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(16, name="up")(nn.LayerNorm()(x))))
        return x, None


class Model(nn.Module):
    """A decoder with one of many ends."""

    end: str = "softmax"
    scan: bool = False

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 8, name="embed")
        x = embed(ids)
        stack = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        if self.scan:
            x, _ = stack(name="layers")(x, None)
        else:
            for i in range(2):
                x, _ = Block(name=f"layer_{i}")(x)
        x = nn.LayerNorm(name="norm")(x)
        match self.end:
            case "softmax":
                return nn.softmax(nn.Dense(11, name="head")(x))
            case "two results":
                return {"policy": nn.Dense(3, name="head")(x), "value": nn.Dense(1, name="v")(x)}
            case "two in one":
                value = nn.Dense(1, name="v")(nn.relu(nn.Dense(4, name="hidden")(x)))
                return jnp.concatenate([nn.Dense(3, name="head")(x), value], axis=-1)
            case "several axes":
                return nn.DenseGeneral((2, 3), name="head")(x)
            case "loss":
                logits = nn.log_softmax(nn.Dense(11, name="head")(x))
                return -jnp.mean(jnp.take_along_axis(logits, ids[..., None], axis=-1))
            case "two losses":
                logits = nn.log_softmax(nn.Dense(11, name="head")(x))
                return -jnp.mean(logits[..., 0]) + jnp.mean(x**2)
            case "printed":
                jax.debug.print("{}", x.sum())
                return nn.Dense(11, name="head")(x)
            case "attend":
                return embed.attend(x)
            case "tied":
                return x @ embed.embedding.T
            case "unknown layer":
                return x @ self.param("w", nn.initializers.normal(), (8, 11))
        return x


HEADS = {
    "softmax": {"head"},
    "two results": {"head", "v"},
    "two in one": {"head", "v"},
    "several axes": {"head"},
    "loss": {"head"},
    "printed": {"head"},
    "attend": set(),
    "tied": set(),
    "unknown layer": set(),
    "none": set(),
}


def axes_of(end, scan=False):
    model = Model(end, scan)
    return kernel_axes(model, jax.eval_shape(model.init, KEY, IDS), IDS)


@pytest.mark.parametrize("end", HEADS)
def test_heads(end):
    axes = axes_of(end, scan=end in ("softmax", "none", "attend"))
    assert axes.heads == {f"{name}/kernel" for name in HEADS[end]}
    assert axes.unsure == set()
    assert axes.linear == axes.kernels.keys() - {"embed/embedding"}


def test_what_cannot_be_known_is_asked():
    model = Model("two losses")
    variables = random_variables(model, IDS)
    assert axes_of("two losses").unsure == {"head/kernel"}
    with pytest.raises(ValueError, match=r"whether 'head/kernel' is .*cannot be known.*exclude="):
        lora_init_model(KEY, model, variables, LoraConfig([Rule("all-linear", 2)]), IDS)
    config = LoraConfig([Rule("all-linear", 2, exclude=["head/kernel"])])
    _, adapters = lora_init_model(KEY, model, variables, config, IDS)
    assert set(adapters) == {"layer_0", "layer_1"}


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.Conv(4, (3,), name="conv")(x).mean(-2))


def test_a_model_with_no_other_linear_layer():
    model, x = Convolutions(), jnp.ones((1, 5, 4))
    variables = model.init(KEY, x)
    axes = kernel_axes(model, variables, x)
    assert (axes.linear, axes.heads) == ({"head/kernel"}, {"head/kernel"})
    with pytest.raises(ValueError, match=r"no linear layer .* but output heads: head/kernel"):
        lora_init_model(KEY, model, variables, LoraConfig([Rule("all-linear", 2)]), x)


def test_a_pickled_copy_does_not_know_heads():
    axes = axes_of("softmax")
    copy = pickle.loads(pickle.dumps(axes))
    assert copy == axes
    with pytest.raises(ValueError, match="kernel_axes anew"):
        _ = copy.heads


class Arguments(nn.Module):
    """Of every kind that model.apply takes."""

    @nn.compact
    def encode(self, x, mask, *, train):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(8, name="mix")(x) * mask)
        count = self.variable("cache", "count", lambda: jnp.zeros((), int))
        count.value += 1
        return nn.Dense(3, name="head")(x)


def test_arguments_of_apply():
    model, x, mask = Arguments(), jnp.ones((2, 8)), jnp.ones((2, 1))
    variables = model.init(KEY, x, mask, train=False, method="encode")
    config = LoraConfig([Rule("all-linear", 2, variant="dora")])
    options = {"train": True, "rngs": {"dropout": KEY}, "mutable": ["batch_stats", "cache"]}

    def init(variables):
        return lora_init_model(
            KEY, model, variables, config, x, mask=mask, method="encode", **options
        )

    frozen, adapters = init(variables)
    assert set(adapters) == {"mix"}
    variables = {**variables, "params": frozen}
    y, state = lora_jax.lora_apply(model, variables, adapters, x, mask, method="encode", **options)
    assert (y.shape, set(state)) == ((2, 3), {"batch_stats", "cache"})
    abstract = jax.eval_shape(init, variables)
    assert jax.tree.structure(abstract) == jax.tree.structure((frozen, adapters))


class Chooses(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(8, name="dense")(x))).argmax(-1)


def test_heads_of_integers_are_asked_for():
    variables = Chooses().init(KEY, jnp.ones((2, 4)))
    config = LoraConfig([Rule("all-linear", 2)])
    with pytest.raises(ValueError, match=r"whether 'head/kernel' is .*cannot be known"):
        lora_init_model(KEY, Chooses(), variables, config, jnp.ones((2, 4)))
