"""Who says whether PyTorch stores a weight (in, out): the layer's class, never its name."""

import json

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_like, random_variables
from peft_folders import FILE, One

import lora_jax
from lora_jax.files._tensors import Tensors
from lora_jax.peft import FAMILIES

C_PROJ_A = "base_model.model.h.c_proj.lora_A.weight"


def conv1d_or_dense(k, bias, input_axes=None):
    """A layer that is called as GPT-2's are, adapted."""
    layer = {"kernel": jnp.ones((6, k))} | ({"bias": jnp.ones(bias)} if bias else {})
    params = random_like({"h": {"c_proj": layer}, "head": {"kernel": jnp.ones((k, 4))}})
    rule = lora_jax.Rule(".*/kernel", rank=2, input_axes=input_axes)
    return lora_jax.lora_init(jax.random.key(0), params, lora_jax.LoraConfig([rule]))


@pytest.mark.parametrize(
    ("k", "bias", "axes"),
    [
        (6, 6, {"h/c_proj/kernel": lora_jax.KernelAxes()}),
        (6, None, None),  # every Conv1D has a bias
        (5, 5, None),  # which is of its outputs
    ],
)
def test_a_linear_layer_that_is_called_as_gpt2s(k, bias, axes, tmp_path):
    frozen, adapters = conv1d_or_dense(k, bias)
    lora_jax.peft.save(tmp_path, frozen, adapters, axes=axes)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["fan_in_fan_out"] is False
    A = Tensors(tmp_path / FILE)[C_PROJ_A]
    assert np.array_equal(A, adapters["h"]["c_proj"]["kernel"].U.T)
    chex.assert_trees_all_equal(lora_jax.peft.load(tmp_path, frozen, axes=axes)[1], adapters)


def test_an_adapter_knows_its_own_axes(tmp_path):
    frozen, adapters = conv1d_or_dense(6, 6, input_axes=(1,))
    lora_jax.peft.save(tmp_path, frozen, adapters)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["fan_in_fan_out"] is True


def test_a_layer_that_may_be_either_is_refused(tmp_path):
    frozen, adapters = conv1d_or_dense(6, 6)
    message = r"'h/c_proj/kernel' of shape \(6, 6\) may be of a FlaxConv1D.*Pass axes="
    with pytest.raises(ValueError, match=message):
        lora_jax.peft.save(tmp_path / "x", frozen, adapters)
    axes = {"h/c_proj/kernel": lora_jax.KernelAxes()}
    lora_jax.peft.save(tmp_path / "x", frozen, adapters, axes=axes)
    with pytest.raises(ValueError, match=message):
        lora_jax.peft.load(tmp_path / "x", frozen)
    # One that is not adapted does not matter, and fully trained both are PyTorch's transposed.
    rest = {"head": adapters["head"]}
    lora_jax.peft.save(tmp_path / "y", frozen, rest)
    chex.assert_trees_all_equal(lora_jax.peft.load(tmp_path / "y", frozen)[1], rest)
    lora_jax.export(tmp_path / "z", frozen, {}, names="transformers")
    kernel = frozen["h"]["c_proj"]["kernel"]
    assert np.array_equal(Tensors(tmp_path / "z")["h.c_proj.weight"], kernel.T)


def test_a_name_may_say_it(tmp_path):
    """Its kind says how PyTorch stores it, and its axes how Flax does."""
    frozen, adapters = conv1d_or_dense(6, 6)
    rest = [("head/kernel", "head.weight"), ("h/c_proj/bias", "h.c_proj.bias", "plain")]
    kernel, A = frozen["h"]["c_proj"]["kernel"], adapters["h"]["c_proj"]["kernel"].U.T
    conv1d = ("h/c_proj/kernel", "h.c_proj.weight", "conv1d")
    for name in (
        ("h/c_proj/kernel", "h.c_proj.weight"),
        (*conv1d, lora_jax.KernelAxes()),
        ("h/c_proj/kernel", "h.c_proj.weight", "weight", lora_jax.KernelAxes()),
    ):
        lora_jax.peft.save(tmp_path / "x", frozen, adapters, names=[name, *rest])
        assert np.array_equal(Tensors(tmp_path / "x" / FILE)[C_PROJ_A], A)
        lora_jax.export(tmp_path / "y", frozen, {}, names=[name, *rest])
        expected = kernel if name[2:3] == ("conv1d",) else kernel.T
        assert np.array_equal(Tensors(tmp_path / "y")["h.c_proj.weight"], expected)
    message = "'h/c_proj/kernel' .* may be of a FlaxConv1D"
    with pytest.raises(ValueError, match=message):
        lora_jax.peft.save(tmp_path / "x", frozen, adapters, names=[conv1d, *rest])
    with pytest.raises(ValueError, match=message):
        lora_jax.export(tmp_path / "y", frozen, {}, names=[conv1d, *rest])


def test_a_layer_of_a_class_that_is_not_known(tmp_path):
    """It stores (out, in) as FlaxConv1D does: whether it is one, only its user knows."""
    frozen, adapters = conv1d_or_dense(6, 6, input_axes=(1,))
    path, own = "h/c_proj/kernel", lora_jax.KernelAxes((1,), (0,))
    nothing = frozenset()
    axes = lora_jax.ModelAxes({path: own}, {path: "my.Layer"}, {}, {}, nothing, nothing)
    names = [(path, "h.c_proj.weight", "conv1d"), *FAMILIES["transformers"]]
    for call in (lora_jax.peft.save, lora_jax.export):
        with pytest.raises(ValueError, match=r"or, for a class of your own, names="):
            call(tmp_path / "x", frozen, adapters, names="transformers", axes=axes)
        call(tmp_path / call.__module__, frozen, adapters, names=names, axes=axes)


@pytest.mark.parametrize("input_axes", [(0,), (1,)])
def test_an_adapter_the_other_way_round_is_refused(input_axes, tmp_path):
    frozen, adapters = conv1d_or_dense(6, 6, input_axes)
    axes = {"h/c_proj/kernel": lora_jax.KernelAxes((1 - input_axes[0],), input_axes)}
    with pytest.raises(ValueError, match=r"'h/c_proj/kernel' has an adapter with inputs"):
        lora_jax.peft.save(tmp_path, frozen, adapters, axes=axes)


def test_a_dense_general_is_linear(tmp_path):
    """A kernel of three axes is that of a convolution only where the layer is one."""
    model, x = One(nn.DenseGeneral((2, 3))), jnp.ones((1, 6))
    params = random_variables(model, x)["params"]
    axes = lora_jax.kernel_axes(model, {"params": params}, x)
    lora_jax.export(tmp_path / "x", params, {}, names="transformers", axes=axes)
    expected = params["layer"]["kernel"].reshape(6, 6).T
    assert np.array_equal(Tensors(tmp_path / "x")["layer.weight"], expected)
