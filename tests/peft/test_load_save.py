"""What is saved for PEFT comes back, and what PEFT has not is refused.

`tests/interop/test_peft_files.py` does the same with PEFT itself.
"""

import json

import chex
import jax
import jax.numpy as jnp
import pytest
from peft_folders import FILE, NAMES, RULES, adapted, load

import lora_jax
from lora_jax.files._tensors import Tensors
from lora_jax.peft import _save


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_comes_back_bit_for_bit(model, rules, tmp_path):
    frozen, adapters = adapted(model, rules)
    lora_jax.peft.save(tmp_path, frozen, adapters, names=NAMES, axes=model[1])
    again = load(tmp_path, model)
    chex.assert_trees_all_equal((frozen, adapters), again)
    assert jax.tree.structure((frozen, adapters)) == jax.tree.structure(again)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    lora_jax.peft.save(tmp_path, *again, names=NAMES, axes=model[1])
    assert files == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_half_precision(model, tmp_path):
    frozen, adapters = adapted(model, RULES["dora"])
    lora_jax.peft.save(tmp_path, frozen, adapters, names=NAMES, axes=model[1], dtype=jnp.bfloat16)
    assert {info.dtype.name for info in Tensors(tmp_path / FILE).info.values()} == {"bfloat16"}
    _, again = load(tmp_path, model)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(again)} == {"float32"}
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), adapters)
    chex.assert_trees_all_equal(again, rounded)


def test_biases(model, tmp_path):
    frozen, adapters = adapted(model, RULES["lora"], ["(layers/up|heads|conv)/bias"])
    lora_jax.peft.save(tmp_path, frozen, adapters, names=NAMES, axes=model[1])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["bias"] == "lora_only"
    chex.assert_trees_all_equal(load(tmp_path, model), (frozen, adapters))
    frozen, adapters = adapted(model, RULES["lora"], ["(layers/up|heads)/bias"])
    with pytest.raises(ValueError, match=r"biases of adapted modules.*'conv/bias' is not"):
        lora_jax.peft.save(tmp_path, frozen, adapters, names=NAMES, axes=model[1])


def test_a_rank_above_the_matrix_comes_back(tmp_path):
    params = {"a": {"kernel": jnp.ones((3, 2))}}
    config = lora_jax.LoraConfig([lora_jax.Rule("a/kernel", rank=2)])
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config)
    adapter = adapters["a"]["kernel"]
    wide = adapter.replace(U=jnp.ones((3, 5)), V=jnp.ones((5, 2)), rank=5, alpha=5.0)
    lora_jax.peft.save(tmp_path / "peft", frozen, {"a": {"kernel": wide}})
    _, loaded = lora_jax.peft.load(tmp_path / "peft", params)
    lora_jax.save(tmp_path / "own", loaded)
    chex.assert_trees_all_equal(lora_jax.load(tmp_path / "own", params)[1], loaded)


@pytest.mark.parametrize(
    ("rules", "trainable", "message"),
    [
        (
            [lora_jax.Rule("heads/kernel", rank=2), *RULES["dora"]],
            (),
            "LoRA and DoRA in one",
        ),
        (
            [lora_jax.Rule("heads/kernel", rank=2, rslora=True), *RULES["lora"]],
            (),
            "rsLoRA and plain LoRA in one",
        ),
        (
            [lora_jax.Rule("heads/kernel", rank=2, dropout=0.1), *RULES["lora"]],
            (),
            "one dropout",
        ),
        (
            RULES["lora"],
            ["head/bias"],
            "part of the module 'head' is fully trained, and 'head/kernel' is not",
        ),
        ([], ["head/.*"], "no adapter of a kernel"),
        ([lora_jax.Rule("embed/embedding", rank=2, materialize=True)], (), "all uses see"),
    ],
)
def test_what_peft_has_not_is_refused(model, tmp_path, rules, trainable, message):
    frozen, adapters = adapted(model, rules, trainable)
    with pytest.raises(ValueError, match=message):
        lora_jax.peft.save(tmp_path / "new", frozen, adapters, names=NAMES, axes=model[1])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("rates", "message"),
    [((0.1, 0.0, 0.0), "one dropout for all"), ((0.1, 0.1, 0.1), "no dropout for embeddings")],
)
def test_dropouts_beside_an_embedding(model, rates, message, tmp_path):
    rules = [
        lora_jax.Rule(pattern, rank=1, dropout=rate)
        for pattern, rate in zip(
            ("layers/up/kernel", "heads/kernel", "embed/embedding"), rates, strict=True
        )
    ]
    frozen, adapters = adapted(model, rules)
    with pytest.raises(ValueError, match=message):
        lora_jax.peft.save(tmp_path, frozen, adapters, names=NAMES, axes=model[1])


def test_names_that_end_alike(tmp_path):
    """PEFT compares ends of names: what is not adapted is excluded, or it is refused."""
    params = {
        "lin": {"kernel": jnp.ones((3, 3))},
        "sub": {"lin": {"kernel": jnp.ones((3, 3))}, "prelin": {"kernel": jnp.ones((3, 3))}},
    }

    def split(pattern, trainable=()):
        config = lora_jax.LoraConfig([lora_jax.Rule(pattern, rank=1)], trainable=trainable)
        return lora_jax.lora_init(jax.random.key(0), params, config)

    lora_jax.peft.save(tmp_path, *split("lin/kernel"))
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (fields["target_modules"], fields["exclude_modules"]) == (["lin"], ["sub.lin"])
    chex.assert_trees_all_equal(lora_jax.peft.load(tmp_path, params), split("lin/kernel"))
    with pytest.raises(ValueError, match=r"train 'sub\.(pre)?lin\.weight' fully too"):
        lora_jax.peft.save(tmp_path, *split("sub/prelin/kernel", ["lin/kernel"]))
    head = {"classifier": {"kernel": jnp.ones((3, 2))}} | params
    config = lora_jax.LoraConfig([lora_jax.Rule("lin/kernel", rank=1)])
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), head, config)
    with pytest.raises(ValueError, match=r"'classifier\.weight' fully too.*leave out task_type"):
        lora_jax.peft.save(tmp_path, frozen, adapters, task_type="SEQ_CLS")


def test_patterns_are_written_in_the_order_that_counts(tmp_path):
    params = {x: {"kernel": jnp.ones((3, 3))} for x in "abc"}
    names = [
        ("a/kernel", "z.lin.weight"),
        ("b/kernel", "lin.weight"),
        ("c/kernel", "other.weight"),
    ]
    alphas = {"a": 7, "b": 3, "c": 1}
    rules = [lora_jax.Rule(f"{x}/kernel", rank=1, alpha=alpha) for x, alpha in alphas.items()]
    split = lora_jax.lora_init(jax.random.key(0), params, lora_jax.LoraConfig(rules))
    lora_jax.peft.save(tmp_path, *split, names=names)
    _, adapters = lora_jax.peft.load(tmp_path, params, names=names)
    assert {x: adapters[x]["kernel"].alpha for x in "abc"} == alphas


def test_a_config_is_never_beside_tensors_of_another(saved, model, monkeypatch):
    folder, frozen, _ = saved
    frozen, adapters = adapted(model, RULES["patterns"])

    def fail(path, content):
        raise OSError("disk full")

    monkeypatch.setattr(_save, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        lora_jax.peft.save(folder, frozen, adapters, names=NAMES, axes=model[1])
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
        load(folder, model)
