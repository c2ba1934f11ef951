"""The command: what it says of adapters is right, what it writes is what Python writes."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import random_like, relative_error

import lora_jax
from lora_jax.cli import __main__ as cli
from lora_jax.cli import _printing
from lora_jax.cli._adapted_matrix import difference
from lora_jax.cli._open_adapter import open_adapter
from lora_jax.files._checkpoint import Checkpoint, rewrite
from lora_jax.files._tensors import Info, Tensors, write_tensors

KEY = jax.random.key(0)


@pytest.fixture
def split():
    normal = iter(jax.random.split(KEY, 9))
    params = {
        "a": {
            "kernel": jax.random.normal(next(normal), (6, 8)),
            "bias": jax.random.normal(next(normal), (8,)),
        },
        "b": {
            "kernel": jax.random.normal(next(normal), (8, 3)),
            "bias": jax.random.normal(next(normal), (3,)),
        },
        "embed": {"embedding": jax.random.normal(next(normal), (11, 6))},
    }
    rule = lora_jax.Rule("(a|b)/kernel", rank=2, alpha=3.0, variant="dora", detach_norm=True)
    frozen, adapters = lora_jax.lora_init(KEY, params, lora_jax.LoraConfig([rule]))
    return frozen, random_like(adapters, scale=0.5)


@pytest.fixture
def folders(split, tmp_path):
    """An adapter in both formats, and its base with both names."""
    lora_jax.save(tmp_path / "own", split[1], frozen=split[0], metadata={"task": "topics"})
    lora_jax.peft.save(tmp_path / "peft", *split)
    lora_jax.export(tmp_path / "flax.safetensors", split[0], {})
    lora_jax.export(tmp_path / "torch.safetensors", split[0], {}, names="transformers")
    return tmp_path


def run(capsys, monkeypatch, *arguments):
    """The exit code and what was printed."""
    monkeypatch.setattr(sys, "argv", ["lora-jax", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    printed = capsys.readouterr()
    return caught.value.code, printed.out + printed.err


@pytest.fixture
def call(capsys, monkeypatch):
    def call(*arguments, columns=200):
        monkeypatch.setenv("COLUMNS", str(columns))
        return run(capsys, monkeypatch, *arguments)

    return call


@pytest.mark.parametrize("form", ["own", "peft"])
def test_inspect(split, folders, call, form):
    code, out = call("inspect", folders / form)
    assert code == 0
    kernel = split[1]["a"]["kernel"]
    delta = 1.5 * np.asarray(kernel.U @ kernel.V)
    values = np.linalg.svd(delta, compute_uv=False)[:2]
    name = "a/kernel" if form == "own" else "a"
    one = open_adapter(folders / form).matrices[name]
    assert np.allclose(one.singular_values, values, rtol=1e-5)
    share = values / values.sum()
    assert one.effective_rank == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)
    for text in (name, "6 x 8", "DoRA", "1.5", f"{np.linalg.norm(values):.3g}", "numbers 61"):
        assert text in out
    assert ("task topics" in out) == (form == "own")


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


def with_biases_of_B(split):
    """The same without DoRA, and with what PEFT's lora_bias adds."""
    adapters = {
        name: {
            "kernel": split[1][name]["kernel"].replace(m=None, variant="lora", detach_norm=False),
            "bias": lora_jax.LoraBias(random_like(split[0][name]["bias"], scale=1.0), 1.5),
        }
        for name in "ab"
    }
    return split[0], adapters


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


@pytest.mark.parametrize(("form", "base"), [("own", "flax"), ("own", "torch"), ("peft", "torch")])
def test_merge(split, folders, call, tmp_path, form, base):
    out = tmp_path / "merged.safetensors"
    code, text = call("merge", folders / form, folders / f"{base}.safetensors", out)
    assert code == 0
    expected = tmp_path / "expected.safetensors"
    lora_jax.export(expected, *split, names="transformers" if base == "torch" else None)
    merged = Tensors(out)
    assert set(merged) == set(Tensors(expected))
    for name, array in Tensors(expected).items():
        assert relative_error(merged[name], array) < 1e-6
    assert "largest error" in text


