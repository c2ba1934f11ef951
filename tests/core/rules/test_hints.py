"""The likeliest first mistakes, in the spellings of PEFT, qwix and Flax: each gets its hint."""

import inspect
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import lora_jax
from lora_jax import LoraConfig, Rule, lora_init, lora_init_model
from lora_jax.core.rules._hints import meant


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, v = nn.Dense(8, name="query")(x), nn.Dense(8, name="value")(x)
        return x + nn.Dense(8, name="output")(q * v)


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = Layer(name=f"layer_{i}")(x)
        return x


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="classifier")(Encoder(name="encoder")(x))


KEY, MODEL, X = jax.random.key(0), Model(), np.ones((2, 8), np.float32)
SHAPES = jax.eval_shape(MODEL.init, KEY, X)
VARIABLES = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), SHAPES)
PARAMS = VARIABLES["params"]
CONFIG = LoraConfig([Rule(".*/kernel", rank=2)])
STATE = TrainState.create(apply_fn=MODEL.apply, params=PARAMS, tx=optax.sgd(0.1))


def init(*rules, trainable=()):
    lora_init(KEY, PARAMS, LoraConfig(rules, trainable))


def init_model(**rule):
    config = LoraConfig([Rule(**{"pattern": "all-linear", "rank": 2, **rule})])
    lora_init_model(KEY, MODEL, VARIABLES, config, X)


