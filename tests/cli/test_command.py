"""The command itself: its help, its errors, what it needs."""

import re
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

import lora_jax
from lora_jax.cli import __main__ as cli
from lora_jax.cli import _printing
from lora_jax.files._checkpoint import Checkpoint, rewrite


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


def test_version_and_what_is_missing(call, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lora-jax", "--version"])
    cli.main()
    assert capsys.readouterr().out == f"lora-jax {lora_jax.__version__}\n"
    monkeypatch.setitem(sys.modules, "tyro", None)
    with pytest.raises(SystemExit, match="tyro, which is not installed: pip install rich tyro"):
        cli.main()


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


def test_a_checkpoint_with_a_name_twice(tmp_path):
    for name in ("1.safetensors", "2.safetensors"):
        safetensors.numpy.save_file({"x": np.ones(2)}, tmp_path / name)
    with pytest.raises(ValueError, match="'x' is in"):
        Checkpoint(tmp_path)
    one = Checkpoint(tmp_path / "1.safetensors")
    with pytest.raises(FileExistsError):
        rewrite(one, tmp_path / "2.safetensors", one.info, one.__getitem__)
