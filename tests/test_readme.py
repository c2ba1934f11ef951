"""What the README shows is what a user sees: its code runs, its errors are real."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from helpers import relative_error
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import lora_jax
from lora_jax import LoraConfig, Rule

README = Path(__file__).parent.parent / "README.md"


def test_code():
    """All blocks in one process, since each goes on from the one before."""
    document = Sybil([PythonCodeBlockParser()]).parse(README)
    examples = list(document.examples())
    assert len(examples) == 15
    for example in examples:
        example.evaluate()
    document.namespace["batches"] = []  # once more: resumes where it has ended, and takes no step
    examples[-1].evaluate()
    assert int(document.namespace["state"].step) == 6
    table = lora_jax.summary(document.namespace["frozen"], document.namespace["adapters"])
    assert str(table) in README.read_text()


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(16, (3,), name="mix")(nn.Dense(16, name="query")(x))


class Net(nn.Module):
    def setup(self):
        self.encoder = Block()
        self.head = nn.Dense(3)

    def __call__(self, x):
        return self.head(self.encoder(x))

    def encode(self, x):
        return self.encoder(x)


MODEL, X, KEY = Net(), jnp.ones((2, 5, 16)), jax.random.key(0)


def pattern_matches_nothing(params):
    lora_jax.lora_init(KEY, params, LoraConfig([Rule(".*/qeury/kernel", 8)]))


def rule_never_wins(params):
    rules = [Rule(".*query/kernel", 8), Rule("encoder/query/kernel", 4)]
    lora_jax.lora_init(KEY, params, LoraConfig(rules))


def adapter_is_not_used(params):
    config = LoraConfig([Rule(".*(query|head)/kernel", 2)])
    frozen, adapters = lora_jax.lora_init(KEY, params, config)
    adapters = {"head": adapters["head"]}
    lora_jax.lora_apply(MODEL, {"params": frozen}, adapters, X, method="encode")


@pytest.mark.parametrize("mistake", [pattern_matches_nothing, rule_never_wins, adapter_is_not_used])
def test_error(mistake):
    with pytest.raises(ValueError, match=r"Rule|adapter") as caught:
        mistake(MODEL.init(KEY, X)["params"])
    shown = f"ValueError: {caught.value}"
    assert " ".join(shown.split()) in " ".join(README.read_text().split())


class Encoder(nn.Module):
    """Attention, whose kernels have three axes."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.LayerNorm()(x))
        return nn.Dense(3, name="head")(nn.LayerNorm()(x))


class Convolutions(nn.Module):
    """With BatchNorm, so with another collection."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3,), name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(8, name="mix")(x)))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(16, name="up")(x))), None


class Decoder(nn.Module):
    """Layers in one scan, each with remat."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(3, name="head")(nn.LayerNorm()(x))


class Dropout(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dropout(0.1, deterministic=not train)(nn.relu(nn.Dense(8, name="mix")(x)))
        return nn.Dense(3, name="head")(x)


@pytest.mark.parametrize(
    ("model", "adapted"),
    [
        (Encoder(), {"attention"}),
        (Convolutions(), {"mix"}),
        (Decoder(), {"layers"}),
        (Dropout(), {"mix"}),
    ],
    ids=["encoder", "convolutions", "decoder", "dropout"],
)
def test_recipe(model, adapted):
    """The first recipe, as written, for models of every kind: adapted are all but the head."""
    document = Sybil([PythonCodeBlockParser()]).parse(README)
    setting, _, recipe = list(document.examples())[:3]
    setting.evaluate()
    document.namespace["model"] = model
    recipe.evaluate()
    state, frozen = document.namespace["state"], document.namespace["frozen"]
    assert set(state.params) == adapted
    assert int(state.step) == 3
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    variables, x = document.namespace["variables"], document.namespace["x"]
    merged = {**variables, "params": lora_jax.lora_merge(frozen, state.params)}
    y = lora_jax.lora_apply(model, {**variables, "params": frozen}, state.params, x)
    assert relative_error(y, model.apply(merged, x)) < 1e-5
    assert relative_error(y, model.apply(variables, x)) > 1e-4
