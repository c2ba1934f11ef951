"""What a step needs whose layers, in one loop, are rematerialised, and then keep `x U`.

The compilers of a CPU and, where `libtpu` is installed, of a TPU count it: nothing is run.

    python -m benchmarks.remat
    python -m benchmarks.remat --accelerators v5e:2x2
"""

import dataclasses
import os
from pathlib import Path
from typing import Literal

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import tyro

from benchmarks.models.cases import CASES
from benchmarks.running import compilers, files
from benchmarks.running.accelerators import of_all_layers, on_a_mesh
from benchmarks.running.environment import environment

CASE = dataclasses.replace(CASES["decoder"], dtype="bfloat16")
# What a layer keeps for its gradient.
KEPT = {
    "all": {},
    "nothing": {"remat": True},
    "save_only_xU": {"remat": True, "save_xU": True},
}
COUNTS = ("flops", "bytes_accessed", "temp_bytes")


@dataclasses.dataclass(frozen=True)
class Options:
    """Counts what rematerialised steps cost."""

    accelerators: tuple[str, ...] = ("cpu", "v5e:2x2")
    """Compilers to ask."""
    contenders: tuple[str, ...] = ("lora", "dora")
    """What is compiled."""
    kept: tuple[Literal["all", "nothing", "save_only_xU"], ...] = ("all", "nothing", "save_only_xU")
    """What layers keep."""
    out: Path = Path("benchmarks/results/remat.json")
    """Where results go; others that are there already stay."""


def main(options: Options) -> None:
    """Counts, and writes each result as soon as it is there."""
    for accelerator in options.accelerators:
        if not compilers.has(accelerator):
            print(f"not counted: there is no compiler for {accelerator}")
            continue
        for contender in options.contenders:
            for kept in options.kept:
                case = dataclasses.replace(CASE, **KEPT[kept])
                one = on_a_mesh(contender, case, accelerator, "one")
                one |= of_all_layers(one, case, contender, accelerator, "one")
                results = files.read(options.out)
                entry = results.setdefault(accelerator, {"counts": {}})
                entry |= {"case": dataclasses.asdict(CASE), "environment": environment()}
                counts = {key: one[key] for key in COUNTS}
                entry["counts"].setdefault(contender, {})[kept] = counts
                files.write(options.out, results)
                print(f"{accelerator:8} {contender:5} {kept:13} {counts}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
