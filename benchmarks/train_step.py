r"""How long a step of training takes, for this library and for others.

Every contender is a process of its own, and only one computes at a time. They take turns, round by
round in a shuffled order, so that whatever slows the machine down slows all of them. First of all
they must agree on the losses: else nothing is measured.

    python -m benchmarks.train_step --cases minilm base decoder
    python -m benchmarks.train_step --cases minilm-in-nnx \
        --contenders floor lora lora-in-nnx dora dora-in-nnx nnx-lora
    python -m benchmarks.train_step --cases minilm --ranks 4 8 16 32 64 128 256 \
        --contenders floor full lora dora lora-plain
    python -m benchmarks.train_step --cases minilm --tokens 64 256 1024 4096 8192
    python -m benchmarks.train_step --cases minilm decoder --dtypes bfloat16
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

from benchmarks.contenders.families import check_losses
from benchmarks.models.cases import CASES, Case
from benchmarks.running import files, stats
from benchmarks.running.environment import environment
from benchmarks.running.process import Worker
from benchmarks.running.race import medians, take_turns

# Pairs whose ratio is reported besides that to the floor.
PAIRS = (
    ("full", "lora"),
    ("full", "dora"),
    ("lora-plain", "lora"),
    ("merge", "lora"),
    ("qwix", "lora"),
    ("gemma-peft", "lora"),
    ("nnx-lora", "lora"),
    ("nnx-lora", "lora-in-nnx"),
    ("lora-in-nnx", "lora"),
    ("dora-in-nnx", "dora"),
    ("peft-lora", "lora"),
    ("dora", "lora"),
    ("peft-dora", "dora"),
    ("peft-dora", "dora-detached"),
    ("torch-full", "full"),
)
# Those of a CPU: what only differs on GPUs, or cannot be in float32, is left out. A model in NNX is
# a case of its own.
CONTENDERS = (
    *("floor", "full", "torch-full", "lora", "lora-plain", "merge", "qwix", "gemma-peft"),
    *("nnx-lora", "peft-lora", "dora", "dora-detached", "peft-dora"),
)
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-2}
LOGS = Path("runs/benchmarks")
JOBS = ("step", "forward", "merge")


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures steps of training."""

    cases: tuple[str, ...] = ("minilm",)
    """Cases of benchmarks/models/cases.py."""
    contenders: tuple[str, ...] = CONTENDERS
    """Who takes part; the floor always does."""
    rounds: int = 15
    """Rounds."""
    steps: int = 3
    """Steps in a round; their median counts."""
    jobs: tuple[str, ...] = JOBS
    """What is measured: step, forward, merge."""
    ranks: tuple[int, ...] = ()
    """Measure each case with each of these ranks instead."""
    tokens: tuple[int, ...] = ()
    """Measure each case with each of these numbers of tokens in a batch instead."""
    dtypes: tuple[str, ...] = ()
    """Measure each case in each of these dtypes instead."""
    layers: tuple[int, ...] = ()
    """Measure each case with each of these numbers of layers instead."""
    together: int | None = None
    """Contenders in memory at a time, the floor among them; by default what the case says."""
    seed: int = 0
    """Of the order."""
    out: Path = Path("benchmarks/results/train_step.json")
    """Where results go; other cases that are there already stay."""


