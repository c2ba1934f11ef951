"""Square weights: who says whether they are stored (in, out) or (out, in)."""

import json

import numpy as np
import pytest
import safetensors.numpy
from helpers import relative_error

from lora_jax.cli.adapters._open_adapter import open_adapter
from lora_jax.files._tensors import Tensors

# What a base says of a square weight that is called as GPT-2's are: the files beside it and in it,
# and the class of the layer that follows from them, or why none does.
WIDE = np.ones((6, 8), np.float32)
ONE = np.ones(6, np.float32)
ASK = r"'h.c_proj.weight' (6, 6) may be stored (in, out) or (out, in)"
EVIDENCE = {
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
@pytest.mark.parametrize(("config", "more", "options", "expected"), EVIDENCE.values(), ids=EVIDENCE)
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
