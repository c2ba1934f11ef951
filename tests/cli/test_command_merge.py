"""`lora-jax merge`: what it writes is what Python merges."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from cli_folders import FILE, KEY, with_biases_of_B
from helpers import relative_error

import lora_jax
from lora_jax.files._checkpoint import Checkpoint
from lora_jax.files._tensors import Info, Tensors, write_tensors


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
    """An adapter next to a base, or its weights in another form, is neither read nor copied."""
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
