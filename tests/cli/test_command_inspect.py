"""`lora-jax inspect`: what is in an adapter."""

import jax.numpy as jnp
import numpy as np
import pytest
from cli_folders import KEY
from helpers import random_like

import lora_jax
from lora_jax.cli.adapters._open_adapter import open_adapter


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
