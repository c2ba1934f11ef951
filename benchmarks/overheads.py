"""What is paid once: the time to trace, to compile and to import.

    python -m benchmarks.overheads

A decoder of many layers that are not scanned is traced and compiled, for a plain model and for
adapted ones in turn. Every time the function is a new one, so that nothing is found in a cache.
"""

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from benchmarks.contenders.problems import PROBLEMS
from benchmarks.contenders.training import Loss, Problem
from benchmarks.models import data
from benchmarks.models.cases import Case
from benchmarks.running import files, stats
from benchmarks.running.environment import environment
from benchmarks.running.race import alternate

DEEP = Case("deep", "decoder", 64, 128, 4, 32, 1, 16, 4, vocab=128)
IMPORTS = {
    "without lora_jax": "import flax.linen, optax, chex",
    "with lora_jax": "import flax.linen, optax, chex, lora_jax",
}
NAMES = ("floor", "full", "lora-plain", "lora", "dora", "dora-detached")


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures what is paid once."""

    layers: int = DEEP.layers
    """Layers of the decoder."""
    rounds: int = 15
    """Rounds of traces, and of imports."""
    compilations: int = 5
    """Rounds of compilations."""
    seed: int = 0
    """Of the order."""
    out: Path = Path("benchmarks/results/overheads.json")
    """Where results go."""


def gradient(loss: Loss) -> Callable[..., Any]:
    """A function that no cache has seen."""
    return lambda trained, frozen, batch: jax.value_and_grad(loss)(trained, frozen, batch)


def abstract(tree: Any) -> Any:
    """Shapes and dtypes in place of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def tracer(problem: Problem, arguments: Any) -> Callable[[], float]:
    """Times a trace."""

    def trace() -> float:
        jax.clear_caches()  # what the library has in jits of its own is also new
        function = jax.jit(gradient(problem.loss))
        begin = time.perf_counter()
        function.trace(*arguments)
        return time.perf_counter() - begin

    return trace


def compiler(problem: Problem, arguments: Any) -> Callable[[], float]:
    """Times a compilation, without the trace."""

    def compile_() -> float:
        lowered = jax.jit(gradient(problem.loss)).lower(*arguments)
        begin = time.perf_counter()
        lowered.compile()
        return time.perf_counter() - begin

    return compile_


def importer(statement: str) -> Callable[[], float]:
    """Times a process that imports."""

    def import_() -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        return time.perf_counter() - begin

    return import_


def entry(what: str, base: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Results of one kind."""
    times = {}
    for name, values in seconds.items():
        times[name] = {**stats.quartiles(values), "seconds": values}
        times[name]["to_base"] = stats.ratio(values, seconds[base])
        middle, ratio = times[name]["median"], times[name]["to_base"]["median"]
        print(f"  {name:16} {1e3 * middle:8.1f} ms, {ratio:.3f}", flush=True)
    return {"what": what, "base": base, "times": times, "environment": environment()}


def main(options: Options) -> None:
    """Measures all, and writes each as soon as it is done."""
    case = dataclasses.replace(DEEP, layers=options.layers)
    batch = abstract(tuple(map(jnp.asarray, data.batch(case))))
    results = files.read(options.out)

    def done(name: str, *args: Any) -> None:
        print(name)
        results[name] = entry(*args)
        files.write(options.out, results)

    for remat in (False, True):
        here = dataclasses.replace(case, remat=remat)
        problems = {name: PROBLEMS[name](here) for name in NAMES}
        arguments = {
            name: (abstract(problem.trained), abstract(problem.frozen), batch)
            for name, problem in problems.items()
        }
        with_remat = " with `nn.remat`" if remat else ""
        model = f"a decoder of {case.layers} layers that are not scanned{with_remat}"
        for kind, make, rounds, what in (
            (
                "Tracing",
                tracer,
                options.rounds,
                f"`jax.jit(...).trace` of the gradient of {model}.",
            ),
            ("Compiling", compiler, options.compilations, f"`.compile()` of the same, {model}."),
        ):
            jobs = {name: make(problem, arguments[name]) for name, problem in problems.items()}
            done(f"{kind}{with_remat}", what, "full", alternate(jobs, rounds, options.seed))

    jobs = {name: importer(statement) for name, statement in IMPORTS.items()}
    what = f"A process that runs `{IMPORTS['with lora_jax']}`, and one without the last."
    done("Importing", what, "without lora_jax", alternate(jobs, options.rounds, options.seed))


if __name__ == "__main__":
    main(tyro.cli(Options))