MISTAKES = {
    "part of a path": (
        lambda: init(Rule("query", rank=8)),
        "Did you mean '.*query/kernel'? It matches 'encoder/layer_0/query/kernel' and 1 more.",
    ),
    "end of a path": (
        lambda: init(Rule("query/kernel", rank=8)),
        "Did you mean '.*query/kernel'? It matches 'encoder/layer_0/query/kernel' and 1 more.",
    ),
    "the leaf": (lambda: init(Rule("kernel", rank=2)), "Did you mean '.*kernel'?"),
    "a misprint": (
        lambda: init(Rule(r".*layer_[01]/qeury/kernel", rank=8)),
        "Did you mean '.*layer_[01]/query/kernel'?",
    ),
    "a glob": (lambda: Rule("*.kernel", rank=8), "Was it meant as a glob? Then write '.*/kernel'."),
    "another glob": (
        lambda: init(Rule("encoder/*/kernel", rank=8)),
        "Did you mean 'encoder/.*/kernel'?",
    ),
    "PyTorch's name": (lambda: init(Rule("q_proj", rank=8)), "Did you mean '.*query/kernel'?"),
    "PyTorch's names": (
        lambda: init(Rule("q_proj|v_proj", rank=8)),
        "Did you mean '.*(query|value)/kernel'?",
    ),
    "a list": (
        lambda: Rule(["q_proj", "v_proj"], rank=8),
        "must be a string, got ['q_proj', 'v_proj']. Write one for all: "
        "'.*(q_proj|v_proj)/kernel'.",
    ),
    "r": (lambda: Rule(pattern="query", r=8), "Rule has no r. Here r is rank=."),
    "alpha and dropout": (
        lambda: Rule("query", rank=8, lora_alpha=16, lora_dropout=0.1),
        "Here lora_alpha is alpha=; lora_dropout is dropout=.",
    ),
    "PEFT's config": (
        lambda: LoraConfig(r=8, target_modules=["query"]),
        "LoraConfig has no r, target_modules. Here a rule says it, LoraConfig([Rule(pattern, "
        "rank=8)]): r is rank=; target_modules is the pattern",
    ),
    "rank of a config": (
        lambda: LoraConfig(rank=8),
        "LoraConfig has no rank. Here a rule says it, LoraConfig([Rule(pattern, rank=8)]).",
    ),
    "modules to save": (
        lambda: LoraConfig(modules_to_save=["head"]),
        "modules_to_save is trainable=, a list of patterns.",
    ),
    "pattern for rules": (
        lambda: LoraConfig("kernel"),
        "is a list of Rules, got 'kernel'; write rules=[Rule('kernel', rank=8)].",
    ),
    "patterns for rules": (
        lambda: LoraConfig(["kernel"]),
        "holds 'kernel', which is not a Rule; write rules=[Rule('kernel', rank=8)].",
    ),
    "no rank": (lambda: Rule("kernel"), "missing 1 required positional argument: 'rank'"),
    "no model": (
        lambda: init(Rule("all-linear", rank=8)),
        "known from the model only. Use lora_jax.lora_init_model(key, model, variables, config, "
        "*args), or pass axes=lora_jax.kernel_axes(model, variables, *args).",
    ),
    "all_linear": (lambda: init(Rule("all_linear", rank=8)), "Did you mean 'all-linear'?"),
    "dots": (
        lambda: init(Rule("encoder.layer_0.query", rank=8)),
        "Did you mean 'encoder/layer_0/query/kernel'?",
    ),
    "PyTorch's path": (
        lambda: init(Rule("encoder.layer_0.query.weight", rank=8)),
        "Did you mean 'encoder/layer_0/query/kernel'?",
    ),
    "leading slash": (
        lambda: init(Rule("/encoder/layer_0/query/kernel", rank=8)),
        "Did you mean 'encoder/layer_0/query/kernel'?",
    ),
    "params/": (lambda: init(Rule("params/.*/kernel", rank=2)), "Did you mean '.*/kernel'?"),
    "variables": (lambda: lora_init(KEY, VARIABLES, CONFIG), "pass variables['params']"),
    "TrainState": (lambda: lora_init(KEY, STATE, CONFIG), "got TrainState: pass its .params."),
    "config as a dict": (
        lambda: lora_init(KEY, PARAMS, {"rank": 8}),
        "config must be a LoraConfig, got dict; write lora_jax.LoraConfig([lora_jax.Rule(",
    ),
    "no key": (
        lambda: lora_init(PARAMS, CONFIG),
        "A random key comes first, lora_init(key, params, config), as key = jax.random.key(0); got "
        "dict.",
    ),
    "key second": (lambda: lora_init(PARAMS, KEY, CONFIG), "A random key comes first"),
    "a seed": (lambda: lora_init(0, PARAMS, CONFIG), "key must be a JAX random key"),
    "use_dora": (
        lambda: Rule("query", rank=8, use_dora=True),
        "Rule has no use_dora. Here use_dora is variant='dora'.",
    ),
    "DoRA": (lambda: Rule("query", rank=8, variant="DoRA"), "Did you mean 'dora'?"),
    "alpha 0": (
        lambda: Rule("query", rank=8, alpha=0),
        "alpha must be positive and finite, got 0. Leave it out for the scale 1.",
    ),
    "rank of a small kernel": (
        lambda: init(Rule(".*/kernel", rank=8)),
        "matches 'classifier/kernel', of shape (8, 3): rank 8 is above min(d, k) = 3. Give it a "
        "rule with a lower rank before this one",
    ),
    "adapted and fully trained": (
        lambda: init(Rule("classifier/kernel", rank=2), trainable=["classifier/.*"]),
        "'classifier/kernel' has trainable pattern 'classifier/.*'. Those leaves would be both",
    ),
    "module as trainable": (
        lambda: init(trainable=["classifier"]),
        "Did you mean 'classifier/.*'? It matches 'classifier/bias' and 1 more.",
    ),
    "params for variables": (
        lambda: lora_init_model(KEY, MODEL, PARAMS, CONFIG, X),
        "which have the collection 'params' and others beside it; got dict. Pass {'params': ",
    ),
    "TrainState for variables": (
        lambda: lora_init_model(KEY, MODEL, STATE, CONFIG, X),
        "got TrainState. Pass {'params': params}",
    ),
    "model first": (
        lambda: lora_init_model(MODEL, VARIABLES, CONFIG, X),
        "A random key comes first, lora_init_model(key, model, variables, config, *args)",
    ),
    "input for config": (
        lambda: lora_init_model(KEY, MODEL, VARIABLES, X),
        "config must be a LoraConfig, got ndarray",
    ),
    "layers by number": (lambda: init_model(only=[0]), "only: a pattern must be a string, got 0"),
    "only a part": (lambda: init_model(only=["layer_0"]), "Did you mean '.*layer_0/.*'?"),
    "exclude a part": (lambda: init_model(exclude=["value"]), "Did you mean '.*value/.*'?"),
    "exclude one": (lambda: init_model(exclude="value"), "is a list; write exclude=['value']"),
    "exclude all": (
        lambda: init_model(only=[".*query/.*"], exclude=["encoder/.*"]),
        "leave none of encoder/layer_0/output/kernel, encoder/layer_0/query/kernel, ",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name):
    mistake, hint = MISTAKES[name]
    with pytest.raises((TypeError, ValueError), match=re.escape(hint)) as caught:
        mistake()
    suggested = re.search(r"Did you mean '(.*?)'\? It matches '(.*?)'", str(caught.value))
    if suggested:  # what is suggested works
        assert re.fullmatch(suggested[1], suggested[2])


def test_paths_that_hold_the_pattern_are_nearest():
    with pytest.raises(ValueError, match=r"Nearest paths: encoder/layer_0/value/bias, .*value"):
        init(Rule("value", rank=2))
    assert meant("nowhere", ["encoder/query/kernel"]) == ("", [])


def test_a_layer_is_not_all_whose_numbers_begin_so():
    layers = [f"layer_{i}/query/{leaf}" for i in (1, 10) for leaf in ("kernel", "bias")]
    for pattern in ("layer_1", "encoder/layer_1", "layer_1/.*"):
        paths = [f"encoder/{path}" for path in layers]
        assert meant(pattern, paths)[1] == ["encoder/layer_1/query/kernel"], pattern


def test_signatures_are_those_of_the_fields():
    assert list(inspect.signature(Rule).parameters)[:4] == ["pattern", "rank", "only", "exclude"]
    assert list(inspect.signature(LoraConfig).parameters) == ["rules", "trainable"]
    assert list(inspect.signature(lora_init).parameters) == ["key", "params", "config", "axes"]


@pytest.mark.parametrize(
    ("rule", "adapted"),
    [
        ({}, {f"layer_{i}/{name}" for i in (0, 1) for name in ("query", "value", "output")}),
        ({"only": [".*/layer_0/.*"]}, {"layer_0/query", "layer_0/value", "layer_0/output"}),
        (
            {"only": [".*/layer_0/.*", ".*/query/.*"], "exclude": [".*/(value|output)/.*"]},
            {"layer_0/query", "layer_1/query"},
        ),
        (
            {"pattern": ".*/kernel", "exclude": ["classifier/.*", ".*1/.*", ".*/q.*"]},
            {"layer_0/value", "layer_0/output"},
        ),
    ],
    ids=["all", "only", "both", "pattern"],
)
def test_only_and_exclude(rule, adapted):
    config = LoraConfig([Rule(**{"pattern": "all-linear", "rank": 2, **rule})])
    split = lora_init_model(KEY, MODEL, VARIABLES, config, X)
    report = lora_jax.summary(*split, config=config, axes=lora_jax.kernel_axes(MODEL, VARIABLES, X))
    assert {row.path for row in report.rows} == {f"encoder/{path}/kernel" for path in adapted}
    assert set(report.rules[0].adapted) == {row.path for row in report.rows}


def test_a_rule_before_adapts_the_head_too():
    config = LoraConfig([Rule("classifier/kernel", rank=1), Rule("all-linear", rank=2)])
    _, adapters = lora_init_model(KEY, MODEL, VARIABLES, config, jnp.asarray(X))
    assert adapters["classifier"]["kernel"].rank == 1
