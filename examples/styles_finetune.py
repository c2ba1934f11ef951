"""Teaches SmolLM2 two styles of English: an adapter for each, of a few megabytes."""

import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress
import rich.table
import tyro
from flax.training.train_state import TrainState
from rich.console import Console
from tokenizers import Tokenizer

import lora_jax
from examples import chat, data, generate, smollm2, styles
from examples.assets import MissingAsset

KERNELS = r"layer_\d+/.*_proj/kernel"
STYLES = {"devil": styles.devil, "bible": styles.bible}
SAMPLES = ("What is love?", "Tell me about computers.", "Define: lawyer", "What is a cat?")


@dataclasses.dataclass(frozen=True)
class Options:
    """Fine-tunes SmolLM2-135M-Instruct to answer in a style."""

    style: Literal["devil", "bible", "both"] = "both"
    """The Devil's Dictionary, or the King James Bible."""
    variant: Literal["lora", "dora"] = "lora"
    """The kind of the adapters."""
    quick: bool = False
    """About a minute, with three steps: shows that it works, not how well."""
    steps: int = 80
    """How many batches to train on."""
    batch: int = 8
    """Questions and answers in a batch."""
    length: int = 80
    """Tokens of both, and of the chat format. Longer ones are left out."""
    rank: int = 8
    """Rank of the adapters."""
    alpha: float = 16.0
    """Their scale is alpha / rank."""
    learning_rate: float = 1e-3
    """The highest, after a warm-up and before a cosine decay."""
    seed: int = 0
    """Of the adapters and of the order of the texts."""
    out: Path = Path("runs/styles")
    """Where the adapters go, each in a folder of its style and variant."""


