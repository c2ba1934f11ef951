"""What a step of a model of 8B costs each of 16 chips, as the TPU's own compiler counts it.

`libtpu` compiles on any machine, without a TPU. The base is sharded by hand, as a user does it; our
adapters, their gradients and the state of their optimizer are where `lora_jax.shardings` puts them.
A program that does not fit into the memory of a chip does not compile. These are no times.

Arithmetic and bytes accessed are not counted: XLA counts what is in a loop once, and makes of a
product with a kernel that is gathered a loop over its parts, of some kernels and not of others.

    python -m benchmarks.mesh
    python -m benchmarks.mesh --layouts model --contenders lora dora
"""

import dataclasses
import itertools
import os
import time
from pathlib import Path
from typing import Any, Literal

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import tyro

from benchmarks.models.cases import Case
from benchmarks.running import files
from benchmarks.running.accelerators import EIGHT_B, on_a_mesh
from benchmarks.running.environment import environment

COUNTS = ("sent_bytes", "temp_bytes", "argument_bytes", "output_bytes", "alias_bytes")


@dataclasses.dataclass(frozen=True)
class Options:
    """Counts what steps cost on a mesh."""

    topology: str = "v5e:4x4"
    """Of 16 chips."""
    layouts: tuple[Literal["data", "model", "both"], ...] = ("data", "both")
    """How they share the model."""
    contenders: tuple[str, ...] = ("floor", "lora", "dora", "qwix", "qwix-float32")
    """What is compiled."""
    layers: int = EIGHT_B.layers
    """Layers of the model."""
    out: Path = Path("benchmarks/results/mesh.json")
    """Where results go; others that are there already stay."""


def counted(contender: str, case: Case, topology: str, layout: str) -> dict[str, Any]:
    """Bytes of a step on each chip."""
    begin = time.perf_counter()
    try:
        found = on_a_mesh(contender, case, topology, layout)
    except ImportError as error:
        return {"error": f"not installed: {error}"}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"error": f"does not fit: {str(error).splitlines()[0]}"}
    found = {key: found[key] for key in COUNTS}
    held = sum(found[f"{key}_bytes"] for key in ("argument", "temp", "output"))
    found["held_bytes"] = held - found["alias_bytes"]
    return {**found, "compile_seconds": time.perf_counter() - begin}


def main(options: Options) -> None:
    """Counts, and writes each result as soon as it is there."""
    case = dataclasses.replace(EIGHT_B, layers=options.layers)
    for layout, contender in itertools.product(options.layouts, options.contenders):
        one = counted(contender, case, options.topology, layout)
        results = files.read(options.out)
        entry = results.setdefault(f"{options.topology}, {layout}", {"contenders": {}})
        entry |= {"case": dataclasses.asdict(case), "environment": environment()}
        entry["contenders"][contender] = one
        files.write(options.out, results)
        print(layout, contender, one, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
