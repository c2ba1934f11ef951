"""Keys and prefixes of other kinds, and copies that PEFT saves."""

import json
import re
import shutil

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from cli_folders import FILE, PREFIX

import lora_jax
from lora_jax.files._tensors import Tensors


def rewritten(folder, out, rename, **config):
    """An adapter of PEFT with other keys, and something else in its config."""
    out.mkdir()
    said = json.loads((folder / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(said | config))
    tensors = {rename(name): x for name, x in Tensors(folder / FILE).items()}
    safetensors.numpy.save_file(tensors, out / FILE)
    return out


KEYS = {
    "compiled": lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "compiled after": lambda name: f"_orig_mod.{name}",
    "on several devices": lambda name: f"module.{name}",
    "on several devices before": lambda name: name.replace(PREFIX, f"{PREFIX}module."),
    "no prefix": lambda name: name.removeprefix(PREFIX),
    "the adapter's name": lambda name: re.sub(r"(lora_[AB]|vector)", r"\1.some", name),
    "another prefix": lambda name: name.replace(PREFIX, f"{PREFIX}model.body."),
}


@pytest.mark.parametrize("kind", KEYS)
def test_merge_of_other_keys(folders, call, tmp_path, kind):
    """The same numbers come out, and what was done is said."""
    base = folders / "torch.safetensors"
    other = rewritten(folders / "peft", tmp_path / "x", KEYS[kind])
    assert call("merge", folders / "peft", base, tmp_path / "right")[0] == 0
    code, out = call("merge", other, base, tmp_path / "m")
    assert code == 0
    assert (tmp_path / "m").read_bytes() == (tmp_path / "right").read_bytes()
    said = {"no prefix": "lack 'base_model.model.'", "another prefix": "without 'model.body.'"}
    assert said.get(kind, "names no module") in out
    assert call("inspect", other)[0] == 0


def test_copies_of_a_head_with_several_layers(folders, call, tmp_path):
    """PEFT writes them too with bias="all"; in a state dict the copy has the adapter's name."""
    base, heads = tmp_path / "base", {}
    for layer in ("dense", "out"):
        heads |= {f"head.{layer}.weight": np.ones((3, 3), np.float32)}
    arrays = dict(Tensors(folders / "torch.safetensors"))
    safetensors.numpy.save_file(arrays | {n: 0 * x for n, x in heads.items()}, base)
    saved = {PREFIX + name: x for name, x in heads.items()}
    copies = {n.replace("head.", "head.modules_to_save."): x for n, x in saved.items()}
    named = {n.replace("head.", "head.modules_to_save.some."): x for n, x in saved.items()}
    cases = {"plain": (saved | copies, str), "named": (named, KEYS["the adapter's name"])}
    for case, (more, rename) in cases.items():
        config = {"modules_to_save": ["head"]}
        folder = rewritten(folders / "peft", tmp_path / case, rename, **config)
        safetensors.numpy.save_file(dict(Tensors(folder / FILE)) | more, folder / FILE)
        code, out = call("merge", folder, base, tmp_path / f"{case} merged")
        assert code == 0, out
        merged = Tensors(tmp_path / f"{case} merged")
        assert all(np.array_equal(merged[name], x) for name, x in heads.items())


@pytest.mark.parametrize("change", [0, 1])
def test_copies_of_a_layer_below_an_adapter(folders, call, tmp_path, change):
    """PEFT writes a head with its bias, trained or not: it is that of the base, or refused."""
    base = Tensors(folders / "torch.safetensors")
    tensors = dict(Tensors(folders / "peft" / FILE))
    tensors |= {f"{PREFIX}b.base_layer.{leaf}": base[f"b.{leaf}"] for leaf in ("weight", "bias")}
    tensors[f"{PREFIX}b.base_layer.bias"] = tensors[f"{PREFIX}b.base_layer.bias"] + change
    shutil.copytree(folders / "peft", tmp_path / "x")
    safetensors.numpy.save_file(tensors, tmp_path / "x" / FILE)
    code, out = call("merge", tmp_path / "x", base.path, tmp_path / "m")
    params = {
        name: {"kernel": jnp.asarray(base[f"{name}.weight"].T), "bias": base[f"{name}.bias"]}
        for name in "ab"
    }
    if change:
        assert code == 1
        assert "was trained on another 'b.bias'" in out
        with pytest.raises(ValueError, match=r"b.base_layer.bias' is the base that"):
            lora_jax.peft.load(tmp_path / "x", params)
        return
    assert code == 0, out
    assert np.array_equal(Tensors(tmp_path / "m")["b.bias"], base["b.bias"])
    chex.assert_trees_all_equal(
        lora_jax.peft.load(tmp_path / "x", params)[1],
        lora_jax.peft.load(folders / "peft", params)[1],
    )


def test_merge_of_an_adapter_in_shards(folders, call, tmp_path):
    tensors, folder = dict(Tensors(folders / "peft" / FILE)), tmp_path / "x"
    folder.mkdir()
    shutil.copy(folders / "peft" / "adapter_config.json", folder)
    shards = {name: f"adapter_model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(shards.values()):
        part = {name: x for name, x in tensors.items() if shards[name] == file}
        safetensors.numpy.save_file(part, folder / file)
    (folder / f"{FILE}.index.json").write_text(json.dumps({"weight_map": shards}))
    base = folders / "torch.safetensors"
    for adapter, out in ((folders / "peft", "right"), (folder, "m")):
        assert call("merge", adapter, base, tmp_path / out)[0] == 0
    assert (tmp_path / "m").read_bytes() == (tmp_path / "right").read_bytes()
    assert call("diff", folder, folders / "peft")[0] == 0
    (folder / "adapter_model-1.safetensors").unlink()
    code, out = call("verify", folder)
    assert code == 1
    assert "should be in 'adapter_model-1.safetensors'" in out


def test_prefixes_that_fit_in_several_ways(folders, call, tmp_path):
    arrays, base = dict(Tensors(folders / "torch.safetensors")), tmp_path / "two.safetensors"
    both = {f"{tower}.{name}": x for tower in ("text", "vision") for name, x in arrays.items()}
    safetensors.numpy.save_file(both, base)
    code, out = call("merge", folders / "peft", base, tmp_path / "m")
    assert code == 1
    assert "--base-prefix text. or --base-prefix vision." in out
    options = ("--base-prefix", "text")
    assert call("merge", folders / "peft", base, tmp_path / "m", *options)[0] == 0
    call("merge", folders / "peft", folders / "torch.safetensors", tmp_path / "right")
    merged = Tensors(tmp_path / "m")
    for name, array in Tensors(tmp_path / "right").items():
        assert np.array_equal(merged[f"text.{name}"], array)
        assert np.array_equal(merged[f"vision.{name}"], arrays[name])
    for options in (("--base-prefix", "texts."), ("--adapter-prefix", "model.")):
        code, out = call("merge", folders / "peft", base, tmp_path / "n", *options)
        assert code == 1
        assert "with these prefixes" in out


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda n: n.replace(".a.", ".c."), {}, "something for 'c.weight', but"),
        (lambda n: re.sub(r"(_[AB])", r"\1.x", n) if ".a." in n else n + ".y", {}, "several"),
        (KEYS["compiled"], {"alpha_pattern": {"_orig_mod.a": 7}}, "take it out of both"),
        (KEYS["on several devices before"], {"alpha_pattern": {"^module.a": 7}}, "out of both"),
    ],
)
def test_keys_that_do_not_fit(folders, call, tmp_path, change, config, message):
    other = rewritten(folders / "peft", tmp_path / "x", change, **config)
    code, out = call("merge", other, folders / "torch.safetensors", tmp_path / "m")
    assert code == 1
    assert message in out
    assert not (tmp_path / "m").exists()