def test_merge_of_shards(split, folders, call, tmp_path):
    base, arrays = tmp_path / "base", dict(Tensors(folders / "torch.safetensors"))
    base.mkdir()
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors", "e": "model-2.safetensors"}
    for file in set(shards.values()):
        part = {n: x for n, x in arrays.items() if shards[n[0]] == file}
        safetensors.numpy.save_file(part, base / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shards[name[0]] for name in arrays}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text("{}")
    (base / "merges.txt").write_text("a b")
    assert call("merge", folders / "peft", base, tmp_path / "out")[0] == 0
    assert {f.name for f in base.iterdir()} == {f.name for f in (tmp_path / "out").iterdir()}
    merged = lora_jax.lora_merge(*split)
    assert relative_error(Checkpoint(tmp_path / "out")["a.weight"], merged["a"]["kernel"].T) < 1e-6
    (base / "model-2.safetensors").unlink()
    code, out = call("merge", folders / "peft", base, tmp_path / "out2")
    assert code == 1
    assert "should be in 'model-2.safetensors'" in out
    assert not (tmp_path / "out2").exists()


def test_merge_into_bfloat16_says_what_vanishes(split, folders, call, tmp_path):
    small = jax.tree.map(lambda x: x, split[1])
    for name in ("a", "b"):
        adapter = small[name]["kernel"]
        W = split[0][name]["kernel"].astype(jnp.bfloat16).astype(jnp.float32)
        m = jnp.linalg.norm(W, axis=0)
        small[name]["kernel"] = adapter.replace(U=1e-5 * adapter.U, m=m)
    lora_jax.save(tmp_path / "small", small)
    lora_jax.export(tmp_path / "16.safetensors", split[0], {}, dtype=jnp.bfloat16)
    code, out = call("merge", tmp_path / "small", tmp_path / "16.safetensors", tmp_path / "m")
    assert code == 0
    assert "Most of the update vanishes in 2 of 2" in out
    assert (
        call(
            "merge", tmp_path / "small", tmp_path / "16.safetensors", tmp_path / "s", "--seed", "0"
        )[0]
        == 0
    )
    near, chance = Tensors(tmp_path / "m")["a/kernel"], Tensors(tmp_path / "s")["a/kernel"]
    assert near.dtype == chance.dtype == jnp.bfloat16
    assert np.array_equal(near, Tensors(tmp_path / "16.safetensors")["a/kernel"])


@pytest.mark.parametrize("form", ["own", "peft"])
@pytest.mark.parametrize("base", ["flax", "torch"])
def test_merge_of_biases_of_B(split, folders, call, tmp_path, form, base):
    frozen, adapters = with_biases_of_B(split)
    if form == "own":
        lora_jax.save(tmp_path / "x", adapters)
    else:
        lora_jax.peft.save(tmp_path / "x", frozen, adapters)
    code, text = call("merge", tmp_path / "x", folders / f"{base}.safetensors", tmp_path / "m")
    if (form, base) == ("peft", "flax"):
        assert code == 1
        assert "has no such array" in text
        return
    assert code == 0
    names = "transformers" if base == "torch" else None
    lora_jax.export(tmp_path / "expected", frozen, adapters, names=names)
    for name, array in Tensors(tmp_path / "expected").items():
        assert relative_error(Tensors(tmp_path / "m")[name], array) < 1e-6
    assert f"a{'/' if base == 'flax' else '.'}bias" in text


def test_merge_of_a_bias_of_B_needs_a_bias(split, folders, call, tmp_path):
    frozen, adapters = with_biases_of_B(split)
    lora_jax.peft.save(tmp_path / "x", frozen, adapters)
    arrays = dict(Tensors(folders / "torch.safetensors"))
    for change, message in (
        (lambda t: t.update({"a.bias": np.ones(3, np.float32)}), "(8,), but"),
        (lambda t: t.pop("a.bias"), "no 'a.bias' that it could be added to"),
    ):
        change(arrays)
        safetensors.numpy.save_file(arrays, tmp_path / "base.safetensors")
        code, out = call("merge", tmp_path / "x", tmp_path / "base.safetensors", tmp_path / "m")
        assert code == 1
        assert message in out
        assert not (tmp_path / "m").exists()


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


