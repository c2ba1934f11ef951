"""Damaged and hostile folders, and those of other versions of PEFT."""

import json

import chex
import numpy as np
import pytest
from peft_folders import FILE, UP, edit_config, edit_tensors, load

import lora_jax
from lora_jax.cli.adapters._open_adapter import open_adapter
from lora_jax.files._tensors import Tensors, encode


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "only LORA is read"),
        ({"r": 3}, "for rank 3"),
        ({"r": 0}, "a rank of at least 1"),
        ({"r": True}, "a rank of at least 1"),
        ({"lora_alpha": "x"}, "'lora_alpha' must be a positive number"),
        ({"lora_alpha": 10**400}, "'lora_alpha' must be a positive number"),
        ({"lora_alpha": None}, "'lora_alpha' must be a positive number, got None"),
        ({"r": None}, "a rank of at least 1, got None"),
        ({"lora_alpha": -1}, "'lora_alpha' must be a positive number"),
        ({"rank_pattern": {"up": 4}}, "for rank 4"),
        ({"rank_pattern": [1]}, "'rank_pattern' must be an object"),
        ({"rank_pattern": {"(a+)+": 4}}, "too complex .*of a group none but '\\?'"),
        ({"rank_pattern": {"(?:up){1,2}": 4}}, "too complex"),
        ({"rank_pattern": {".*a.*b.*c.*": 4}}, "too complex"),
        ({"alpha_pattern": {"(": 4}}, "not a regular expression"),
        ({"alpha_pattern": {"layers.0.up": 4}}, "different ranks and alphas"),
        ({"use_dora": False}, "it should have A, B"),
        ({"use_rslora": 1}, "must be true or false"),
        ({"lora_dropout": 1.0}, r"\[0, 1\)"),
        ({"bias": "some"}, "one of none, all, lora_only"),
        ({"lora_bias": True}, "makes no sense in PEFT"),
        ({"init_lora_weights": "pissa"}, "changes the base"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 1]]}, "no equal here"),
        ({"trainable_token_indices": [1]}, "no equal here. Some rows of an embedding"),
        ({"trainable_token_indices": {"embed": [1]}}, "no equal here. Some rows of an embedding"),
        ({"ensure_weight_tying": True}, "no equal here. It ties what is trained"),
        ({"of_the_future": {"x": 1}}, "of_the_future"),
        ({"modules_to_save": None}, "neither of an adapter nor of modules_to_save"),
        ({"modules_to_save": ["head", "embed"]}, "lacks 'model.embed.weight', of modules_to_save"),
        ({"target_modules": ["up", "heads", "conv", "embed"]}, "lacks 'model.embed'"),
        ({"target_modules": 1}, "list of strings"),
    ],
)
def test_a_config_that_makes_no_sense(saved, model, change, message):
    edit_config(saved[0], **change)
    with pytest.raises(ValueError, match=message) as caught:
        load(saved[0], model)
    assert str(saved[0]) in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"of_the_future": None},
        # As PEFT reads it, or its default.
        dict.fromkeys(
            ("fan_in_fan_out", "use_rslora", "lora_bias", "bias", "lora_dropout", "rank_pattern")
        ),
        dict.fromkeys(("alpha_pattern", "target_parameters", "init_lora_weights", "loftq_config")),
        {"target_modules": None},
        {"lora_ga_config": "DROP"},
        {"modules_to_save": ["head", "score"]},
    ],
)
def test_other_versions_of_peft(saved, model, change):
    edit_config(saved[0], **change)
    chex.assert_trees_all_equal(load(saved[0], model)[1], saved[2])


