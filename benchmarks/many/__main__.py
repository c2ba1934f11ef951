"""The command; see `benchmarks.many`."""

import dataclasses
from pathlib import Path
from typing import Any

import tyro

from benchmarks.many.jobs import ROWS, Jobs, memory, mixed, products, switches, training
from benchmarks.many.process import PeftProcess
from benchmarks.models.cases import CASES, Case
from benchmarks.running import files, stats
from benchmarks.running.environment import environment
from benchmarks.running.race import alternate


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures what many adapters of one base cost."""

    case: str = "minilm"
    """The model, of `benchmarks.models.cases`."""
    lengths: tuple[int, ...] = (128, 8)
    """Tokens of each of the 32 rows of a mixed batch."""
    counts: tuple[int, ...] = (1, 4, 32)
    """Numbers of adapters in it."""
    train_tokens: tuple[int, ...] = (32, 128, 1024)
    """Tokens of each of 8 adapters that are trained in one step."""
    rounds: int = 15
    """Rounds of all measurements."""
    seed: int = 0
    """Of the order."""
    torch: bool = True
    """Measure PEFT as well."""
    out: Path = Path("benchmarks/results/many.json")
    """Where results go."""


def entry(what: str, bases: dict[str, str], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Results of one kind; ``bases`` says with what a name is compared, by how it begins."""
    times = {}
    for name, values in seconds.items():
        base = next(base for start, base in bases.items() if name.startswith(start))
        ratio = stats.ratio(values, seconds[base])
        times[name] = {**stats.quartiles(values), "base": base, "to_base": ratio}
        print(f"  {name:24} {1e3 * times[name]['median']:9.2f} ms, {ratio['median']:.3f} {base}")
    return {"what": what, "times": times, "environment": environment()}


def main(options: Options) -> None:
    """Measures all, and writes each as soon as it is done."""
    case = dataclasses.replace(CASES[options.case], batch=ROWS)
    results = files.read(options.out)

    def done(
        name: str, case: Case, what: str, bases: dict[str, str], jobs: Jobs, **facts: Any
    ) -> None:
        print(name)
        seconds = alternate(jobs, options.rounds, options.seed)
        results[name] = entry(what, bases, seconds) | {"case": dataclasses.asdict(case)} | facts
        files.write(options.out, results)

    for length in options.lengths:
        here = dataclasses.replace(case, length=length)
        peft = PeftProcess(here, options.counts) if options.torch else None
        done(
            f"mixed, {length} tokens",
            here,
            f"A forward pass of {ROWS} rows of {length} tokens over so many adapters.",
            {"PEFT": "PyTorch, base", "PyTorch": "PyTorch, base", "": "base"},
            mixed(here, options.counts) | (peft.jobs("P") if peft else {}),
        )
        if peft:
            peft.quit()
    for length in (1, *options.lengths):
        here = dataclasses.replace(case, length=length)
        done(
            f"ways, {length} tokens",
            here,
            f"What the adapters of one kernel {case.width} x {case.ff} of rank {case.rank} add, "
            f"for {ROWS} rows of {length} tokens.",
            {"": "x W"},
            {name: job for n in options.counts for name, job in products(here, n).items()},
        )
    here = dataclasses.replace(case, batch=1, length=16)
    peft = PeftProcess(here, options.counts) if options.torch else None
    done(
        "switch",
        here,
        "Another adapter, and a forward pass of 1 row of 16 tokens with it.",
        {"switch": "switch, PyTorch, none", "": "no switch"},
        switches(here) | (peft.jobs("switch") if peft else {}),
        memory=memory(here),
    )
    if peft:
        peft.quit()
    for tokens in options.train_tokens:
        here = dataclasses.replace(case, batch=max(tokens // 128, 1), length=min(tokens, 128))
        done(
            f"training, {tokens} tokens",
            here,
            f"A step of AdamW of 8 adapters, each with {tokens} tokens of its own.",
            {"": "8 steps"},
            training(here),
        )


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.many"))
