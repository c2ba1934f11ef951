"""An adapter in both formats with its base, and a way to call the command."""

import sys

import jax
import pytest
from cli_folders import KEY
from helpers import random_like

import lora_jax
from lora_jax.cli import __main__ as cli


@pytest.fixture
def split():
    normal = iter(jax.random.split(KEY, 9))
    params = {
        "a": {
            "kernel": jax.random.normal(next(normal), (6, 8)),
            "bias": jax.random.normal(next(normal), (8,)),
        },
        "b": {
            "kernel": jax.random.normal(next(normal), (8, 3)),
            "bias": jax.random.normal(next(normal), (3,)),
        },
        "embed": {"embedding": jax.random.normal(next(normal), (11, 6))},
    }
    rule = lora_jax.Rule("(a|b)/kernel", rank=2, alpha=3.0, variant="dora", detach_norm=True)
    frozen, adapters = lora_jax.lora_init(KEY, params, lora_jax.LoraConfig([rule]))
    return frozen, random_like(adapters, scale=0.5)


@pytest.fixture
def folders(split, tmp_path):
    """An adapter in both formats, and its base with both names."""
    lora_jax.save(tmp_path / "own", split[1], frozen=split[0], metadata={"task": "topics"})
    lora_jax.peft.save(tmp_path / "peft", *split)
    lora_jax.export(tmp_path / "flax.safetensors", split[0], {})
    lora_jax.export(tmp_path / "torch.safetensors", split[0], {}, names="transformers")
    return tmp_path


def run(capsys, monkeypatch, *arguments):
    """The exit code and what was printed."""
    monkeypatch.setattr(sys, "argv", ["lora-jax", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    printed = capsys.readouterr()
    return caught.value.code, printed.out + printed.err


@pytest.fixture
def call(capsys, monkeypatch):
    def call(*arguments, columns=200):
        monkeypatch.setenv("COLUMNS", str(columns))
        return run(capsys, monkeypatch, *arguments)

    return call
