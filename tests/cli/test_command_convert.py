"""`lora-jax convert`: what it writes is what Python writes."""

import json

import chex
import jax.numpy as jnp
from cli_folders import with_biases_of_B

import lora_jax
from lora_jax.files._tensors import Tensors


def test_convert_both_ways(folders, call, tmp_path):
    assert call("convert", folders / "own", tmp_path / "p") == (
        0,
        f"{tmp_path / 'p'}: 2 matrices.\n",
    )
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "p" / name).read_bytes() == (folders / "peft" / name).read_bytes()
    assert call("convert", tmp_path / "p", tmp_path / "o")[0] == 0
    assert call("diff", folders / "own", tmp_path / "o")[0] == 0
    params = {"a": {"kernel": jnp.ones((6, 8))}, "b": {"kernel": jnp.ones((8, 3))}}
    chex.assert_trees_all_equal(
        lora_jax.load(tmp_path / "o", params)[1], lora_jax.load(folders / "own", params)[1]
    )
    code, out = call("convert", folders / "own", tmp_path / "p")
    assert code == 1
    assert "exists" in out


def test_biases_of_B_convert_and_differ(split, folders, call, tmp_path):
    frozen, adapters = with_biases_of_B(split)
    lora_jax.save(tmp_path / "o", adapters, frozen=frozen)
    assert call("convert", tmp_path / "o", tmp_path / "p")[0] == 0
    assert call("convert", tmp_path / "p", tmp_path / "again")[0] == 0
    params = frozen
    chex.assert_trees_all_equal(lora_jax.load(tmp_path / "again", params)[1], adapters)
    code, out = call("inspect", tmp_path / "p")
    assert code == 0
    assert "a.bias (added)" in out
    adapters["a"]["bias"] = adapters["a"]["bias"].replace(value=jnp.zeros(8))
    lora_jax.save(tmp_path / "other", adapters)
    lora_jax.peft.save(tmp_path / "other-p", frozen, adapters)
    for one, other in (("o", "other"), ("p", "other-p")):
        assert call("diff", tmp_path / one, tmp_path / one)[0] == 0
        code, out = call("diff", tmp_path / one, tmp_path / other)
        assert code == 1
        assert "bias (added)" in out


def test_convert_with_own_names(folders, call, tmp_path):
    names = tmp_path / "names.json"
    names.write_text(json.dumps([["{layer}/kernel", "model.{layer}.weight"]]))
    assert call("convert", folders / "own", tmp_path / "p", "--names", names)[0] == 0
    keys = set(Tensors(tmp_path / "p" / "adapter_model.safetensors"))
    assert "base_model.model.model.a.lora_A.weight" in keys
    assert call("convert", tmp_path / "p", tmp_path / "o", "--names", names)[0] == 0
    assert call("diff", folders / "own", tmp_path / "o")[0] == 0