def rewritten(folder, out, rename, **config):
    """An adapter of PEFT with other keys, and something else in its config."""
    out.mkdir()
    said = json.loads((folder / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(said | config))
    tensors = {rename(name): x for name, x in Tensors(folder / FILE).items()}
    safetensors.numpy.save_file(tensors, out / FILE)
    return out


FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
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
    """PEFT writes them beside with bias="all"; in a state dict the copy has the adapter's name."""
    base, whole = tmp_path / "base", {}
    for layer in ("dense", "out"):
        whole |= {f"head.{layer}.weight": np.ones((3, 3), np.float32)}
    arrays = dict(Tensors(folders / "torch.safetensors"))
    safetensors.numpy.save_file(arrays | {n: 0 * x for n, x in whole.items()}, base)
    saved = {PREFIX + name: x for name, x in whole.items()}
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
        assert all(np.array_equal(merged[name], x) for name, x in whole.items())


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


@pytest.fixture
def language_model(tmp_path):
    """An adapter of an embedding, and makes the base, with a config and other arrays."""
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["embed_tokens"]}
    names = ("lora_embedding_A", "lora_embedding_B")
    factors = [np.ones(shape, np.float32) for shape in ((2, 9), (4, 2))]
    keys = [f"{PREFIX}model.embed_tokens.{name}" for name in names]
    (tmp_path / "x").mkdir()
    safetensors.numpy.save_file(dict(zip(keys, factors, strict=True)), tmp_path / "x" / FILE)

    def make(said, arrays, **of_adapter):
        (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(config | of_adapter))
        base = tmp_path / "base"
        base.mkdir()
        arrays = {"model.embed_tokens.weight": np.eye(9, 4, dtype=np.float32)} | arrays
        safetensors.numpy.save_file(arrays, base / "model.safetensors")
        if said is not None:
            (base / "config.json").write_text(json.dumps(said))
        return tmp_path / "x", base

    return make


CAUSAL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
HEAD = {"lm_head.weight": np.eye(9, 4, dtype=np.float32)}
OTHER = {"lm_head.weight": np.ones((9, 4), np.float32)}


@pytest.mark.parametrize(
    ("config", "arrays", "adapter", "expected"),
    [
        (CAUSAL, {}, {}, "two arrays"),
        (CAUSAL, HEAD, {}, "two arrays"),
        (CAUSAL | {"tie_word_embeddings": True}, HEAD, {}, "two arrays"),
        (CAUSAL | {"tie_word_embeddings": False}, HEAD, {}, ""),
        (CAUSAL, OTHER, {}, ""),
        (CAUSAL | {"tie_word_embeddings": True}, OTHER, {}, "error: set tie_word_embeddings to"),
        (CAUSAL, {}, {"task_type": "SEQ_CLS"}, ""),
        ({"architectures": ["LlamaModel"]}, {}, {}, ""),
        (CAUSAL | {"architectures": ["LlamaModel"]}, {}, {"task_type": "CAUSAL_LM"}, "two arrays"),
        (CAUSAL | {"model_type": "new"}, {}, {}, "error: of the type 'new'"),
        ({"architectures": ["NewForCausalLM"]}, {}, {}, "error: of the type None"),
        ({}, {}, {}, "error: name the class in its architectures"),
        (CAUSAL | {"is_encoder_decoder": True}, {}, {}, "error: that share their embedding"),
        (CAUSAL | {"text_config": {"vocab_size": 9}}, {}, {}, "error: has several parts"),
        (None, {}, {}, "error: give the base's folder, with its config.json"),
        (None, HEAD, {}, ""),
        (None, {}, {"task_type": "FEATURE_EXTRACTION"}, ""),
        (CAUSAL, {}, {"ensure_weight_tying": True}, "error: holds nothing for the head"),
    ],
)
def test_what_an_embedding_is_tied_to(
    language_model, call, tmp_path, config, arrays, adapter, expected
):
    code, out = call("merge", *language_model(config, arrays, **adapter), tmp_path / "m")
    if expected.startswith("error: "):
        assert code == 1
        assert expected.removeprefix("error: ") in out
        assert not (tmp_path / "m").exists()
        return
    assert code == 0, out
    merged = Tensors(tmp_path / "m" / "model.safetensors")
    E = np.eye(9, 4, dtype=np.float32)
    assert np.array_equal(merged["model.embed_tokens.weight"], E + 8)
    if expected:
        assert expected in out
        assert np.array_equal(merged["lm_head.weight"], E)
        said = json.loads((tmp_path / "m" / "config.json").read_text())
        assert said == config | {"tie_word_embeddings": False}
    else:
        assert set(merged) == {"model.embed_tokens.weight", *arrays}


