"""`lora-jax extract`: the adapter between a base and a fine-tuned model."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import relative_error

import lora_jax
from lora_jax.cli.adapters._open_adapter import open_adapter
from lora_jax.files._tensors import Tensors


def test_extract_leaves_embeddings_to_the_user(call, tmp_path):
    """In a file they look like linear layers, for which PEFT has other names."""
    base = {"wte.weight": np.ones((5, 4), np.float32), "lin.weight": np.ones((4, 4), np.float32)}
    safetensors.numpy.save_file(base, tmp_path / "base")
    safetensors.numpy.save_file({n: 2 * x for n, x in base.items()}, tmp_path / "tuned")
    folders = (tmp_path / "tuned", tmp_path / "base", tmp_path / "x")
    code, out = call("extract", *folders, "--rank", "1")
    assert code == 1
    assert "'wte.weight' is of an embedding, by its name" in out
    code, out = call("extract", *folders, "--rank", "1", "--match", "lin.*", "--allow-rest")
    assert code == 0
    assert "Left out, though they differ: wte.weight" in out


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [
        ("t.relative_attention_bias", None, "name"),
        ("t.tokens_embed", None, "name"),
        ("t.WordEmb", None, "name"),
        ("t.w", {"vocab_size": 5}, "size"),
        ("t.w", {"text_config": {"vocab_size": 5}}, "size"),
        ("t.w", {"vocab_size": 6}, ""),
        ("t.w", None, ""),
        ("embed_out", {"vocab_size": 5}, ""),
        ("embedding_projection", None, ""),
    ],
)
def test_extract_knows_embeddings(call, tmp_path, name, config, says):
    for folder, scale in (("base", 1), ("tuned", 2)):
        arrays = {f"{name}.weight": np.full((5, 4), scale, np.float32)}
        (tmp_path / folder).mkdir()
        safetensors.numpy.save_file(arrays, tmp_path / folder / "model.safetensors")
    if config is not None:
        (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    folders = (tmp_path / "tuned", tmp_path / "base", tmp_path / "x")
    code, out = call("extract", *folders, "--rank", "1")
    assert code == (1 if says else 0)
    assert (f"is of an embedding, by its {says}" in out) == (says != "")


def test_extract_knows_the_size_of_a_head(call, tmp_path):
    head = np.ones((5, 4), np.float32)
    safetensors.numpy.save_file({"w.weight": head, "lm_head.weight": head}, tmp_path / "base")
    safetensors.numpy.save_file({"w.weight": 2 * head, "lm_head.weight": head}, tmp_path / "tuned")
    folders = (tmp_path / "tuned", tmp_path / "base", tmp_path / "x")
    code, out = call("extract", *folders, "--rank", "1")
    assert code == 1
    assert "'w.weight' is of an embedding, by its size" in out


@pytest.mark.parametrize("name", ["mixer.A_log", "l.weight_ih_l0", "latents"])
def test_extract_makes_no_flax_adapter_of_torch(call, tmp_path, name):
    """What PyTorch has and no layer that PEFT could adapt is left out, if that is allowed."""
    base = {name: np.ones((5, 4), np.float32), "l.weight": np.ones((5, 4), np.float32)}
    safetensors.numpy.save_file(base, tmp_path / "base")
    safetensors.numpy.save_file({n: 2 * x for n, x in base.items()}, tmp_path / "tuned")
    folders = (tmp_path / "tuned", tmp_path / "base", tmp_path / "x", "--rank", "1")
    code, out = call("extract", *folders)
    assert code == 1
    assert f"1 arrays differ that would not be in the adapter: {name!r}" in out
    code, out = call("extract", *folders, "--match", re.escape(name), "--allow-rest")
    assert code == 1
    assert "there is nothing to extract" in out
    assert call("extract", *folders, "--allow-rest")[0] == 0
    assert set(open_adapter(tmp_path / "x").matrices) == {"l"}


def test_extract_from_flax_finds_conv1d(call, tmp_path):
    """FlaxConv1D stores (out, in), and our adapters know it."""
    kernel, bias = np.ones((8, 6), np.float32), np.ones(8, np.float32)
    base = {"h/c_attn/kernel": kernel, "h/c_attn/bias": bias, "h/lin/kernel": kernel}
    safetensors.numpy.save_file(base, tmp_path / "base")
    tuned = {n: x if n.endswith("bias") else 3 * x for n, x in base.items()}
    safetensors.numpy.save_file(tuned, tmp_path / "tuned")
    folders = (tmp_path / "tuned", tmp_path / "base", tmp_path / "x")
    assert call("extract", *folders, "--rank", "1")[0] == 0
    params = {"h": {n: {"kernel": jnp.asarray(kernel)} for n in ("c_attn", "lin")}}
    params["h"]["c_attn"]["bias"] = jnp.asarray(bias)
    frozen, adapters = lora_jax.load(tmp_path / "x", params)
    assert adapters["h"]["c_attn"]["kernel"].axes == lora_jax.KernelAxes((1,), (0,))
    assert adapters["h"]["lin"]["kernel"].axes == lora_jax.KernelAxes()
    merged = lora_jax.lora_merge(frozen, adapters)
    assert relative_error(merged["h"]["c_attn"]["kernel"], 3 * kernel) < 1e-5


@pytest.mark.parametrize("base", ["flax", "torch"])
def test_extract_finds_the_adapter_again(split, folders, call, tmp_path, base):
    plain = jax.tree.map(lambda x: x, split[1])
    for name in ("a", "b"):
        plain[name]["kernel"] = plain[name]["kernel"].replace(m=None, variant="lora")
    names = "transformers" if base == "torch" else None
    tuned = tmp_path / "tuned.safetensors"
    lora_jax.export(tuned, split[0], plain, names=names)
    before = folders / f"{base}.safetensors"
    code, _ = call("extract", tuned, before, tmp_path / "x", "--rank", "2")
    assert code == 0
    code, _ = call("merge", tmp_path / "x", before, tmp_path / "again.safetensors")
    assert code == 0
    for name, array in Tensors(tuned).items():
        assert relative_error(Tensors(tmp_path / "again.safetensors")[name], array) < 1e-5
    assert (
        call("extract", tuned, before, tmp_path / "y", "--explained_variance", "0.999999")[0] == 0
    )
    assert {one.rank for one in open_adapter(tmp_path / "y").matrices.values()} == {2}


def test_extract_leaves_nothing_out_in_silence(split, folders, call, tmp_path):
    tuned = tmp_path / "tuned.safetensors"
    changed = jax.tree.map(lambda x: x + 1, split[0])
    lora_jax.export(tuned, changed, {})
    base = folders / "flax.safetensors"
    code, out = call("extract", tuned, base, tmp_path / "x", "--rank", "1")
    assert code == 1
    assert "2 arrays differ that would not be in the adapter: 'a/bias'" in out
    code, out = call("extract", tuned, base, tmp_path / "x", "--rank", "1", "--allow-rest")
    assert code == 0
    assert "Left out, though they differ: a/bias, b/bias" in out
    for options, message in (
        ((), "either --rank or --explained_variance"),
        (("--rank", "1", "--match", "("), "unterminated"),
        (("--rank", "0"), "at least 1"),
        (("--explained_variance", "2"), r"in (0, 1]"),
    ):
        code, out = call("extract", tuned, base, tmp_path / "z", *options)
        assert code == 1
        assert message in out


def test_extract_looks_at_what_matches(split, folders, call, tmp_path):
    """What one of the two lacks, or has in another shape, is left out only where that is said."""
    arrays = dict(Tensors(folders / "flax.safetensors"))
    arrays["a/kernel"] = arrays["a/kernel"] + 1
    arrays["embed/embedding"] = np.ones((12, 6), np.float32)
    safetensors.numpy.save_file(arrays | {"new": np.ones(2)}, tmp_path / "tuned")
    one = (tmp_path / "tuned", folders / "flax.safetensors", tmp_path / "x", "--rank", "1")
    code, out = call("extract", *one)
    assert code == 1
    assert "Only one of the two has 'new'" in out
    code, out = call("extract", *one, "--match", ".*kernel")
    assert code == 1
    assert "2 arrays differ that would not be in the adapter: 'new', 'embed/embedding'" in out
    code, out = call("extract", *one, "--match", ".*kernel", "--allow-rest")
    assert code == 0
    assert "Left out, though they differ: new, embed/embedding." in out
    arrays["embed/embedding"] = Tensors(folders / "flax.safetensors")["embed/embedding"]
    arrays["a/kernel"] = arrays["a/kernel"].astype(np.int8)
    safetensors.numpy.save_file(arrays, tmp_path / "codes")
    code, out = call("extract", tmp_path / "codes", one[1], tmp_path / "y", "--rank", "1")
    assert code == 1
    assert "1 arrays differ that would not be in the adapter: 'a/kernel'" in out
