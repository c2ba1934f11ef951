"""Names in Flax and in PyTorch, and families of them."""

import jax
import jax.numpy as jnp
import pytest
from peft_folders import NAMES, RULES, adapted

import lora_jax
from lora_jax.peft import KeyMapping


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("{a}/k", "{b}.k"), "every placeholder"),
        (("{a}/{a}", "{a}"), "every placeholder"),
        (("a", "b", "x"), "no kind 'x'"),
        (("a", "{i*}"), r"no '\*'"),
        (("{a|b}", "{a|b}"), "every placeholder"),
    ],
)
def test_names_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        KeyMapping(*fields)


def test_names_of_fused_kernels():
    name = KeyMapping("l_{i}/kv", "l.{i}.{k|v}.weight")
    assert name.match("l_3/kv", (2,)) == [((0,), "l.3.k.weight"), ((1,), "l.3.v.weight")]
    assert name.match("l_3/q", (2,)) is None
    with pytest.raises(ValueError, match="names 2"):
        name.match("l_3/kv", (3,))


def test_a_parameter_without_a_name(model, tmp_path):
    frozen, adapters = adapted(model, RULES["lora"])
    with pytest.raises(ValueError, match=r"no name in PyTorch for '.*/kernel'"):
        lora_jax.peft.save(tmp_path, frozen, adapters, names=[("head/{leaf}", "head.{leaf}")])
    with pytest.raises(ValueError, match=r"stacks 1 axes.*Give names= a KeyMapping for it"):
        lora_jax.peft.save(tmp_path, frozen, adapters, axes=model[1])
    with pytest.raises(ValueError, match=r"stacks 0 axes.*known with axes="):
        lora_jax.export(
            tmp_path / "x", {"layers": {"up": {"kernel": jnp.ones((8, 6))}}}, {}, names=NAMES
        )
    for names, message in (
        ([("a/kernel", "lin.weight"), ("b/kernel", "lin.weight")], "another kernel has too"),
        ([("{x}/kernel", "mha.{x}_proj"), *NAMES[-1:]], "does not end in"),
    ):
        params = {x: {"kernel": jnp.ones((3, 3))} for x in "ab"}
        config = lora_jax.LoraConfig([lora_jax.Rule("./kernel", rank=1)])
        split = lora_jax.lora_init(jax.random.key(0), params, config)
        with pytest.raises(ValueError, match=message):
            lora_jax.peft.save(tmp_path, *split, names=names)


@pytest.mark.parametrize("names", ["llama9", 3])
def test_families_that_do_not_exist(saved, model, names):
    with pytest.raises((ValueError, TypeError), match="names"):
        lora_jax.peft.load(saved[0], model[0], names=names)