def with_tokens(case: Case, tokens: int) -> Case:
    """The case with a batch of so many tokens: fewer sequences, and then shorter ones."""
    length = min(case.length, tokens)
    return dataclasses.replace(
        case, name=f"{case.name} tokens={tokens}", batch=max(tokens // length, 1), length=length
    )


def expand(options: Options) -> Iterator[Case]:
    """The cases, each with what is swept."""
    for name in options.cases:
        cases = [CASES[name]]
        for field, values in (
            ("rank", options.ranks),
            ("dtype", options.dtypes),
            ("layers", options.layers),
        ):
            if values:
                cases = [
                    dataclasses.replace(case, name=f"{case.name} {field}={value}", **{field: value})
                    for case in cases
                    for value in values
                ]
        if options.tokens:
            cases = [with_tokens(case, tokens) for case in cases for tokens in options.tokens]
        yield from cases


def check(losses: dict[str, list[float]], case: Case) -> None:
    """Raises RuntimeError if losses differ: all of them in 32 bits, the first ones in 16."""
    check_losses(losses, TOLERANCES[case.dtype], exact=case.dtype == "float32")


def run_group(case: Case, names: list[str], options: Options) -> dict[str, Any]:
    """Measures contenders that are in memory together; the first one is the floor."""
    workers, results = {}, {}
    try:
        for name in names:
            print(f"  {name}: ", end="", flush=True)
            log = LOGS / f"{case.name}-{name}.log".replace(" ", "-")
            worker = Worker(name, case, log, {"JAX_PLATFORMS": "cpu"})
            worker.compile()
            if "error" in worker.ready:
                results[name] = {"error": worker.ready["error"]}
                worker.stop()
                print(worker.ready["error"], flush=True)
                continue
            workers[name] = worker
            built = worker.ready["facts"]["build_seconds"] + worker.ready["facts"]["first_seconds"]
            print(f"loss {worker.ready['losses'][0]:.6f}, ready in {built:.1f} s", flush=True)
        check({n: w.ready["losses"] for n, w in workers.items()}, case)
        turns, errors = take_turns(
            workers, lambda name: list(options.jobs), options.rounds, options.steps, options.seed
        )
        if errors:
            raise RuntimeError("; ".join(f"{name}, {error}" for name, error in errors.items()))
        seconds = {
            name: {job: medians(rounds) for job, rounds in jobs.items()}
            for name, jobs in turns.items()
        }
        for name, worker in workers.items():
            jobs = {
                job: {**stats.quartiles(values), "seconds": values}
                for job, values in seconds[name].items()
            }
            last = worker.ask("facts")
            results[name] = {
                **jobs,
                "losses": worker.ready["losses"],
                "memory": {key: last[key] for key in ("peak_rss", "run_rss") if key in last},
                "facts": last["facts"],
            }
    finally:
        for worker in workers.values():
            worker.stop()
    for name in workers:
        for job in seconds[name]:
            if job in seconds.get("floor", {}):
                results[name][job]["to_floor"] = stats.ratio(
                    seconds[name][job], seconds["floor"][job]
                )
    return results


def run(case: Case, options: Options) -> dict[str, Any]:
    """Measures a case."""
    together = options.together or case.together
    others = [name for name in options.contenders if name != "floor"]
    size = max(together - 1, 1)
    results: dict[str, Any] = {}
    before = environment()
    for i in range(0, max(len(others), 1), size):
        group = run_group(case, ["floor", *others[i : i + size]], options)
        # One floor stands for all in the results, but each group is compared to its own.
        results = {**group, **results}
    # One more check, over groups.
    check({n: r["losses"] for n, r in results.items() if "losses" in r}, case)
    pairs = {}
    for over, under in PAIRS:
        a, b = (results.get(name, {}).get("step") for name in (over, under))
        if a and b and together >= len(results):
            pairs[f"{over}/{under}"] = stats.ratio(a["seconds"], b["seconds"])
        elif a and b:  # not in the same rounds: compared by way of the floor
            ratio = a["to_floor"]["median"] / b["to_floor"]["median"]
            pairs[f"{over}/{under}"] = {"median": ratio}
    return {
        "case": dataclasses.asdict(case),
        "environment": before,
        "load_after": os.getloadavg(),
        "rounds": options.rounds,
        "steps": options.steps,
        "together": together,
        "contenders": {name: results[name] for name in ["floor", *others]},
        "pairs": pairs,
    }


def table(result: dict[str, Any]) -> str:
    """Times of steps and their ratios, for the terminal."""
    lines = []
    for name, one in result["contenders"].items():
        if "error" in one:
            lines.append(f"  {name:14} {one['error']}")
            continue
        cells = [f"  {name:14}"]
        for job in JOBS:
            if job in one:
                cells.append(f"{job} {1e3 * one[job]['median']:9.2f} ms")
                if job == "step" and "to_floor" in one[job]:
                    low, middle, high = (one[job]["to_floor"][k] for k in ("low", "median", "high"))
                    cells.append(f"= {middle:5.3f} floors ({low:5.3f} to {high:5.3f})")
        lines.append("  ".join(cells))
    lines += [f"  {name} = {pair['median']:.3f}" for name, pair in result["pairs"].items()]
    return "\n".join(lines)


def main(options: Options) -> None:
    """Measures all cases, and writes each as soon as it is done."""
    for case in expand(options):
        print(f"{case.name}: {case}", flush=True)
        result = run(case, options)
        print(table(result), flush=True)
        results = files.read(options.out)
        results[case.name] = result
        files.write(options.out, results)


if __name__ == "__main__":
    main(tyro.cli(Options))
