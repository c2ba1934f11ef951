"""The biases of PEFT's ``B``: read, trained, merged and saved."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_like
from peft_folders import (
    FILE,
    IDS,
    NAMES,
    RULES,
    UP,
    Model,
    adapted,
    edit_config,
    edit_tensors,
    load,
)

import lora_jax
from lora_jax.files._tensors import Tensors, encode

ADAPTED = ("layers.0.up", "layers.1.up", "layers.2.up", "heads", "conv")


@pytest.fixture
def biased(model, tmp_path):
    """A folder as PEFT writes it with lora_bias=True."""
    folder = tmp_path / "biased"
    frozen, adapters = adapted(model, RULES["lora"])
    lora_jax.peft.save(folder, frozen, adapters, names=NAMES, axes=model[1])
    rng = np.random.default_rng(1)
    added = {
        f"base_model.model.model.{module}.lora_B.bias": rng.standard_normal(6, np.float32)
        for module in ADAPTED
    }
    tensors = dict(Tensors(folder / FILE)) | added
    (folder / FILE).write_bytes(encode(tensors, {"format": "pt"}))
    file = folder / "adapter_config.json"
    file.write_bytes(file.read_bytes().replace(b'"lora_bias": false', b'"lora_bias": true'))
    return folder


def test_biases_of_B(biased, model, tmp_path):
    """They come back bit for bit, trained further or not, and compute W x + b + s (B A x + b_B)."""
    params, axes = model
    frozen, adapters = load(biased, model)
    assert frozen["layers"]["up"]["bias"] is params["layers"]["up"]["bias"]
    lora_bias = adapters["layers"]["up"]["bias"]
    assert lora_bias.scale == adapters["layers"]["up"]["kernel"].scale == 1.5
    lora_jax.peft.save(tmp_path / "again", frozen, adapters, names=NAMES, axes=axes)
    for file in biased.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()

    merged = lora_jax.lora_merge(frozen, adapters)
    expected = params["layers"]["up"]["bias"] + 1.5 * lora_bias.value
    chex.assert_trees_all_equal(merged["layers"]["up"]["bias"], expected)
    logits = lora_jax.lora_apply(Model(), {"params": frozen}, adapters, IDS)
    assert jnp.allclose(logits, Model().apply({"params": merged}, IDS), atol=1e-5)
    row = lora_jax.summary(frozen, adapters).rows[-2]
    assert (row.path, row.variant, row.scale, row.trained) == (
        "layers/up/bias",
        "lora_bias",
        1.5,
        18,
    )
    assert lora_jax.rounding(frozen, adapters)["heads/bias"].largest == 0

    trained = random_like(adapters, seed=3)
    lora_jax.peft.save(tmp_path / "trained", frozen, trained, names=NAMES, axes=axes)
    chex.assert_trees_all_equal(load(tmp_path / "trained", model)[1], trained)
    lora_jax.save(tmp_path / "own", trained, frozen=frozen)
    again = lora_jax.load(tmp_path / "own", params, verify=True)
    chex.assert_trees_all_equal(again, (frozen, trained))
    assert jax.tree.structure(again[1]) == jax.tree.structure(trained)
    lora_jax.export(tmp_path / "merged", frozen, trained, names=NAMES, axes=axes)
    lora_jax.export(tmp_path / "plain", lora_jax.lora_merge(frozen, trained), {})
    bias = Tensors(tmp_path / "plain")["layers/up/bias"][1]
    assert np.array_equal(Tensors(tmp_path / "merged")["model.layers.1.up.bias"], bias)


def test_a_lora_bias_is_trained_as_in_peft(biased, model):
    """Its gradient is s times that of the bias, and the bias may be in a box."""
    frozen, adapters = load(biased, model)

    def loss(adapters, frozen):
        return jnp.sum(lora_jax.lora_apply(Model(), {"params": frozen}, adapters, IDS) ** 2)

    got, bias = jax.grad(loss, argnums=(0, 1))(adapters, frozen)
    for layer in ("heads", "conv"):
        assert jnp.allclose(got[layer]["bias"].value, 1.5 * bias[layer]["bias"], rtol=1e-5)
        assert jnp.abs(got[layer]["bias"].value).max() > 0
    boxed = jax.tree.map(lambda x: x, frozen)
    boxed["conv"]["bias"] = nn.Partitioned(frozen["conv"]["bias"], names=("model",))
    merged = lora_jax.lora_merge(boxed, adapters)["conv"]["bias"]
    assert isinstance(merged, nn.Partitioned)
    chex.assert_trees_all_equal(merged.value, lora_jax.lora_merge(frozen, adapters)["conv"]["bias"])


def test_lora_biases_are_not_stacked(biased, model):
    _, adapters = load(biased, model)
    with pytest.raises(ValueError, match=r"adds something to '.*/bias' .*serve it apart"):
        lora_jax.stack([adapters, adapters], model[0])


def test_a_lora_bias_of_half_precision_is_rounded_once(biased, model):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model[0])
    frozen, adapters = lora_jax.peft.load(biased, half, names=NAMES, axes=model[1])
    lora_bias, base = adapters["heads"]["bias"], frozen["heads"]["bias"]
    merged = lora_jax.lora_merge(frozen, adapters)["heads"]["bias"]
    assert lora_bias.value.dtype == jnp.float32
    assert jnp.array_equal(
        merged, (base.astype(jnp.float32) + 1.5 * lora_bias.value).astype(jnp.bfloat16)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["heads"].pop("bias"), "for all adapted modules .* a bias of 'model.heads'"),
        (lambda a: a["heads"].update(bias=a["heads"]["bias"].replace(scale=2.0)), "one for both"),
        (lambda a: a["head"].update(bias=a["conv"]["bias"]), r"is \(6,\), but the base has \(4,\)"),
        (
            lambda a: a["head"].update(bias=lora_jax.LoraBias(jnp.ones(4), 1.5)),
            "added to 'head/bias', which PEFT has for biases of adapted",
        ),
        (lambda a: a.update(new={"bias": lora_jax.LoraBias(jnp.ones(4))}), "which frozen lacks"),
    ],
)
def test_lora_biases_that_peft_has_not(biased, model, tmp_path, change, message):
    frozen, adapters = load(biased, model)
    frozen["head"] = model[0]["head"]
    del adapters["head"]
    adapters["head"] = {}
    change(adapters)
    with pytest.raises(ValueError, match=message):
        lora_jax.peft.save(tmp_path / "new", frozen, adapters, names=NAMES, axes=model[1])


def test_dora_has_no_biases_of_B(saved, model, tmp_path):
    _, frozen, adapters = saved
    for name in ("heads", "conv"):
        adapters[name]["bias"] = lora_jax.LoraBias(jnp.ones(model[0][name]["bias"].shape))
    with pytest.raises(ValueError, match="no DoRA with lora_bias"):
        lora_jax.peft.save(tmp_path / "new", frozen, adapters, names=NAMES, axes=model[1])


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"bias": "all"}, lambda t: None, "trains every bias twice"),
        ({}, lambda t: t.pop(f"{UP}.lora_B.bias"), "'model.layers.0.up' has A, B, but by"),
        ({}, lambda t: t.update({f"{UP}.lora_B.bias": np.ones(5)}), "'model.layers.0.up.bias' is"),
        ({"modules_to_save": ["head", "up"]}, lambda t: None, "lacks .*of modules_to_save"),
        (
            {"alpha_pattern": {"layers.0.up": 4}, "rank_pattern": {"layers.0.up": 2}},
            lambda t: None,
            "different ranks and alphas",
        ),
    ],
)
def test_biases_of_B_that_do_not_fit(biased, model, config, change, message):
    edit_config(biased, **config)
    edit_tensors(biased, change)
    with pytest.raises(ValueError, match=message) as caught:
        load(biased, model)
    assert str(biased) in str(caught.value)


def test_a_layer_without_a_bias_says_so(biased, model):
    names = [name for name in NAMES if "bias" not in name[0]]
    with pytest.raises(ValueError, match=r"no bias that it could be added to.*use_bias=True"):
        lora_jax.peft.load(biased, model[0], names=names, axes=model[1])


@pytest.mark.parametrize("ids", [1, [0, 1], [-1, 1]])
def test_what_is_as_long_as_a_stack_is_not_one(ids):
    """Two numbers for a bias of two, which would be one for each of two adapters."""
    model, x = nn.Dense(2), jnp.ones((2, 3))
    params = model.init(jax.random.key(0), x)["params"]
    adapters = {"bias": lora_jax.LoraBias(jnp.array([10.0, 20.0]))}
    with pytest.raises(ValueError, match=r"adds something to 'bias'.*cannot be stacked: serve it"):
        lora_jax.lora_apply(model, {"params": params}, adapters, x, adapter_ids=jnp.array(ids))
    y = lora_jax.lora_apply(model, {"params": params}, adapters, x)
    assert jnp.allclose(y, model.apply({"params": params}, x) + jnp.array([10.0, 20.0]))