@pytest.mark.parametrize("form", ["own", "peft"])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_codes_of_a_quantized_base_are_no_weights(folders, call, tmp_path, form, dtype):
    base = folders / ("flax.safetensors" if form == "own" else "torch.safetensors")
    kernel = "a/kernel" if form == "own" else "a.weight"
    arrays = dict(Tensors(base))
    arrays[kernel] = arrays[kernel].astype(dtype)
    safetensors.numpy.save_file(arrays, tmp_path / "codes")
    code, out = call("merge", folders / form, tmp_path / "codes", tmp_path / "m")
    assert code == 1
    assert f"{kernel!r} is {dtype}" in out
    assert not (tmp_path / "m").exists()


def test_a_folder_is_what_transformers_takes_of_it(folders, call, tmp_path):
    """An adapter beside a base, or its weights in another form, is neither read nor copied."""
    base, arrays = tmp_path / "base", dict(Tensors(folders / "torch.safetensors"))
    base.mkdir()
    safetensors.numpy.save_file(arrays, base / "model.safetensors", {"format": "pt"})
    for file in ("consolidated.safetensors", FILE):
        safetensors.numpy.save_file({"x": np.ones(2)}, base / file)
    for file in ("config.json", "adapter_config.json"):
        (base / file).write_text("{}")
    code, out = call("merge", folders / "peft", base, tmp_path / "m")
    assert code == 0
    assert "no part of the model: adapter_model.safetensors, consolidated.safetensors" in out
    assert {file.name for file in (tmp_path / "m").iterdir()} == {
        "model.safetensors",
        "config.json",
    }


def test_a_message_names_what_the_user_named(split, folders, call, tmp_path):
    rule = lora_jax.Rule("embed/embedding", rank=2)
    lora_jax.save(tmp_path / "x", lora_jax.lora_init(KEY, split[0], lora_jax.LoraConfig([rule]))[1])
    code, out = call("merge", tmp_path / "x", folders / "torch.safetensors", tmp_path / "m")
    assert code == 1
    assert f"lora-jax: {tmp_path / 'x'}: whether PEFT computes with 'embed.weight'" in out
    assert "lora_jax.export merges it" in out
    arrays = dict(Tensors(folders / "torch.safetensors"))
    arrays["a.weight"] = arrays["a.weight"][:, :-1]
    safetensors.numpy.save_file(arrays, tmp_path / "base")
    code, out = call("merge", folders / "own", tmp_path / "base", tmp_path / "m")
    assert code == 1
    assert f"{folders / 'own'}: 'a' has A (2, 6)" in out


def test_inspect_keeps_its_digits(call, tmp_path):
    layer = {"some_quite_long_name_of_a_projection": {"kernel": jnp.ones((1000, 2000))}}
    params = {"transformer": {f"layer_{i}": layer for i in range(12)}}
    config = lora_jax.LoraConfig([lora_jax.Rule(".*", rank=2, variant="dora")])
    adapters = lora_jax.lora_init(KEY, params, config)[1]
    lora_jax.save(tmp_path / "x", random_like(adapters, scale=1.0))
    code, out = call("inspect", tmp_path / "x", columns=100)
    assert code == 0
    lines = out.splitlines()
    assert max(map(len, lines[:4])) <= 100
    values = [one.singular_values for one in open_adapter(tmp_path / "x").matrices.values()]
    norms = sorted(float(np.linalg.norm(one)) for one in values)
    row = next(line for line in lines if "(12)" in line)
    assert row.startswith("...")
    ends = " to ".join(f"{float(f'{norm:.3g}'):g}" for norm in (norms[0], norms[-1]))
    for text in ("1000 x 2000", "DoRA", ends):
        assert text in row


