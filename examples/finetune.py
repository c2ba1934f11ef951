"""Fine-tunes a pretrained sentence encoder: its head alone, with LoRA, with DoRA, and in full.

The four ways have the same seed, batches and training loop, and differ in their `LoraConfig`.
"""

import dataclasses
import functools
import itertools
import json
import math
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import jax
import matplotlib
import numpy as np
import optax
import rich.progress
import rich.table
import tyro
from flax.training.train_state import TrainState
from rich.console import Console

import lora_jax
from examples import classifier, classify, data, minilm
from examples.assets import MissingAsset
from examples.checkpoint import CannotResume, Checkpoints, Log

HEAD = r"classifier/.*"
CURVE_TEXTS = 256  # the accuracy on the way is on the first of the test texts only
FREE = {"seeds", "out", "save_every", "resume"}  # options that a training does not depend on


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to fine-tune: what is trained, how fast, and how the results call it."""

    title: str
    config: lora_jax.LoraConfig
    learning_rate: float
    color: str


def methods(rank: int, alpha: float) -> dict[str, Method]:
    """The four ways. Learning rates are the best of `benchmarks/learning_rates.py`.

    The colors are those of Okabe and Ito, which colour-blind readers can tell apart.
    """
    factors = functools.partial(lora_jax.Rule, classifier.KERNELS, rank=rank, alpha=alpha)
    adapted = functools.partial(lora_jax.LoraConfig, trainable=[HEAD])
    return {
        "head": Method("head alone", adapted(), 3e-2, "#777777"),
        "lora": Method("LoRA", adapted([factors(variant="lora")]), 2e-3, "#0072b2"),
        "dora": Method("DoRA", adapted([factors(variant="dora")]), 2e-3, "#e69f00"),
        "full": Method("full", lora_jax.LoraConfig(trainable=[".*"]), 2e-4, "#009e73"),
    }


@dataclasses.dataclass(frozen=True)
class Options:
    """Fine-tunes all-MiniLM-L6-v2 with LoRA, DoRA, in full, and its head alone."""

    task: Literal["reviews", "r8"] = "reviews"
    """Movie reviews, positive or negative; or the topic of Reuters news."""
    api: classifier.Api = "linen"
    """Flax's API that the model is written in."""
    base: classifier.Base = "float32"
    """What the frozen kernels of the encoder are kept in. To train it in full they are floats."""
    seeds: int = 1
    """How many times to repeat all of it."""
    quick: bool = False
    """Under a minute, with fewer sentences: shows that it works, not how well."""
    train: int = 3000
    """How many texts to train on."""
    epochs: int = 1
    """How often to see each of them."""
    length: int = 32
    """Tokens of a text that are read."""
    batch: int = 32
    """Texts in a batch."""
    rank: int = 8
    """Rank of the adapters."""
    alpha: float = 16.0
    """Their scale is alpha / rank."""
    out: Path = Path("runs/demo")
    """Where the adapters, the figure and the results go, and the checkpoints."""
    save_every: int = 0
    """Steps from one checkpoint to the next; 0 is none, or 25 with --resume."""
    resume: bool = False
    """Go on from the checkpoints that are there, after a kill, and write more."""


@dataclasses.dataclass
class Run:
    """What came out of one training."""

    log: Log
    correct: np.ndarray
    summary: lora_jax.Summary
    frozen: Any
    adapters: Any
    step_bytes: int | None = None

    @property
    def accuracy(self) -> float:
        """Share of the test texts, in per cent."""
        return 100.0 * float(self.correct.mean())

    @property
    def seconds_per_step(self) -> float:
        """The median."""
        return statistics.median(self.log.seconds or [math.nan])


def loss_fn(
    adapters: Any, model: classifier.Model, frozen: Any, batch: Any, rng: jax.Array
) -> jax.Array:
    """Cross-entropy of the adapted model, as a function of the adapters first."""
    tokens, mask, labels = batch
    logits = classifier.logits(model, frozen, adapters, tokens, mask, rng)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def train_step(
    model: classifier.Model, state: TrainState, frozen: Any, batch: Any, rng: jax.Array
) -> tuple[TrainState, jax.Array]:
    """One step of an ordinary Flax training loop; the base is an argument."""
    loss, grads = jax.value_and_grad(loss_fn)(state.params, model, frozen, batch, rng)
    return state.apply_gradients(grads=grads), loss


predict = jax.jit(classifier.logits, static_argnames="model")
predict_plain = jax.jit(classifier.plain_logits, static_argnames="model")


