"""Which rule each path has."""

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax.core.rules._match_paths import assign

PATHS = [
    "encoder/layer_0/query/kernel",
    "encoder/layer_0/query/bias",
    "encoder/layer_0/value/kernel",
    "encoder/layer_1/query/kernel",
    "classifier/kernel",
    "classifier/bias",
]


def test_first_match_wins_and_trainable_is_an_exception():
    dora = lora_jax.Rule(r".*/query/kernel", rank=8, alpha=16.0, variant="dora")
    rest = lora_jax.Rule(r".*/kernel", rank=4)
    config = lora_jax.LoraConfig(rules=[dora, rest], trainable=[r"classifier/.*"])
    rules, trainable = assign(config, PATHS)
    assert rules == {PATHS[0]: dora, PATHS[2]: rest, PATHS[3]: dora}
    assert trainable == {"classifier/kernel", "classifier/bias"}


@pytest.mark.parametrize(
    ("rules", "trainable", "match"),
    [
        (
            [".*/qeury/kernel"],
            [],
            r"Rule\('\.\*/qeury/kernel'\) matches no parameter.*Nearest.*layer_0/query/kernel",
        ),
        # search is not fullmatch
        (["query"], [], r"Rule\('query'\) matches no parameter.*query/kernel"),
        ([], ["head/.*"], r"trainable pattern 'head/\.\*' matches no parameter"),
        (
            [".*/kernel", ".*/query/kernel"],
            [],
            r"Rule\('\.\*/query/kernel'\) never has a leaf.*'encoder/layer_0/query/kernel' has "
            r"Rule\('\.\*/kernel'\).*more special rule first",
        ),
        (
            ["classifier/kernel"],
            ["classifier/.*"],
            r"'classifier/kernel' has trainable pattern.*both adapted and fully trained",
        ),
    ],
)
def test_patterns_without_a_leaf(rules, trainable, match):
    params = {}
    for path in PATHS:
        *parents, name = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jnp.ones((4, 4))
    config = lora_jax.LoraConfig([lora_jax.Rule(p, 2) for p in rules], trainable)
    with pytest.raises(ValueError, match=match):
        lora_jax.lora_init(jax.random.key(0), params, config)