def test_version_and_what_is_missing(call, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lora-jax", "--version"])
    cli.main()
    assert capsys.readouterr().out == f"lora-jax {lora_jax.__version__}\n"
    monkeypatch.setitem(sys.modules, "tyro", None)
    with pytest.raises(SystemExit, match="tyro, which is not installed: pip install rich tyro"):
        cli.main()


MIB = 2**20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(("count", "rows"), [(20, 4096)], ids=["64 MiB"])
def test_memory_of_a_merge(tmp_path, count, rows):
    """What the command holds is Python, JAX and about four matrices, however large the base is.

    Pages of files that are mapped do not count: they go when others need the memory.
    """
    shape, rank = (rows, 4096), 8
    size = 4 * rows * 4096
    rng = np.random.default_rng(0)
    config = {"peft_type": "LORA", "r": rank, "target_modules": ["linear"]}
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(config))
    factors = {"lora_A": (rank, 4096), "lora_B": (rows, rank)}
    tensors = {
        f"base_model.model.layers.{i}.linear.{name}.weight": rng.standard_normal(one, np.float32)
        for i in range(count)
        for name, one in factors.items()
    }
    safetensors.numpy.save_file(tensors, tmp_path / "x" / "adapter_model.safetensors")
    base, kernel = tmp_path / "base.safetensors", rng.standard_normal(shape, np.float32)
    info = {f"layers.{i}.linear.weight": Info(kernel.dtype, shape) for i in range(count)}
    write_tensors(base, info, lambda name: kernel)

    arguments = ["merge", tmp_path / "x", base, tmp_path / "merged.safetensors"]
    with subprocess.Popen(
        [sys.executable, "-m", "lora_jax.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        peak, status = 0, Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            anonymous = re.search(r"RssAnon:\s*(\d+) kB", status.read_text())
            peak = max(peak, 1024 * int(anonymous[1]) if anonymous else 0)
            time.sleep(0.002)
        assert process.returncode == 0, process.stdout.read()
    name = f"layers.{count - 1}.linear"
    A, B = (tensors[f"base_model.model.{name}.{n}.weight"] for n in factors)
    merged = Tensors(tmp_path / "merged.safetensors")[f"{name}.weight"]
    assert relative_error(merged, kernel + 1.0 * B @ A) < 1e-5
    assert peak > 100 * MIB  # it was measured
    assert peak < 450 * MIB + 4 * size, f"{peak / MIB:.0f} MiB"
    assert peak < 0.6 * count * size, f"{peak / MIB:.0f} MiB"


def test_diff(split, folders, call, tmp_path):
    assert call("diff", folders / "peft", folders / "peft")[0] == 0
    adapter = split[1]["a"]["kernel"]
    other = split[1] | {"a": {"kernel": adapter.replace(U=-2 * adapter.U)}}
    lora_jax.save(tmp_path / "other", other)
    code, out = call("diff", folders / "own", tmp_path / "other")
    assert code == 1
    assert "-1.0000" in out
    a, b = (open_adapter(f).matrices["a/kernel"] for f in (folders / "own", tmp_path / "other"))
    assert difference(a, b) == pytest.approx((3.0, -1.0))
    assert difference(a, a) == pytest.approx((0.0, 1.0), abs=1e-12)
    lora_jax.save(tmp_path / "less", {"a": other["a"]})
    code, out = call("diff", folders / "own", tmp_path / "less")
    assert code == 1
    assert "only in" in out


@pytest.mark.parametrize(
    "other",
    [
        {"axes": lora_jax.KernelAxes((1,), (0,))},
        {"axes": lora_jax.KernelAxes((0,), (1, 2))},
        {"axes": lora_jax.KernelAxes(fused=2, parts=(0, 1))},
        {"axes": lora_jax.KernelAxes(fused=2, parts=(1, 0))},
        {"materialize": True},
        {"untied": True},
    ],
    ids=str,
)
def test_diff_of_the_same_arrays_that_compute_something_else(call, tmp_path, other):
    stack = (2,) if "axes" in other and other["axes"].fused > 1 else ()
    shapes = {"U": (*stack, 4, 2), "V": (*stack, 2, 4), "m": (*stack, 4)}
    arrays = {name: jax.random.normal(KEY, shape) for name, shape in shapes.items()}
    axes = lora_jax.KernelAxes(fused=3, parts=(0, 1)) if stack else lora_jax.KernelAxes()
    one = lora_jax.Adapter(**arrays, variant="dora", rank=2, alpha=2.0, axes=axes)
    lora_jax.save(tmp_path / "one", {"a": {"kernel": one}})
    lora_jax.save(tmp_path / "other", {"a": {"kernel": one.replace(**other)}})
    assert call("diff", tmp_path / "one", tmp_path / "one")[0] == 0
    code, out = call("diff", tmp_path / "one", tmp_path / "other")
    assert code == 1
    assert "They differ." in out


def test_diff_of_two_formats(split, folders, call, tmp_path):
    assert call("diff", folders / "own", folders / "peft")[0] == 0
    assert call("diff", folders / "peft", folders / "own")[0] == 0
    frozen, adapters = with_biases_of_B(split)
    lora_jax.save(tmp_path / "o", adapters)
    lora_jax.peft.save(tmp_path / "p", frozen, adapters)
    assert call("diff", tmp_path / "o", tmp_path / "p")[0] == 0
    adapters["b"]["bias"] = adapters["b"]["bias"].replace(value=jnp.ones(3))
    lora_jax.save(tmp_path / "other", adapters)
    code, out = call("diff", tmp_path / "other", tmp_path / "p")
    assert code == 1
    assert "b.bias (added)" in out
    names = tmp_path / "names.json"
    names.write_text(json.dumps([["{layer}/kernel", "model.{layer}.weight"]]))
    code, out = call("diff", folders / "own", folders / "peft", "--names", names)
    assert code == 1
    assert "nothing in common" in out


# What a base says of a square weight that is called as GPT-2's are: the files beside it and in it,
# and the class of the layer that follows from them, or why none does.
WIDE = np.ones((6, 8), np.float32)
ONE = np.ones(6, np.float32)
ASK = r"'h.c_proj.weight' (6, 6) may be stored (in, out) or (out, in)"
SAID = {
    "nothing": ({}, {}, (), ASK),
    "an answer, Conv1D": ({}, {}, ("--layout", "in-out"), "conv1d"),
    "an answer, linear": ({}, {}, ("--layout", "out-in"), "linear"),
    "GPT-2": ({"model_type": "gpt2"}, {}, (), "conv1d"),
    "GPT-2 in it": ({"model_type": "x", "decoder": {"model_type": "gpt2"}}, {}, (), "conv1d"),
    "GPT-Neo": ({"model_type": "gpt_neo"}, {}, (), "linear"),
    "a type of which nothing is known": ({"model_type": "x"}, {}, (), ASK),
    "no bias": ({}, {"h.c_proj.bias": None}, (), "linear"),
    "another one, Conv1D": ({}, {"b.c_proj.weight": WIDE.T, "b.c_proj.bias": ONE}, (), "conv1d"),
    "another one, linear": ({}, {"b.c_proj.weight": WIDE, "b.c_proj.bias": ONE}, (), "linear"),
    "what does not agree": (
        {"model_type": "gpt2"},
        {"b.c_proj.weight": WIDE, "b.c_proj.bias": ONE},
        (),
        ASK,
    ),
    "an answer for too many": (
        {},
        {"h.head.weight": np.ones((6, 6), np.float32), "h.head.bias": ONE, "b.x.weight": WIDE.T}
        | {"b.x.bias": ONE},
        ("--layout", "in-out"),
        "--layout in-out would be of all layers called c_proj, head",
    ),
    "an answer to nothing": (
        {"model_type": "gpt2"},
        {},
        ("--layout", "in-out"),
        "where nothing else says it",
    ),
}


@pytest.mark.parametrize("command", ["merge", "extract"])
@pytest.mark.parametrize(("config", "more", "options", "expected"), SAID.values(), ids=SAID)
def test_which_way_round_a_square_weight_is(
    call, tmp_path, config, more, options, expected, command
):
    rng = np.random.default_rng(0)
    names = {"h.c_proj": (6, 6), "h.head": (4, 6)}
    base = {f"{name}.weight": rng.standard_normal(n, np.float32) for name, n in names.items()}
    base = {n: x for n, x in (base | {"h.c_proj.bias": ONE} | more).items() if x is not None}
    A, B = (rng.standard_normal(n, np.float32) for n in ((2, 6), (6, 2)))
    C = rng.standard_normal((len(base["h.head.weight"]), 2), np.float32)
    update = (B @ A).T if expected == "conv1d" else B @ A
    tuned = base | {
        "h.c_proj.weight": base["h.c_proj.weight"] + update,
        "h.head.weight": base["h.head.weight"] + C @ A,
    }
    for folder, arrays in (("base", base), ("tuned", tuned)):
        (tmp_path / folder).mkdir()
        safetensors.numpy.save_file(arrays, tmp_path / folder / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    if command == "merge":
        (tmp_path / "x").mkdir()
        said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "fan_in_fan_out": False}
        (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(said))
        factors = {"h.c_proj.lora_A": A, "h.c_proj.lora_B": B, "h.head.lora_A": A}
        factors |= {"h.head.lora_B": C}
        tensors = {f"base_model.model.{name}.weight": x for name, x in factors.items()}
        safetensors.numpy.save_file(tensors, tmp_path / "x" / "adapter_model.safetensors")
        code, out = call("merge", tmp_path / "x", tmp_path / "base", tmp_path / "m", *options)
    else:
        folders = (tmp_path / "tuned", tmp_path / "base", tmp_path / "x")
        code, out = call("extract", *folders, "--rank", "2", *options)
    if expected not in ("linear", "conv1d"):
        assert code == 1
        assert expected in out
        assert not (tmp_path / ("m" if command == "merge" else "x")).exists()
        return
    assert code == 0, out
    if command == "merge":
        merged = Tensors(tmp_path / "m" / "model.safetensors")
        for name, array in tuned.items():
            assert relative_error(merged[name], array) < 1e-6
    else:
        one = open_adapter(tmp_path / "x").matrices["h.c_proj"]
        assert relative_error(one.U @ one.V, (B @ A).T) < 1e-5
        said = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
        assert said["fan_in_fan_out"] == (expected == "conv1d")


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


def test_verify(split, folders, call, tmp_path):
    code, out = call("verify", folders / "own", "--base", folders / "flax.safetensors")
    assert code == 0
    assert "is the base that it was trained on" in out
    assert call("verify", folders / "peft")[0] == 0
    other = jax.tree.map(lambda x: x + 1, split[0])
    lora_jax.export(tmp_path / "other.safetensors", other, {})
    code, out = call("verify", folders / "own", "--base", tmp_path / "other.safetensors")
    assert code == 1
    assert "has another 'a/kernel'" in out
    file = next((folders / "own").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    code, out = call("verify", folders / "own")
    assert code == 1
    assert "truncated" in out


@pytest.mark.parametrize("command", ["inspect", "convert", "merge", "diff", "extract", "verify"])
def test_help(call, command):
    code, out = call(command, "--help")
    assert code == 0
    assert f"Example: lora-jax {command} " in out
    assert not re.search(r"\bPATH\b|\bSTR\b|\{None\}", out)


def test_what_is_not_there(call, tmp_path):
    code, out = call("inspect", tmp_path)
    assert code == 1
    assert "There are no adapters in" in out
    assert call("inspect")[0] == 2
    code, out = call("merge", tmp_path, tmp_path / "none", tmp_path / "out")
    assert code == 1


def test_a_checkpoint_with_a_name_twice(tmp_path):
    for name in ("1.safetensors", "2.safetensors"):
        safetensors.numpy.save_file({"x": np.ones(2)}, tmp_path / name)
    with pytest.raises(ValueError, match="'x' is in"):
        Checkpoint(tmp_path)
    one = Checkpoint(tmp_path / "1.safetensors")
    with pytest.raises(FileExistsError):
        rewrite(one, tmp_path / "2.safetensors", one.info, one.__getitem__)


def test_as_a_program(folders):
    """It starts alone, and takes no accelerator."""
    done = subprocess.run(
        [sys.executable, "-m", "lora_jax.cli", "verify", folders / "own"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "lora_jax, 2 matrices" in done.stdout
    assert _printing.console.file is sys.stdout
