"""What the user says, and what he is told when it cannot be meant so."""

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax.core._config import assign

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
    rules, whole = assign(config, PATHS)
    assert rules == {PATHS[0]: dora, PATHS[2]: rest, PATHS[3]: dora}
    assert whole == {"classifier/kernel", "classifier/bias"}


def test_scale():
    assert lora_jax.Rule("x", 8).scale == 1.0
    assert lora_jax.Rule("x", 8, alpha=16).scale == 2.0
    assert lora_jax.Rule("x", 16, alpha=8, rslora=True).scale == 2.0
    assert lora_jax.Rule("x", 16, rslora=True).scale == 4.0


def test_config_is_hashable_and_immutable():
    config = lora_jax.LoraConfig([lora_jax.Rule("x", 8, batch_axes=[0])], trainable=["y"])
    assert hash(config) == hash(
        lora_jax.LoraConfig([lora_jax.Rule("x", 8, batch_axes=(0,))], trainable=["y"])
    )


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"pattern": "(", "rank": 2}, ValueError, r"'\(' is no valid regular expression"),
        ({"pattern": 3, "rank": 2}, TypeError, "pattern must be a string, got 3"),
        ({"rank": 0}, ValueError, r"Rule\('p'\): rank must be at least 1, got 0"),
        ({"rank": -1}, ValueError, "rank must be at least 1, got -1"),
        ({"rank": 2.0}, TypeError, "rank must be an int, got 2.0"),
        ({"rank": True}, TypeError, "rank must be an int"),
        ({"alpha": 0}, ValueError, "alpha must be positive and finite, got 0"),
        ({"alpha": float("nan")}, ValueError, "alpha must be positive and finite"),
        ({"alpha": "16"}, TypeError, r"Rule\('p'\): alpha must be a number, got '16'"),
        ({"dropout": "0.1"}, TypeError, "dropout must be a number, got '0.1'"),
        ({"std": -1.0}, ValueError, "std must be positive and finite, got -1"),
        ({"variant": "dorra"}, ValueError, r"no variant 'dorra'; there are \['dora', 'lora'\]"),
        ({"zero": "A"}, ValueError, "zero must be 'U' or 'V', got 'A'"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"product": "fast"}, ValueError, "product must be one of .* got 'fast'"),
        ({"product": "merged", "materialize": True}, ValueError, "no product='dense' to choose"),
        ({"product": "merged", "dropout": 0.1}, ValueError, "product='dense' has no dropout"),
        ({"detach_norm": True}, ValueError, "detach_norm is for variant='dora'"),
        ({"fused": 3, "parts": (0, 0)}, ValueError, "each once, as fused is 3"),
        ({"fused": 3, "parts": (3,)}, ValueError, "some of 0 to 2"),
        ({"fused": 3, "parts": ()}, ValueError, "some of 0 to 2"),
        ({"fused": 0}, ValueError, "fused must be at least 1"),
        ({"input_axes": 0}, TypeError, "input_axes must be a tuple of ints"),
        ({"materialize": "no"}, TypeError, "materialize must be a bool, got 'no'"),
        ({"materialize": True, "dropout": 0.1}, ValueError, "materialize=True has no dropout"),
        ({"materialize": True, "tied": "untie"}, ValueError, "one use of a parameter"),
        ({"tied": "materialize", "dropout": 0.1}, ValueError, "rule of their own"),
        ({"tied": True}, ValueError, "tied must be 'materialize', 'untie' or None"),
        ({"dropout": None}, TypeError, "dropout must be a number, got None"),
        ({"alpha": True}, TypeError, "alpha must be a number, got True"),
        ({"batch_axes": 0}, TypeError, "batch_axes must be a tuple of ints, got 0"),
        ({"batch_axes": ("layers",)}, TypeError, "batch_axes must be a tuple of ints"),
    ],
)
def test_bad_rules(arguments, error, match):
    with pytest.raises(error, match=match):
        lora_jax.Rule(**{"pattern": "p", "rank": 2, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({}, ValueError, "would train nothing"),
        ({"rules": lora_jax.Rule("x", 2)}, TypeError, r"is a list; write rules=\["),
        ({"rules": [".*/kernel"]}, TypeError, r"'\.\*/kernel', which is no Rule"),
        ({"trainable": "head/.*"}, TypeError, r"is a list; write trainable=\['head/\.\*'\]"),
        ({"trainable": ["["]}, ValueError, r"'\[' is no valid regular expression"),
    ],
)
def test_bad_configs(arguments, error, match):
    with pytest.raises(error, match=match):
        lora_jax.LoraConfig(**arguments)


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
