"""Adapters of parameters by themselves: which they are for, without the model."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from cli_folders import KEY
from helpers import random_like, relative_error

import lora_jax
from lora_jax.files._tensors import Tensors

# Shapes of experts, in and out: alike, square, each the other's transpose, and as in Mixtral.
SHAPES = {
    "alike": (5, 6, 5, 6),
    "square": (5, 5, 5, 5),
    "mutual": (5, 6, 6, 5),
    "one": (5, 8, 4, 5),
}


@pytest.fixture
def experts(tmp_path):
    """Makes adapters of experts in both formats, and their base with both names."""

    def make(shapes, transposed=False):
        a, b, c, d = SHAPES[shapes]
        params = {
            "moe": {"up": jnp.ones((3, a, b)), "down": jnp.ones((3, c, d))},
            "dense": {"kernel": jnp.ones((5, 4))},
        }
        kind = "experts_transposed" if transposed else "experts"
        names = [(f"moe/{n}", f"model.moe.{n}", kind) for n in ("up", "down")]
        names += [("dense/kernel", "model.dense.weight")]
        axes = {f"moe/{n}": lora_jax.KernelAxes((1,), (2,), (0,)) for n in ("up", "down")}
        rules = [lora_jax.Rule("moe/.*", rank=2, alpha=3.0), lora_jax.Rule("dense/.*", rank=1)]
        config = lora_jax.LoraConfig(rules)
        split = lora_jax.lora_init(KEY, random_like(params), config, axes=axes)
        frozen, adapters = split[0], random_like(split[1], scale=1.0)
        lora_jax.save(tmp_path / "own", adapters)
        lora_jax.peft.save(tmp_path / "peft", frozen, adapters, names=names, axes=axes)
        lora_jax.export(tmp_path / "base", frozen, {}, names=names, axes=axes)
        lora_jax.export(tmp_path / "expected", frozen, adapters, names=names, axes=axes)
        (tmp_path / "names.json").write_text(json.dumps(names))
        return tmp_path

    return make


@pytest.mark.parametrize("transposed", [False, True], ids=["out by in", "in by out"])
@pytest.mark.parametrize("shapes", SHAPES)
def test_merge_of_experts(experts, call, shapes, transposed):
    folder = experts(shapes, transposed)

    def check(out, *options):
        code, text = call("merge", *options[:2], folder / out, *options[2:])
        assert code == 0, text
        expected, merged = Tensors(folder / "expected"), Tensors(folder / out)
        assert set(merged) == set(expected)
        for name, array in expected.items():
            assert relative_error(merged[name], array) < 1e-6
        assert "model.moe.up" in text

    check("of own", folder / "own", folder / "base", "--names", folder / "names.json")
    order = ("--experts", "up", "down")
    layout = ("--layout", "in-out" if transposed else "out-in")
    check("by order", folder / "peft", folder / "base", *order, *layout)
    code, out = call("merge", folder / "peft", folder / "base", folder / "m")
    if shapes == "one":
        assert code == 0
        assert (folder / "m").read_bytes() == (folder / "by order").read_bytes()
    else:
        assert code == 1
        assert "in several ways, and the files do not say which" in out
    if shapes in ("mutual", "alike"):
        check("by order alone", folder / "peft", folder / "base", *order)


def test_merge_of_experts_rounds_each_by_chance(experts, call):
    folder = experts("square")
    base = {n: x.astype(jnp.bfloat16) for n, x in Tensors(folder / "base").items()}
    safetensors.numpy.save_file(base, folder / "16")
    options = ("--experts", "up", "down", "--layout", "out-in")
    for out, seed in (("a", ()), ("b", ("--seed", "0"))):
        assert call("merge", folder / "peft", folder / "16", folder / out, *options, *seed)[0] == 0
    near, chance = (Tensors(folder / n)["model.moe.up"].astype(np.float32) for n in "ab")
    expected = Tensors(folder / "expected")["model.moe.up"]
    assert relative_error(near, expected) < 2**-7
    assert relative_error(chance, expected) < 2**-6
    assert not np.array_equal(near, chance)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layout", "in-out"), "for the parameters that --experts names"),
        (("--experts", "gate"), "--experts names 'gate', but"),
        (("--experts", "down", "up", "--layout", "out-in"), "do not fit the base's"),
    ],
)
def test_experts_that_do_not_fit(experts, call, options, message):
    folder = experts("one")
    code, out = call("merge", folder / "peft", folder / "base", folder / "m", *options)
    assert code == 1
    assert message in out


def test_experts_that_are_missing(experts, call):
    folder = experts("one")
    file = folder / "peft" / "adapter_model.safetensors"
    tensors = {n: x for n, x in Tensors(file).items() if ".base_layer." not in n}
    safetensors.numpy.save_file(tensors, file)
    code, out = call("merge", folder / "peft", folder / "base", folder / "m")
    assert code == 1
    assert "has 1 adapters of 'model.moe', but by target_parameters" in out