def logits_of(predict: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits of all texts, in batches of one size so that there is one trace."""
    count, size = len(tokens), 128
    pad = [(0, -count % size), (0, 0)]
    padded = [np.pad(array, pad) for array in (tokens, mask)]
    return np.concatenate([predict(*batch) for batch in data.batches(padded, size)])[:count]


@functools.cache  # the same one for each seed, so that a step is compiled once
def optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW, with a warm-up and a cosine decay of the learning rate."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))


def train(
    model: classifier.Model,
    params: Any,
    method: Method,
    train_set: tuple[np.ndarray, ...],
    test_set: tuple[np.ndarray, ...],
    options: Options,
    seed: int,
    on_step: Any,
    checkpoints: Checkpoints | None = None,
) -> Run:
    """Trains and tests in one way, from the newest checkpoint on where there is one."""
    key = jax.random.key(seed)
    frozen, adapters = lora_jax.lora_init(key, params, method.config)
    steps = options.epochs * (len(train_set[0]) // options.batch)
    tx = optimizer(method.learning_rate, steps)
    state, log = TrainState.create(apply_fn=classifier.logits, params=adapters, tx=tx), Log()
    if checkpoints:
        state, key, log = checkpoints.restore(state, key)

    *test_inputs, test_labels = test_set
    few, points = slice(0, CURVE_TEXTS), 2 if options.quick else 4

    def accuracy_on_few() -> float:
        now = functools.partial(predict, model, frozen, state.params)
        guesses = logits_of(now, *(array[few] for array in test_inputs)).argmax(-1)
        return 100.0 * float((guesses == test_labels[few]).mean())

    first = int(state.step)
    if first:
        on_step(first, f"from step {first}")
    else:
        log.curve.append([0, accuracy_on_few()])
    epochs = (
        data.batches(train_set, options.batch, seed=1000 * seed + epoch)
        for epoch in range(options.epochs)
    )
    batches = itertools.islice(itertools.chain.from_iterable(epochs), first, None)
    for step, batch in enumerate(batches, first + 1):
        start = time.perf_counter()
        step_key = jax.random.fold_in(key, step - 1)
        state, loss = train_step(model, state, frozen, batch, step_key)
        log.losses.append(float(loss))
        seconds = time.perf_counter() - start
        if step > first + 1:  # the first one compiles
            log.seconds.append(seconds)
        if step % max(steps // points, 1) == 0:
            log.curve.append([step, accuracy_on_few()])
        if checkpoints:
            checkpoints.save(step, state, key, log)
        on_step(step, f"loss {log.losses[-1]:.3f}  {1 / seconds:.1f} steps/s")

    now = functools.partial(predict, model, frozen, state.params)
    return Run(
        log=log,
        correct=logits_of(now, *test_inputs).argmax(-1) == test_labels,
        summary=lora_jax.summary(frozen, state.params),
        frozen=frozen,
        adapters=state.params,
    )


def step_bytes(
    model: classifier.Model, way: Method, run: Run, batch: tuple[np.ndarray, ...], steps: int
) -> int | None:
    """Memory of a training step, by the compiler: what goes in, what comes out, and between.

    None where the backend does not say it.
    """
    tx = optimizer(way.learning_rate, steps)
    state = TrainState.create(apply_fn=classifier.logits, params=run.adapters, tx=tx)
    lowered = train_step.lower(model, state, run.frozen, batch, jax.random.key(0))
    sizes = lowered.compile().memory_analysis()
    if sizes is None:
        return None
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    return held - sizes.alias_size_in_bytes  # the state that goes in is overwritten


def check(path: Path, model: classifier.Model, params: Any, run: Run, test_set: Any) -> str:
    """Loads the adapters that were saved, and merges them; says whether all three agree.

    Raises:
      RuntimeError: they do not agree.
    """
    frozen, loaded = lora_jax.load(path, params, verify=True)
    *inputs, labels = test_set
    logits = logits_of(functools.partial(predict, model, frozen, loaded), *inputs)
    if not np.array_equal(logits.argmax(-1) == labels, run.correct):
        raise RuntimeError(f"{path}, loaded again, does not give the same predictions.")
    merged = lora_jax.lora_merge(frozen, loaded)
    plain = logits_of(functools.partial(predict_plain, model, merged), *inputs)
    other = int((plain.argmax(-1) != logits.argmax(-1)).sum())
    difference = np.abs(plain - logits).max() / np.abs(logits).max()
    if difference > 1e-4:
        raise RuntimeError(f"{path}: the merged model's logits differ by {difference:.1e}.")
    return (
        f"{path}: {nbytes(path) / 2**20:.2f} MiB. Loaded again: the same accuracy "
        f"({100 * run.correct.mean():.1f} %). Merged into a plain model: {other} of "
        f"{len(labels)} predictions differ, logits by at most {difference:.0e} of the largest."
    )


def nbytes(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir())


def seconds_per_step(several: list[Run]) -> float:
    """The median over the seeds."""
    return statistics.median(run.seconds_per_step for run in several)


def mean_and_error(values: list[float]) -> str:
    """The mean, and the standard error where there are several seeds."""
    mean = f"{statistics.mean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.1f}"


def table(
    runs: dict[str, list[Run]], ways: dict[str, Method], task: data.Task, out: Path
) -> rich.table.Table:
    """The results, a line for each way; its adapters are saved in a folder of its name."""
    seeds = len(next(iter(runs.values())))
    title = f"{task.name}: {len(task.test_texts):,} test texts, {seeds} seed{'s'[: seeds > 1]}"
    # Narrow enough for 80 columns.
    lines = rich.table.Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    names = ("accuracy %", "trained", "% of\nmodel", "ms/step", "bytes\nsaved", "memory,\nMB")
    lines.add_column("")
    for name in names:
        lines.add_column(name, justify="right")
    for name, several in runs.items():
        counts = several[0].summary
        lines.add_row(
            ways[name].title,
            mean_and_error([run.accuracy for run in several]),
            f"{counts.trained:,}",
            f"{counts.percent:.3g}",
            f"{1000 * seconds_per_step(several):.0f}",
            f"{nbytes(out / name):,}",
            "not said" if (held := several[0].step_bytes) is None else f"{held / 1e6:,.0f}",
        )
    lines.caption = "memory: of a step's arguments, results and all between, by the compiler"
    lines.caption_justify = "left"
    return lines


def differences(runs: dict[str, list[Run]], ways: dict[str, Method]) -> list[str]:
    """Pairs of ways: the difference, its standard error over texts and seeds, is it noise?"""
    lines = []
    for a, b in [("lora", "head"), ("dora", "lora"), ("full", "lora"), ("full", "dora")]:
        paired = 100.0 * np.array(
            [x.correct.astype(float) - y.correct for x, y in zip(runs[a], runs[b], strict=True)]
        )
        seeds, texts = paired.shape
        mean, variance = paired.mean(), paired.mean(0).var() / texts
        if seeds > 1:
            variance += paired.mean(1).var(ddof=1) / seeds
        error = variance**0.5
        verdict = "within noise" if abs(mean) <= 2 * error else "beyond noise"
        lines.append(
            f"{ways[a].title} - {ways[b].title}: {mean:+.1f} ± {error:.1f} points, {verdict}"
        )
    return lines


def figure(
    path: Path, runs: dict[str, list[Run]], ways: dict[str, Method], task: data.Task
) -> None:
    """Loss and accuracy over the steps, the mean over the seeds; and what each way costs.

    The adapters are in folders beside the file.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(9, 5.2), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.7, 1])
    left, right = upper.subplots(1, 2)
    for name, several in runs.items():
        way = ways[name]
        losses = np.mean([run.log.losses for run in several], 0)
        window = max(len(losses) // 12, 1)
        smooth = np.convolve(losses, np.ones(window) / window, "valid")
        steps = np.arange(len(smooth)) + (window + 1) / 2
        line: dict[str, Any] = {"color": way.color, "label": way.title}
        if name == "lora":  # broad, with DoRA in dashes upon it: they may be the same
            line |= {"linewidth": 4, "alpha": 0.5}
        elif name == "dora":
            line |= {"linestyle": (0, (3, 2))}
        left.plot(steps, smooth, **line)
        steps = [step for step, _ in several[0].log.curve]
        accuracy = np.mean([[value for _, value in run.log.curve] for run in several], 0)
        right.plot(steps, accuracy, marker="o", markersize=3, **line)
    few = min(CURVE_TEXTS, len(task.test_texts))
    left.set(xlabel="step", title=f"{task.name}: training loss, mean of {window} steps")
    right.set(xlabel="step", title=f"accuracy on {few} test texts meanwhile, %")
    right.legend(frameon=False)

    costs = {
        "trained parameters,\nmillions": [
            several[0].summary.trained / 1e6 for several in runs.values()
        ],
        "file saved,\nMB": [nbytes(path.parent / name) / 1e6 for name in runs],
        "memory of a training step,\nby the compiler, MB": [
            (several[0].step_bytes or math.nan) / 1e6 for several in runs.values()
        ],
        "time per step,\nms": [1e3 * seconds_per_step(several) for several in runs.values()],
    }
    costs = {title: values for title, values in costs.items() if np.isfinite(values).all()}
    panels = lower.subplots(1, len(costs), sharey=True)
    for axes, (title, values) in zip(panels, costs.items(), strict=True):
        colors = [ways[name].color for name in runs]
        bars = axes.barh([ways[name].title for name in runs], values, color=colors)
        labels = [f"{value:.3g}" if value < 100 else f"{value:,.0f}" for value in values]
        axes.bar_label(bars, labels, padding=3)
        axes.set_title(title, fontsize="medium", loc="left")
        axes.set(xticks=[], xlim=(0, 1.35 * max(values)))
        axes.tick_params(left=False)
        axes.spines["bottom"].set_visible(False)
    panels[0].invert_yaxis()  # of all
    for axes in (left, right, *panels):
        axes.spines[["top", "right"]].set_visible(False)
    plt.savefig(path, dpi=150)
    plt.close()


def main(options: Options) -> None:
    """Trains in all four ways and reports.

    Raises:
      CannotResume: there are checkpoints, but not of this training.
    """
    console = Console()
    folder = options.out / "checkpoints"
    every = options.save_every or (25 if options.resume else 0)
    if every and not options.resume and folder.exists():
        raise CannotResume(
            f"{folder} has checkpoints already. Go on from them with --resume, remove them, or use "
            f"another --out."
        )
    task = data.movie_reviews() if options.task == "reviews" else data.reuters_r8()
    config, encoder = minilm.load_pretrained()
    if options.quick:
        options = dataclasses.replace(options, train=min(options.train, 192))
        test_count = 128
    else:
        test_count = len(task.test_texts)
    count = min(options.train, len(task.train_texts))
    train_set = (
        *minilm.tokenize(task.train_texts[:count], options.length),
        task.train_labels[:count],
    )
    task = dataclasses.replace(
        task,
        test_texts=task.test_texts[:test_count],
        test_labels=task.test_labels[:test_count],
    )
    test_set = (*minilm.tokenize(task.test_texts, options.length), task.test_labels)
    make = functools.partial(classifier.make, options.api, config, len(task.classes), encoder)
    ways = methods(options.rank, options.alpha)
    console.print(
        f"all-MiniLM-L6-v2 in {'NNX' if options.api == 'nnx' else 'Linen'}, its kernels in "
        f"{options.base}, on {task.name}: "
        f"{count:,} training texts, {options.epochs} epoch(s), "
        f"batches of {options.batch} x {options.length} tokens.",
        soft_wrap=True,
    )

    fixed = {name: value for name, value in vars(options).items() if name not in FREE}
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    steps = options.epochs * (count // options.batch)
    with rich.progress.Progress(
        *rich.progress.Progress.get_default_columns(),
        rich.progress.TextColumn("{task.fields[state]}"),
        console=console,
    ) as progress:
        for seed in range(options.seeds):
            model, params = make(seed)
            quantized = classifier.with_base(params, options.base)
            for name, way in ways.items():
                title = way.title + (f", seed {seed}" if options.seeds > 1 else "")
                bar = progress.add_task(title.ljust(18), total=steps, state="compiling")

                def on_step(step: int, state: str, bar: Any = bar) -> None:
                    progress.update(bar, completed=step, state=state)

                path = folder / f"{name}-{seed}"
                maybe = Checkpoints(path, every, steps, fixed) if every else nullcontext()
                with maybe as checkpoints:
                    run = train(
                        model,
                        params if name == "full" else quantized,
                        *(way, train_set, test_set, options, seed, on_step),
                        checkpoints,
                    )
                runs[name].append(run)

    first = tuple(array[: options.batch] for array in train_set)
    for name, several in runs.items():
        said = step_bytes(model, ways[name], several[0], first, steps)
        for run in several:
            run.step_bytes = said
    for name, (*_, run) in runs.items():
        facts = fixed | {
            "way": name,
            "accuracy": round(run.accuracy, 1),
            "classes": list(task.classes),
            "seed": options.seeds - 1,
        }
        lora_jax.save(options.out / name, run.adapters, frozen=run.frozen, metadata=facts)
    console.print(table(runs, ways, task, options.out))
    console.print("\n".join(differences(runs, ways)), highlight=False)
    for name in ("lora", "dora"):
        report = check(options.out / name, model, quantized, runs[name][-1], test_set)
        console.print(report, highlight=False, soft_wrap=True)
    figure(options.out / "curves.png", runs, ways, task)
    results = {
        name: [
            {
                "accuracy": run.accuracy,
                "losses": run.log.losses,
                "curve": run.log.curve,
                "step_bytes": run.step_bytes,
            }
            for run in several
        ]
        for name, several in runs.items()
    }
    (options.out / "results.json").write_text(json.dumps(results))
    console.print(f"Curves: {options.out / 'curves.png'}", highlight=False)
    if options.task == "reviews":
        split = {name: (runs[name][-1].frozen, runs[name][-1].adapters) for name in classify.TITLES}
        lines = classify.answers(classify.SENTENCES, model, task.classes, split, options.length)
        console.print(lines)
    console.print(
        f"Now your own sentence: make classify TEXT='...' (or python -m examples.classify --runs "
        f"{options.out} '...'). What was saved: lora-jax inspect {options.out / 'dora'}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except (MissingAsset, CannotResume) as error:
        sys.exit(f"error: {error}")
