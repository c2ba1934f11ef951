"""`lora-jax diff`: how far two adapters are apart."""

import json

import jax
import jax.numpy as jnp
import pytest
from cli_folders import KEY, with_biases_of_B

import lora_jax
from lora_jax.cli.adapters._adapted_matrix import difference
from lora_jax.cli.adapters._open_adapter import open_adapter


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
