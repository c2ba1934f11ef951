"""Fails when an adapted step costs more than it did: what is counted is free of noise.

Arithmetic, bytes that are accessed and temporary memory of compiled steps, each relative to the
floor (the same model, frozen, with a gradient that only flows through it), and how often a step is
traced when adapters are switched. Relative, so that most of what a new XLA changes cancels.

    python -m benchmarks.guard            # compares with benchmarks/results/guard.json
    python -m benchmarks.guard --record   # after a change that is meant
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import tyro

from benchmarks.contenders.problems import PROBLEMS
from benchmarks.contenders.training import make_step
from benchmarks.models import data
from benchmarks.models.cases import CASES, Case
from benchmarks.running import files

GUARDED = (
    dataclasses.replace(CASES["minilm"], name="encoder", layers=2),
    dataclasses.replace(CASES["minilm"], name="encoder, few tokens", layers=2, batch=1, length=64),
    dataclasses.replace(CASES["decoder"], name="decoder, bfloat16", layers=2, dtype="bfloat16"),
)
COUNTS = ("flops", "bytes_accessed", "temp_bytes")
SLACK = 1.02


@dataclasses.dataclass(frozen=True)
class Options:
    """Guards what steps cost."""

    record: bool = False
    """Keep what is counted now."""
    out: Path = Path("benchmarks/results/guard.json")
    """What was counted before."""


def counted(case: Case) -> dict[str, dict[str, float]]:
    """Costs of a step of LoRA and of DoRA, in those of the floor."""
    steps = [make_step(PROBLEMS[name](case), case) for name in ("floor", "lora", "dora")]
    for step in steps:
        step.compile()
    floor, *ours = (step.facts for step in steps)
    return {
        name: {key: facts[key] / floor[key] for key in COUNTS}
        for name, facts in zip(("lora", "dora"), ours, strict=True)
    }


def traces() -> int:
    """How often a step is traced for two adapters of one base and one batch after another."""
    case = CASES["tiny"]
    problem = PROBLEMS["dora"](case)
    step = jax.jit(jax.value_and_grad(problem.loss))
    batch = tuple(map(jnp.asarray, data.batch(case)))
    for factor in (1, 2):
        step(jax.tree.map(lambda leaf: factor * leaf, problem.trained), problem.frozen, batch)  # noqa: B023
    return step._cache_size()


def grown(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What costs more than before."""
    found = []
    for case, variants in now["costs"].items():
        for variant, costs in variants.items():
            for key, cost in costs.items():
                old = before["costs"].get(case, {}).get(variant, {}).get(key)
                if old is None:
                    found.append(f"{case}, {variant}: {key} was never recorded")
                elif cost > SLACK * old:
                    found.append(f"{case}, {variant}: {key} {old:.4f} -> {cost:.4f} floors")
    if now["traces"] > 1:
        found.append(f"a step was traced {now['traces']} times, not once")
    return found


def main(options: Options) -> int:
    """Counts and compares; the exit status."""
    now = {"costs": {case.name: counted(case) for case in GUARDED}, "traces": traces()}
    for case, variants in now["costs"].items():
        for variant, one in variants.items():
            cells = "  ".join(f"{key} {one[key]:.3f}" for key in COUNTS)
            print(f"{case:22} {variant}  {cells}  (in floors)")
    if options.record:
        files.write(options.out, {"jax": jax.__version__, **now})
        return 0
    before = files.read(options.out)
    found = grown(before, now)
    for line in found:
        print(f"GREW  {line}")
    if found:
        print(
            f"If that is meant, or jax is the reason (recorded with {before.get('jax')}, this is "
            f"{jax.__version__}): python -m benchmarks.guard --record"
        )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
