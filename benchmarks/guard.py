"""Fails when an adapted step costs more than it did: what is counted is free of noise.

Arithmetic, bytes that are accessed and temporary memory of compiled steps, each relative to the
floor (the same model, frozen, with a gradient that only flows through it), and how often a step is
traced when adapters are switched. Relative, so that most of what a new XLA changes cancels.

Where the compilers of a GPU or of TPUs are installed (`make guard-accelerators` does it), also what
they count: copies of kernels of the base, memory, and what 16 chips send each other.

    python -m benchmarks.guard            # compares with benchmarks/results/guard.json
    python -m benchmarks.guard --record   # after a change that is meant
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import tyro

from benchmarks.contenders.problems import PROBLEMS
from benchmarks.contenders.training import make_step
from benchmarks.models import data
from benchmarks.models.cases import CASES, Case
from benchmarks.running import compilers, files
from benchmarks.running.accelerators import LAYER, LAYERS, on_a_mesh, on_one_device

GUARDED = (
    dataclasses.replace(CASES["minilm"], name="encoder", layers=2),
    dataclasses.replace(CASES["minilm"], name="encoder, few tokens", layers=2, batch=1, length=64),
    dataclasses.replace(CASES["decoder"], name="decoder, bfloat16", layers=2, dtype="bfloat16"),
)
OURS = ("lora", "dora", "lora-in-nnx", "dora-in-nnx")
COUNTS = ("flops", "bytes_accessed", "temp_bytes")
SENT = ("sent_bytes", "temp_bytes")
SLACK = 1.02


@dataclasses.dataclass(frozen=True)
class Options:
    """Guards what steps cost."""

    record: bool = False
    """Keep what is counted now."""
    out: Path = Path("benchmarks/results/guard.json")
    """What was counted before."""
    accelerators: tuple[str, ...] = ("h100", "v5e:2x2")
    """Compilers to ask, where they are there: of a GPU, and of topologies of TPUs."""
    meshes: tuple[Literal["data", "model", "both"], ...] = ()
    """How 16 chips share a step, by the TPU's compiler: data, model, both."""
    topology: str = "v5e:4x4"
    """Of the 16."""


def counted(case: Case) -> dict[str, dict[str, float]]:
    """Costs of a step of LoRA and of DoRA, in Linen and in NNX, in those of the floor."""
    steps = [make_step(PROBLEMS[name](case), case) for name in ("floor", *OURS)]
    for step in steps:
        step.compile()
    floor, *ours = (step.facts for step in steps)
    return {
        name: {key: facts[key] / floor[key] for key in COUNTS}
        for name, facts in zip(OURS, ours, strict=True)
    }


def counted_for(accelerator: str) -> dict[str, dict[str, float]]:
    """The same for an accelerator, and bytes of copies of kernels beyond the floor's, in MiB."""
    counts = [on_one_device(name, LAYER, accelerator) for name in ("floor", "lora", "dora")]
    floor, *ours = counts
    return {
        name: {key: one[key] / floor[key] for key in COUNTS if one.get(key)}
        | {"copied_MiB": max(0.0, one["kernel_bytes"] - floor["kernel_bytes"]) / 2**20}
        for name, one in zip(("lora", "dora"), ours, strict=True)
    }


def counted_on(topology: str, layout: str) -> dict[str, dict[str, float]]:
    """Bytes that 16 chips send and temporary memory, in those of the floor."""
    counts = [on_a_mesh(name, LAYERS, topology, layout) for name in ("floor", "lora", "dora")]
    floor, *ours = counts
    return {
        name: {key: one[key] / floor[key] for key in SENT}
        for name, one in zip(("lora", "dora"), ours, strict=True)
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


def count(options: Options) -> dict[str, Any]:
    """All that can be counted here."""
    costs = {case.name: counted(case) for case in GUARDED}
    for accelerator in options.accelerators:
        if compilers.has(accelerator):
            costs[f"{LAYER.name}, {accelerator}"] = counted_for(accelerator)
        else:
            print(f"not counted: there is no compiler for {accelerator}")
    if options.meshes and not compilers.has(options.topology):
        raise SystemExit(
            f"There is no compiler for {options.topology}, which --meshes needs: install libtpu, "
            f"or run make guard-accelerators."
        )
    for layout in options.meshes:
        costs[f"{LAYERS.name}, {options.topology}, {layout}"] = counted_on(options.topology, layout)
    return {"costs": costs, "traces": traces()}


def main(options: Options) -> int:
    """Counts and compares; the exit status."""
    now = count(options)
    for case, variants in now["costs"].items():
        for variant, one in variants.items():
            cells = "  ".join(f"{key} {value:.3f}" for key, value in one.items())
            print(f"{case:22} {variant}  {cells}  (in floors)")
    before = files.read(options.out)
    if options.record:
        costs = before.get("costs", {}) | now["costs"]
        files.write(options.out, {"jax": jax.__version__, **now, "costs": costs})
        return 0
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
