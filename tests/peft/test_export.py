"""The merged model as a file is the merged model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers import random_like, random_variables
from peft_folders import IDS, NAMES, Model

import lora_jax
from lora_jax.files._tensors import Info, Tensors, write_tensors

RULE = lora_jax.Rule("(layers/up|heads|conv)/kernel", rank=2, variant="dora")


@pytest.fixture
def split():
    params = random_variables(Model(), IDS)["params"]
    axes = lora_jax.kernel_axes(Model(), {"params": params}, IDS)
    params = jax.tree.map(lambda x: x, params)
    params["head"]["kernel"] = params["head"]["kernel"].astype(jnp.bfloat16)
    config = lora_jax.LoraConfig([RULE], trainable=["head/kernel"])
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config, axes=axes)
    return frozen, random_like(adapters), axes


def test_flax_names(split, tmp_path):
    frozen, adapters, _ = split
    report = lora_jax.export(tmp_path / "a" / "m.safetensors", frozen, adapters)
    merged = flatten_dict(lora_jax.lora_merge(frozen, adapters), sep="/")
    written = Tensors(tmp_path / "a" / "m.safetensors")
    assert set(written) == set(merged)
    for name, array in merged.items():
        assert written[name].dtype == array.dtype
        assert np.array_equal(written[name], array)
    assert set(report) == {"layers/up/kernel", "heads/kernel", "conv/kernel", "head/kernel"}
    assert report["head/kernel"].largest > 0
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["m.safetensors"]


def test_torch_names(split, tmp_path):
    frozen, adapters, axes = split
    file = tmp_path / "m.safetensors"
    lora_jax.export(file, frozen, adapters, names=NAMES, axes=axes)
    merged, written = lora_jax.lora_merge(frozen, adapters), Tensors(file)
    assert len(written) == 3 * 2 + 7
    for i in range(3):
        up = written[f"model.layers.{i}.up.weight"]
        assert np.array_equal(up, merged["layers"]["up"]["kernel"][i].T)
        assert np.array_equal(
            written[f"model.layers.{i}.up.bias"], merged["layers"]["up"]["bias"][i]
        )
    heads = merged["heads"]["kernel"].reshape(6, 6).T
    assert np.array_equal(written["model.heads.weight"], heads)
    assert np.array_equal(written["model.heads.bias"], merged["heads"]["bias"].reshape(-1))
    conv = merged["conv"]["kernel"].transpose(2, 1, 0)
    assert np.array_equal(written["model.conv.weight"], conv)
    assert np.array_equal(written["model.embed.weight"], merged["embed"]["embedding"])


def test_another_dtype(split, tmp_path):
    frozen, adapters, _ = split
    key = jax.random.key(1)
    file = tmp_path / "m.safetensors"
    lora_jax.export(file, frozen, adapters, dtype=jnp.float32)
    exact = dict(Tensors(file))
    assert {array.dtype for array in exact.values()} == {np.dtype(np.float32)}
    report = lora_jax.export(file, frozen, adapters, dtype=jnp.bfloat16, key=key)
    written = Tensors(file)
    assert {info.dtype for info in written.info.values()} == {jnp.dtype(jnp.bfloat16)}
    error = np.abs(np.float32(written["conv/kernel"]) - exact["conv/kernel"])
    assert report["conv/kernel"].largest == pytest.approx(error.max())
    assert report["conv/kernel"].mean == pytest.approx(error.mean(), rel=1e-5)
    again = tmp_path / "again.safetensors"
    lora_jax.export(again, frozen, adapters, dtype=jnp.bfloat16, key=key)
    assert again.read_bytes() == file.read_bytes()


def test_what_cannot_be_exported(split, tmp_path):
    frozen, adapters, axes = split
    file = tmp_path / "m.safetensors"
    file.write_bytes(b"old")
    with pytest.raises(ValueError, match="names has no name in PyTorch for 'conv/bias'"):
        lora_jax.export(file, frozen, adapters, names=NAMES[:3], axes=axes)
    with pytest.raises(ValueError, match="'conv/kernel', which frozen lacks"):
        lora_jax.export(file, {"a": jnp.ones(2)}, {"conv": adapters["conv"]})
    with pytest.raises(ValueError, match="in the base and, fully trained"):
        lora_jax.export(file, {"a": jnp.ones(2)}, {"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="'a' has NaN or infinite"):
        lora_jax.export(file, {"a": jnp.full(2, 1e6)}, {}, dtype=jnp.float16)
    assert [one.read_bytes() for one in tmp_path.iterdir()] == [b"old"]


def test_memory_is_that_of_one_matrix(tmp_path):
    """Only the array whose turn it is is asked for."""
    alive = []

    def read(name):
        alive.append(name)
        return np.ones((2, 3), np.float16 if name == "b" else np.float32)

    info = {
        "b": Info(np.dtype(np.float16), (2, 3)),
        "a": Info(np.dtype(np.float32), (2, 3)),
        "c": Info(np.dtype(np.float32), (2, 3)),
    }
    write_tensors(tmp_path / "x", info, read)
    assert alive == ["a", "c", "b"]
    assert {name: array.dtype for name, array in Tensors(tmp_path / "x").items()} == {
        name: one.dtype for name, one in info.items()
    }
    with pytest.raises(ValueError, match="'a' is float64"):
        write_tensors(tmp_path / "x", info, lambda name: np.ones((2, 3)))
    assert len(list(tmp_path.iterdir())) == 1


def test_untied_adapters_are_not_merged(tmp_path):
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(11, 6, name="embed")
            return embed(ids) @ embed.embedding.T

    params = Tied().init(jax.random.key(0), IDS)["params"]
    axes = lora_jax.kernel_axes(Tied(), {"params": params}, IDS)
    config = lora_jax.LoraConfig([lora_jax.Rule("embed/embedding", rank=2, tied="untie")])
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config, axes=axes)
    for merge in (lora_jax.lora_merge, lora_jax.rounding):
        with pytest.raises(ValueError, match="tied='untie'"):
            merge(frozen, adapters)
    with pytest.raises(ValueError, match="tied='untie'"):
        lora_jax.export(tmp_path / "x", frozen, adapters)