def encode(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and which of them are the answer, each ``(texts, length)``; without longer ones."""
    tokens, is_answer = [], []
    for question, answer in pairs:
        start, end = chat.prompt(tokenizer, question), chat.answer(tokenizer, answer)
        if (rest := length - len(start) - len(end)) >= 0:
            tokens.append([*start, *end, *[0] * rest])
            is_answer.append([0] * len(start) + [1] * len(end) + [0] * rest)
    shape = (-1, length)
    return np.array(tokens, np.int32).reshape(shape), np.array(is_answer, bool).reshape(shape)


def loss_fn(
    adapters: Any, model: smollm2.SmolLM2, frozen: Any, tokens: jax.Array, is_answer: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sum of the cross-entropy over the tokens of the answers, and how many they are."""
    logits = lora_jax.lora_apply(model, {"params": frozen}, adapters, tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.sum(losses, where=is_answer[:, 1:]), is_answer[:, 1:].sum()


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def train_step(
    model: smollm2.SmolLM2, state: TrainState, frozen: Any, batch: Any
) -> tuple[TrainState, jax.Array]:
    """One step of an ordinary Flax training loop; the base is an argument."""

    def mean_loss(adapters: Any) -> jax.Array:
        total, count = loss_fn(adapters, model, frozen, *batch)
        return total / count

    loss, grads = jax.value_and_grad(mean_loss)(state.params)
    return state.apply_gradients(grads=grads), loss


evaluate = jax.jit(loss_fn, static_argnames="model")


def held_out(
    model: smollm2.SmolLM2, frozen: Any, adapters: Any, texts: tuple[np.ndarray, ...], size: int
) -> float:
    """The mean loss for each token of the answers."""
    pad = [(0, -len(texts[0]) % size), (0, 0)]  # of no answers, so that there is one trace
    padded = [np.pad(array, pad) for array in texts]
    parts = [evaluate(adapters, model, frozen, *batch) for batch in data.batches(padded, size)]
    total, count = np.sum(jax.device_get(parts), 0)
    return float(total / count)


def train(
    model: smollm2.SmolLM2,
    frozen: Any,
    adapters: Any,
    texts: tuple[np.ndarray, ...],
    options: Options,
    on_step: Any,
) -> tuple[Any, float]:
    """The adapters after training, and the median of the seconds of a step."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, options.learning_rate, options.steps // 10, options.steps
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    state = TrainState.create(apply_fn=model.apply, params=adapters, tx=tx)
    seconds: list[float] = []
    epoch = 0
    while state.step < options.steps:
        for batch in data.batches(texts, options.batch, seed=1000 * options.seed + epoch):
            if state.step == options.steps:
                break
            start = time.perf_counter()
            state, loss = train_step(model, state, frozen, batch)
            loss = float(loss)
            seconds.append(time.perf_counter() - start)
            on_step(int(state.step), f"loss {loss:.3f}  {seconds[-1]:.1f} s/step")
        epoch += 1
    return state.params, statistics.median(seconds[1:] or seconds)  # the first one compiles


def cached_apply(model: smollm2.SmolLM2) -> Any:
    """The adapted model for `generate.greedy`; its variables are the base and the adapters."""

    def apply(variables: Any, cache: Any, tokens: jax.Array, lengths: jax.Array) -> Any:
        frozen, adapters = variables
        collections = {"params": frozen, "cache": cache}
        return lora_jax.lora_apply(
            model, collections, adapters, tokens, lengths, cached=True, mutable="cache"
        )

    return apply


def main(options: Options) -> None:
    """Trains on each style, saves the adapters and shows what they answer."""
    console = Console()
    if options.quick:
        options = dataclasses.replace(options, steps=3, batch=2)
    names = tuple(STYLES) if options.style == "both" else (options.style,)
    read = {name: STYLES[name]() for name in names}
    config, params = smollm2.load_pretrained()
    model, tokenizer = smollm2.SmolLM2(config), chat.load_tokenizer()
    rule = lora_jax.Rule(KERNELS, rank=options.rank, alpha=options.alpha, variant=options.variant)
    start = lora_jax.lora_init(jax.random.key(options.seed), params, lora_jax.LoraConfig([rule]))
    apply = cached_apply(model)

    def answers(frozen: Any, adapters: Any) -> list[str]:
        prompts = [chat.prompt(tokenizer, question) for question in SAMPLES]
        end = tokenizer.token_to_id(chat.END)
        found = generate.greedy(
            model, apply, (frozen, adapters), prompts, end, most=8 if options.quick else 48
        )
        return [tokenizer.decode(tokens) for tokens in found]

    said = {"base": answers(*start)}
    lines = rich.table.Table(
        title=f"{options.variant}, {options.steps} steps", title_justify="left"
    )
    for name in ("style", "held-out texts", "loss before", "after", "s/step", "bytes saved"):
        lines.add_column(name, justify="left" if name == "style" else "right")
    with rich.progress.Progress(
        *rich.progress.Progress.get_default_columns(),
        rich.progress.TextColumn("{task.fields[state]}"),
        console=console,
    ) as progress:
        for name, style in read.items():
            train_set = encode(tokenizer, style.train, options.length)
            test_set = encode(tokenizer, style.test[: 8 if options.quick else None], options.length)
            bar = progress.add_task(name, total=options.steps, state="compiling")

            def on_step(step: int, state: str, bar: Any = bar) -> None:
                progress.update(bar, completed=step, state=state)

            frozen, adapters = start
            before = held_out(model, frozen, adapters, test_set, options.batch)
            copy = jax.tree.map(jnp.copy, adapters)  # a step donates its state
            adapters, seconds = train(model, frozen, copy, train_set, options, on_step)
            after = held_out(model, frozen, adapters, test_set, options.batch)
            path = options.out / f"{name}-{options.variant}"
            about = {"style": name, "loss": {"before": before, "after": after}}
            lora_jax.save(path, adapters, frozen=frozen, metadata=about)
            size = sum(file.stat().st_size for file in path.iterdir())
            lines.add_row(
                *(name, f"{len(test_set[0])}", f"{before:.3f}", f"{after:.3f}"),
                *(f"{seconds:.2f}", f"{size:,}"),
            )
            said[name] = answers(frozen, adapters)
    console.print(lines)
    for i, question in enumerate(SAMPLES):
        console.print(f"\n{question}", style="bold", highlight=False)
        for name, found in said.items():
            console.print(f"  {name}: {found[i]}", highlight=False, markup=False)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except MissingAsset as error:
        sys.exit(f"error: {error}")