def renamed(old, new):
    def change(tensors):
        tensors[new] = tensors.pop(old)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}.lora_A.weight"), "'model.layers.0.up' has .*it should have A, B"),
        (lambda t: t.pop(f"{UP}.lora_magnitude_vector"), "magnitudes of DoRA dropped"),
        (lambda t: [t.pop(k) for k in list(t) if "layers.2" in k], "lacks 'model.layers.2.up"),
        (lambda t: [t.pop(k) for k in list(t) if "heads" in k], "lacks 'model.heads', of target"),
        (lambda t: t.pop("base_model.model.head.bias"), "lacks 'head.bias', of modules_to_save"),
        (lambda t: t.update({"x": np.ones(1)}), "'x' does not begin with"),
        (lambda t: t.update({f"{UP}.more": np.ones(1)}), "up.more' is neither of an adapter"),
        (
            lambda t: [t.update({k.replace("up", "down"): t.pop(k)}) for k in list(t)],
            "'model.layers.0.down.weight'.*Nearest: model.layers.0.up.weight",
        ),
        (renamed(f"{UP}.lora_A.weight", f"{UP}.lora_embedding_A"), "says that it is linear"),
        (
            lambda t: t.update({f"{UP}.lora_magnitude_vector.weight": np.ones(6)}),
            "in two forms",
        ),
        (lambda t: t.update({f"{UP}.lora_A.weight": np.ones((6, 2))}), "A of .* should be"),
        (lambda t: t.update({f"{UP}.lora_A.weight": np.ones((2, 6), int)}), "int64"),
        (lambda t: t.update({f"{UP}.lora_A.weight": np.ones((0, 6))}), r"A.weight' is \(0, 6\)"),
        (lambda t: t.update({f"{UP}.lora_B.weight": np.ones(())}), r"B.weight' is \(\), which is"),
        (
            lambda t: t.update({f"{UP}.lora_A.weight": np.full((2, 6), np.nan)}),
            "lora_A.weight' has NaN",
        ),
        (lambda t: t.update({"base_model.model.head.bias": np.ones(5)}), "'head.bias' is"),
        (lambda t: t.update({f"{UP}.base_layer.weight": np.ones((6, 6))}), "another one than"),
    ],
)
def test_tensors_that_do_not_fit(saved, model, change, message):
    edit_tensors(saved[0], change)
    with pytest.raises(ValueError, match=message) as caught:
        load(saved[0], model)
    assert str(saved[0]) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("lora_A.weight", (0, 2**62), "is .* larger than an array may be"),
        ("lora_A.weight", (0, 6), "which is not a matrix with numbers"),
        ("lora_B.weight", (6, 0), "which is not a matrix with numbers"),
        ("lora_magnitude_vector", (0,), r"'model.layers.0.up' has m \(0,\), but 6 outputs"),
        ("lora_magnitude_vector", (2**62, 0), "is .* larger than an array may be"),
    ],
)
def test_shapes_without_numbers(saved, name, shape, message):
    """They take no bytes of the file, so it need not be large for any size next to the 0."""
    tensors = dict(Tensors(saved[0] / FILE))
    tensors[f"{UP}.{name}"] = np.zeros(0, np.float32)
    content = encode(tensors)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[f"{UP}.{name}"]["shape"] = shape
    new = json.dumps(header).encode()
    content = len(new).to_bytes(8, "little") + new + content[8 + length :]
    (saved[0] / FILE).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_adapter(saved[0])
    assert str(saved[0] / FILE) in str(caught.value)


def test_no_pickle(saved, model):
    (saved[0] / FILE).rename(saved[0] / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickle"):
        load(saved[0], model)


def test_a_folder_that_has_folders(saved, model):
    saved[0].rename(saved[0].parent / "hub")
    (saved[0] / "a").mkdir(parents=True)
    (saved[0].parent / "hub").rename(saved[0] / "task")
    with pytest.raises(FileNotFoundError, match="Folders in it that have one: task"):
        load(saved[0], model)
    load(saved[0] / "task", model)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
        load(saved[0] / "none", model)


def test_a_folder_of_the_other_format_says_so(saved, model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"of PEFT, which lora_jax\.peft\.load reads"):
        lora_jax.load(saved[0], model[0])
    lora_jax.save(tmp_path / "own", saved[2])
    with pytest.raises(FileNotFoundError, match=r"of lora_jax, which lora_jax\.load reads"):
        load(tmp_path / "own", model)


def test_every_truncation_is_found(saved, model):
    content = (saved[0] / FILE).read_bytes()
    for size in np.random.default_rng(0).integers(len(content), size=100):
        (saved[0] / FILE).write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
            load(saved[0], model)
