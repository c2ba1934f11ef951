r"""Which learning rates suit each initialisation of an adapter.

Fine-tunes all-MiniLM-L6-v2 on 3,000 sentences of movie reviews for one epoch, for both choices
of the factor that starts at zero, several standard deviations of the other one, and learning
rates as people copy them from papers. Accuracy is on 2,000 further *training* sentences, so that
nothing is chosen on the test set. Run `make demo` once, then

    python -m benchmarks.learning_rates --variants lora
    python -m benchmarks.learning_rates --variants dora --rates 5e-4 2e-3 \
        --starts "U = 0, std 1/sqrt(d)" "V = 0, std 1/sqrt(d)"
    python -m benchmarks.learning_rates --variants head --rates 1e-3 3e-3 1e-2 3e-2
    python -m benchmarks.learning_rates --variants full --rates 5e-5 1e-4 2e-4 4e-4
"""

import dataclasses
import functools
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro

import lora_jax
from examples import classifier, data, finetune, minilm
from lora_jax.core.variants._registry import trained_variants

STARTS: dict[str, dict[str, Any]] = {
    "U = 0, std 1/sqrt(r)": {"zero": "U", "std": 8**-0.5},
    "U = 0, std 2/sqrt(d)": {"zero": "U", "std": 2 * 384**-0.5},
    "U = 0, std 1/sqrt(d)": {"zero": "U", "std": 384**-0.5},
    "V = 0, std 1/sqrt(d)": {"zero": "V", "std": 384**-0.5},
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Trains with every start and learning rate."""

    variants: tuple[str, ...] = ("lora", "dora")
    """Variants to train; or `head` or `full`, which have no factors to start."""
    starts: tuple[str, ...] = tuple(STARTS)
    """Names of `STARTS`."""
    rates: tuple[float, ...] = (1e-4, 5e-4, 2e-3, 5e-3)
    """Learning rates."""
    seeds: int = 2
    """Seeds for each."""
    length: int = 32
    """Tokens of a sentence."""
    batch: int = 32
    """Sentences in a batch."""
    out: Path = Path("benchmarks/results/learning_rates.json")
    """Where the results go; what is there already is not run again."""


# The rate is an argument, so that one trace serves all rates.
TX = optax.chain(
    optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(0.01)
)


@functools.partial(jax.jit, static_argnames="model", donate_argnames=("adapters", "opt_state"))
def step(
    model: classifier.Model,
    adapters: Any,
    opt_state: Any,
    frozen: Any,
    batch: Any,
    rng: jax.Array,
    rate: float,
) -> tuple[Any, Any]:
    """One step of AdamW."""
    grads = jax.grad(finetune.loss_fn)(adapters, model, frozen, batch, rng)
    updates, opt_state = TX.update(grads, opt_state, adapters)
    return optax.apply_updates(adapters, jax.tree.map(lambda u: -rate * u, updates)), opt_state


def accuracy(
    variant: str, start: str, rate: float, seed: int, options: Options, task: data.Task
) -> float:
    """Accuracy in per cent after one epoch."""
    config, encoder = minilm.load_pretrained()
    model, params = classifier.make("linen", config, 2, encoder, seed)
    if variant in trained_variants():
        rule = lora_jax.Rule(classifier.KERNELS, 8, alpha=16.0, variant=variant, **STARTS[start])
        lora_config = lora_jax.LoraConfig([rule], trainable=[finetune.HEAD])
    else:
        lora_config = finetune.methods(8, 16.0)[variant].config
    key = jax.random.key(seed)
    frozen, adapters = lora_jax.lora_init(key, params, lora_config)
    texts, labels = task.train_texts, task.train_labels
    train, held_out = slice(0, 3000), slice(3000, 5000)
    inputs = (*minilm.tokenize(texts[train], options.length), labels[train])
    steps = len(inputs[0]) // options.batch
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
    opt_state = TX.init(adapters)
    for i, batch in enumerate(data.batches(inputs, options.batch, seed=1000 * seed)):
        rng = jax.random.fold_in(key, i)
        adapters, opt_state = step(model, adapters, opt_state, frozen, batch, rng, schedule(i))
    logits = finetune.logits_of(
        functools.partial(finetune.predict, model, frozen, adapters),
        *minilm.tokenize(texts[held_out], options.length),
    )
    return 100.0 * float(np.mean(logits.argmax(-1) == labels[held_out]))


def main(options: Options) -> None:
    """Runs what is not there yet, and prints all as a table."""
    results: dict[str, list[float]] = {}
    if options.out.exists():
        results = json.loads(options.out.read_text())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    task = data.movie_reviews()
    for variant in options.variants:
        print(f"\n| {variant} | {' | '.join(f'{rate:g}' for rate in options.rates)} |")
        print("|---" * (1 + len(options.rates)) + "|")
        for start in options.starts if variant in trained_variants() else ("-",):
            cells = []
            for rate in options.rates:
                name = f"{variant}, {start}, {rate:g}"
                done = results.setdefault(name, [])
                while len(done) < options.seeds:
                    percent = accuracy(variant, start, rate, len(done), options, task)
                    done.append(round(percent, 2))
                    options.out.write_text(json.dumps(results, indent=1))
                cells.append(f"{statistics.mean(done[: options.seeds]):.1f}")
            print(f"| {start} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
