"""Kernels that lie side by side in one, where some or all are adapted."""

import json

import chex
import jax
import jax.numpy as jnp
import pytest
from helpers import random_like
from peft_folders import edit_config, edit_tensors, keys_of

import lora_jax

QKV = [
    ("{path*}/qkv/kernel", "{path*}.{q|k|v}_proj.weight", "linear", lora_jax.KernelAxes(fused=3))
]


@pytest.mark.parametrize("parts", [(0,), (1,), (2,), (0, 2), (2, 1), (0, 1, 2)])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_parts_of_a_fused_kernel(parts, variant, tmp_path):
    """They are chosen from what is in the file, and go back as the same keys."""
    params = {
        "a": {"qkv": {"kernel": jnp.ones((4, 9))}},
        "b": {"qkv": {"kernel": jnp.ones((4, 9))}},
    }
    params = random_like(params)
    options = {"variant": variant, "detach_norm": variant == "dora", "fused": 3}
    rules = [
        lora_jax.Rule("a/qkv/kernel", rank=2, parts=parts, **options),
        lora_jax.Rule("b/qkv/kernel", rank=2, **options),
    ]
    frozen, adapters = lora_jax.lora_init(
        jax.random.key(0), params, lora_jax.LoraConfig(rules), axes=None
    )
    adapters = random_like(adapters)
    lora_jax.peft.save(tmp_path / "one", frozen, adapters, names=QKV)
    expected = {f"a.{'qkv'[part]}_proj" for part in parts} | {f"b.{x}_proj" for x in "qkv"}
    assert keys_of(tmp_path / "one") == expected
    fields = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert fields["target_modules"] == sorted(expected)

    frozen, again = lora_jax.peft.load(tmp_path / "one", params, names=QKV)
    assert again["a"]["qkv"]["kernel"].axes.parts == tuple(sorted(parts))
    assert again["b"]["qkv"]["kernel"].axes.parts == (0, 1, 2)
    chex.assert_trees_all_close(
        lora_jax.lora_merge(frozen, again), lora_jax.lora_merge(frozen, adapters), atol=1e-6
    )
    lora_jax.peft.save(tmp_path / "two", frozen, again, names=QKV)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_parts_of_fused_kernels_in_a_scan(tmp_path):
    """Every layer has the same ones, or it is refused."""
    axes = lora_jax.KernelAxes((1,), (2,), (0,), fused=3)
    names = [("layers/qkv", "layers.{i}.{q|k|v}_proj.weight", "linear", axes)]
    params = random_like({"layers": {"qkv": jnp.ones((2, 4, 9))}})
    model_axes = {"layers/qkv": lora_jax.KernelAxes((1,), (2,), (0,))}
    rule = lora_jax.Rule("layers/qkv", rank=2, fused=3, parts=(0, 2))
    frozen, adapters = lora_jax.lora_init(
        jax.random.key(0), params, lora_jax.LoraConfig([rule]), axes=model_axes
    )
    adapters = random_like(adapters)
    lora_jax.peft.save(tmp_path, frozen, adapters, names=names)
    assert keys_of(tmp_path) == {f"layers.{i}.{x}_proj" for i in (0, 1) for x in "qv"}
    chex.assert_trees_all_equal(lora_jax.peft.load(tmp_path, params, names=names)[1], adapters)
    edit_tensors(tmp_path, lambda t: [t.pop(k) for k in list(t) if "1.q_proj" in k])
    edit_config(tmp_path, target_modules=[])
    with pytest.raises(ValueError, match=r"lacks 'layers\.1\.q_proj\.weight'"):
        lora_jax.peft.load(tmp_path, params, names=names)


def test_a_part_that_should_be_there(tmp_path):
    params = random_like({"a": {"qkv": {"kernel": jnp.ones((4, 9))}}})
    rule = lora_jax.Rule(".*", rank=2, fused=3, parts=(0, 2))
    split = lora_jax.lora_init(jax.random.key(0), params, lora_jax.LoraConfig([rule]))
    lora_jax.peft.save(tmp_path, *split, names=QKV)
    edit_config(tmp_path, target_modules=["q_proj", "k_proj", "v_proj"])
    with pytest.raises(ValueError, match=r"lacks 'a\.k_proj', of target_modules"):
        lora_jax.peft.load(tmp_path, params, names=QKV)
    # A list of names may name some of the kernels only: those that are adapted.
    axes = lora_jax.KernelAxes(fused=3, parts=(0, 2))
    some = [("a/qkv/kernel", "a.{q|v}_proj.weight", "linear", axes)]
    lora_jax.peft.save(tmp_path / "two", *split, names=some)
    assert keys_of(tmp_path / "two") == {"a.q_proj", "a.v_proj"}
    chex.assert_trees_all_equal(
        lora_jax.peft.load(tmp_path / "two", params, names=some)[1], split[1]
    )
    rule = lora_jax.Rule(".*", rank=2, fused=3, parts=(1,))
    split = lora_jax.lora_init(jax.random.key(0), params, lora_jax.LoraConfig([rule]))
    with pytest.raises(ValueError, match="no name in PyTorch for part 1 of 'a/qkv/kernel'"):
        lora_jax.peft.save(tmp_path / "three", *split, names=some)
    with pytest.raises(ValueError, match="3 kernels side by side, and names names 2 of them"):
        lora_jax.export(tmp_path / "merged", *split, names=some)


@pytest.mark.parametrize("parts", [(0,), (1,), (0, 1)])
def test_gemmas_keys_and_values(parts, tmp_path):
    params = {"layer_0": {"attn": {"kv_einsum": {"w": jnp.ones((2, 2, 6, 3))}}}}
    params = random_like(params)
    axes = lora_jax.KernelAxes((2,), (0, 1, 3))
    rule = lora_jax.Rule(".*", rank=2, fused=2, parts=parts)
    frozen, adapters = lora_jax.lora_init(
        jax.random.key(0),
        params,
        lora_jax.LoraConfig([rule]),
        axes={"layer_0/attn/kv_einsum/w": axes},
    )
    adapters = random_like(adapters)
    lora_jax.peft.save(tmp_path, frozen, adapters, names="gemma")
    assert keys_of(tmp_path) == {f"model.layers.0.self_attn.{'kv'[part]}_proj" for part in parts}
    chex.assert_trees_all_equal(
        lora_jax.peft.load(tmp_path, params, names="gemma"), (frozen, adapters)
    )
