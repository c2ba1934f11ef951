"""What the README shows is what a user sees: its code runs, its errors are real."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import lora_jax
from lora_jax import LoraConfig, Rule

README = Path(__file__).parent.parent / "README.md"


def test_code():
    """All blocks in one process, since each goes on from the one before."""
    document = Sybil([PythonCodeBlockParser()]).parse(README)
    examples = list(document.examples())
    assert len(examples) == 14
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
