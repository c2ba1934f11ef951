"""The errors that the README shows are the errors that a user sees."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax import LoraConfig, Rule


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
    readme = Path(__file__).parent.parent / "README.md"
    with pytest.raises(ValueError, match=r"Rule|adapter") as caught:
        mistake(MODEL.init(KEY, X)["params"])
    shown = f"ValueError: {caught.value}"
    assert " ".join(shown.split()) in " ".join(readme.read_text().split())
