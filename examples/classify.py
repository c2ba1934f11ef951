"""Sentences of your own, classified by one base with each of the demo's adapters in turn.

    python -m examples.classify "I expected to hate it, and left smiling." "Two lost hours."

To serve another adapter is to pass another tree to the same compiled function.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import rich.table
import tyro
from rich.console import Console

import lora_jax
from examples import classifier, minilm
from examples.assets import MissingAsset

TITLES = {"head": "base, new head alone", "lora": "LoRA", "dora": "DoRA"}
SENTENCES = (
    "I expected to hate it, and left the cinema smiling.",
    "Two hours that I will never get back.",
    "Not the disaster that I had been promised.",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Classifies your own sentences with the adapters that `make demo` has trained."""

    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = SENTENCES
    """The sentences."""
    runs: Path = Path("runs/demo")
    """Where the demo has saved its adapters."""


class NoAdapters(Exception):
    """The demo has not run yet."""


@functools.partial(jax.jit, static_argnames="model")
def probabilities(
    model: classifier.Model, frozen: Any, adapters: Any, tokens: Any, mask: Any
) -> jax.Array:
    """``(texts, classes)``, of the adapted model."""
    return jax.nn.softmax(classifier.logits(model, frozen, adapters, tokens, mask))


def answers(
    texts: Sequence[str],
    model: classifier.Model,
    classes: Sequence[str],
    split: dict[str, tuple[Any, Any]],
    length: int,
) -> rich.table.Table:
    """What each adapter says of each text.

    Args:
      texts: the texts.
      model: the classifier.
      classes: their names.
      split: for each adapter ``(frozen, adapters)``.
      length: tokens of a text that are read.
    """
    tokens, mask = minilm.tokenize(texts, length)
    lines = rich.table.Table(title="The same base, another tree of adapters", title_justify="left")
    lines.add_column("")
    said = []
    for name, (frozen, adapters) in split.items():
        lines.add_column(TITLES.get(name, name))
        said.append(np.asarray(probabilities(model, frozen, adapters, tokens, mask)))
    for i, text in enumerate(texts):
        each = [f"{classes[p[i].argmax()]} {100 * p[i].max():.0f} %" for p in said]
        lines.add_row(text, *each)
    return lines


def main(options: Options) -> None:
    """Loads base and adapters, and prints the answers.

    Raises:
      NoAdapters: if there are none in the folder.
    """
    found = {name: options.runs / name for name in TITLES if (options.runs / name).is_dir()}
    if not found:
        raise NoAdapters(f"there are no adapters in {options.runs}: run make demo first.")
    facts = {
        name: json.loads((folder / "adapter.json").read_text())["metadata"]
        for name, folder in found.items()
    }
    config, encoder = minilm.load_pretrained()
    one = next(iter(facts.values()))
    api = one.get("api", "linen")
    model, params = classifier.make(api, config, len(one["classes"]), encoder, one["seed"])
    params = classifier.with_base(params, one.get("base", "float32"))
    split = {name: lora_jax.load(folder, params, verify=True) for name, folder in found.items()}
    table = answers(options.texts, model, one["classes"], split, one["length"])
    Console().print(table)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except (MissingAsset, NoAdapters) as error:
        sys.exit(f"error: {error}")
