"""The benchmarks' contenders in PyTorch compute what those in JAX do."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from benchmarks.contenders.families import FAMILIES, check_losses, trained
from benchmarks.contenders.table import build
from benchmarks.models import arrays, data, pytorch
from benchmarks.models.cases import CASES

pytestmark = pytest.mark.interop
ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_noise_is_the_same_in_torch(dtype):
    noise = data.noise(CASES["tiny"], "a", (100, 30), std=0.5, mean=1.0)
    theirs = pytorch.array_of(noise, getattr(torch, dtype))
    ours = arrays.array_of(noise, dtype)
    got, expected = (np.asarray(x, np.float32) for x in (theirs.float(), ours))
    np.testing.assert_allclose(got, expected, rtol=2**-8 if dtype == "bfloat16" else 1e-6)


@pytest.mark.parametrize("change", [{}, {"kv_heads": 2, "tied": True, "adapted": ("q", "v")}])
@pytest.mark.parametrize("pair", [("full", "torch-full"), ("dora-detached", "peft-dora")])
def test_steps_are_the_same_in_torch(pair, change):
    case = dataclasses.replace(CASES["tiny-decoder"], **change)
    losses = {}
    for name in pair:
        step = build(name, case)
        step.compile()
        assert step.facts["trained"] == trained(case, FAMILIES[name])
        losses[name] = [step.jobs["step"]() for _ in range(3)]
    check_losses(losses, 1e-4, exact=True)


def test_measures_peft_on_the_same_shapes(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--cases", "peft", "published"]
    args = ["--rounds", "1", "--steps", "1", "--minutes", "20", "--out", str(tmp_path)]
    process = subprocess.run([*command, *args], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    found = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(found) == 2
    for result in found:
        assert result["complete"]
        for one in result["heats"][0]["contenders"].values():
            assert one["jobs"]["step"]["median"] > 0
