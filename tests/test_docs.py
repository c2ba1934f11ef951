"""What the pages show is what a user sees: their code runs, and prints what stands below it."""

import dataclasses
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import relative_error
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

import lora_jax
from lora_jax.cli import __main__ as cli

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = {path.relative_to(ROOT).as_posix(): path for path in ROOT.glob("docs/*.md")}
WITH_CODE = sorted(name for name, path in PAGES.items() if "```" in path.read_text())
FENCE = re.compile(r"^ *```(.*)\n((?:.*\n)*?) *```$", re.MULTILINE)
EXPLICIT = {"docs/sharding.md"}  # meshes with explicit axes


def examples(path):
    commands = [CodeBlockParser(shell, evaluator=run_commands) for shell in ("bash", "sh")]
    return list(Sybil([PythonCodeBlockParser(), *commands]).parse(path).examples())


def run_commands(example):
    """Runs `lora-jax` here; of other commands it looks whether there is what they name."""
    for line in str(example.parsed).splitlines():
        match shlex.split(line, comments=True):
            case []:
                pass
            case ["lora-jax", *arguments]:
                sys.argv[1:] = arguments
                with pytest.raises(SystemExit) as ended:
                    cli.main()
                assert ended.value.code == 0, line
            case ["make", target, *_]:
                assert f"\n{target}:" in (ROOT / "Makefile").read_text(), line
            case ["python" | "python3", "-m", module, *_]:
                assert importlib.util.find_spec(module), line
            case ["pip", "install", *_] | ["export", _]:
                pass
            case _:
                raise AssertionError(f"nothing here runs {line!r}")


def words(text):
    return " ".join(text.split())


@pytest.mark.parametrize("name", WITH_CODE)
def test_examples(name, tmp_path, monkeypatch, capsys):
    """All blocks of a page in one process, in a new folder: each goes on from the one before."""
    if name in EXPLICIT and not hasattr(jax, "set_mesh"):
        pytest.skip("in this jax explicit axes are not complete")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lora-jax"])
    for example in examples(PAGES[name]):
        example.evaluate()
    printed = words(capsys.readouterr().out)
    for language, text in FENCE.findall(PAGES[name].read_text()):
        assert language in ("python", "bash", "sh", "text")
        if language == "text":
            assert words(text) in printed


def test_resuming_again(tmp_path, monkeypatch):
    """The page's loop, run once more, resumes where it has ended and takes no step."""
    monkeypatch.chdir(tmp_path)
    setting, loop = examples(PAGES["docs/resuming.md"])
    setting.evaluate()
    loop.evaluate()
    loop.namespace["batches"] = []
    loop.evaluate()
    assert int(loop.namespace["state"].step) == 6


def test_every_public_name_is_in_the_reference():
    shown = re.findall(r"^::: (\S+)$", PAGES["docs/reference.md"].read_text(), re.MULTILINE)
    names = {f"lora_jax.{name}" for name in lora_jax.__all__} - {"lora_jax.peft"}
    names |= {f"lora_jax.peft.{name}" for name in lora_jax.peft.__all__}
    assert sorted(shown) == sorted(names)


def test_every_option_of_a_rule_is_in_its_table():
    rows = re.findall(r"^\| `(\w+)` \| (\S*) ?\|", PAGES["docs/rule.md"].read_text(), re.MULTILINE)
    fields = [field for field in dataclasses.fields(lora_jax.Rule) if field.init]
    assert [name for name, _ in rows] == [field.name for field in fields]
    for (_, shown), field in zip(rows, fields, strict=True):
        default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        assert shown.replace('"', "'") == default


def test_links_of_the_front_page():
    """Those of the site are for `make docs`."""
    targets = re.findall(r"\]\((?!https?:)([^)#]+)(?:#([^)]*))?\)", README.read_text())
    assert len(targets) > 10
    for path, anchor in targets:
        assert (ROOT / path).exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text().lower(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h).replace(" ", "-") for h in headings]
    assert len(README.read_text().splitlines()) <= 200


class Encoder(nn.Module):
    """Attention, whose kernels have three axes."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.LayerNorm()(x))
        return nn.Dense(3, name="head")(nn.LayerNorm()(x))


class Convolutions(nn.Module):
    """With BatchNorm, so with another collection."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3,), name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(8, name="mix")(x)))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(16, name="up")(x))), None


class Decoder(nn.Module):
    """Layers in one scan, each with remat."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(3, name="head")(nn.LayerNorm()(x))


class Dropout(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dropout(0.1, deterministic=not train)(nn.relu(nn.Dense(8, name="mix")(x)))
        return nn.Dense(3, name="head")(x)


@pytest.mark.parametrize(
    ("model", "adapted"),
    [
        (Encoder(), {"attention"}),
        (Convolutions(), {"mix"}),
        (Decoder(), {"layers"}),
        (Dropout(), {"mix"}),
    ],
    ids=["encoder", "convolutions", "decoder", "dropout"],
)
def test_recipe(model, adapted):
    """The front page, for models of every kind: adapted are all layers but the head."""
    commands, setting, recipe, _ = examples(README)
    commands.evaluate()
    setting.evaluate()
    setting.namespace["model"] = model
    recipe.evaluate()
    state, frozen = recipe.namespace["state"], recipe.namespace["frozen"]
    assert set(state.params) == adapted
    assert int(state.step) == 3
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    variables, x = recipe.namespace["variables"], recipe.namespace["x"]
    merged = {**variables, "params": lora_jax.lora_merge(frozen, state.params)}
    y = lora_jax.lora_apply(model, {**variables, "params": frozen}, state.params, x)
    assert relative_error(y, model.apply(merged, x)) < 1e-5
    assert relative_error(y, model.apply(variables, x)) > 1e-4


def test_recipe_of_nnx():
    """The front page's loop with a model of NNX: adapted are all layers but the head."""
    for example in examples(README):
        example.evaluate()
    model, frozen, adapters, x = map(example.namespace.get, ("model", "frozen", "adapters", "x"))
    trained = lora_jax.lora_state(model)
    assert list(trained["layers"]) == list(adapters["layers"]) == ["0"]
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), trained, adapters)
    assert jax.tree.all(changed)
    rngs = nnx.Rngs(0)  # other numbers: all come from the merged state
    plain = nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), nnx.tanh, nnx.Linear(8, 3, rngs=rngs))
    nnx.update(plain, lora_jax.lora_merge(frozen, trained))
    assert relative_error(model(x), plain(x)) < 1e-5
