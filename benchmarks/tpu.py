r"""What a training step costs on a TPU, as the TPU's own compiler counts it: nothing is run.

`libtpu` compiles on any machine, without a TPU. What it says of a program is exact and free of
noise: arithmetic, bytes that are accessed, memory. These are not measured times.

    python -m benchmarks.tpu
    python -m benchmarks.tpu --topologies v5p:2x2x1 v6e:2x2 --contenders floor full lora dora
"""

import dataclasses
import os
import re
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.contenders import qwix
from benchmarks.contenders.problems import PROBLEMS
from benchmarks.contenders.program import costs
from benchmarks.contenders.training import adamw_step
from benchmarks.models import data
from benchmarks.models.cases import Case
from benchmarks.running import files
from benchmarks.running.environment import environment

CASE = Case("tpu", "decoder", 2048, 8192, 16, 3, 4, 1024, 16, "bfloat16", vocab=32_000)
# Besides those that are timed on CPUs.
CONTENDERS = PROBLEMS | {"qwix-float32": qwix.lora_float32}


@dataclasses.dataclass(frozen=True)
class Options:
    """Counts what steps cost."""

    topologies: tuple[str, ...] = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
    """What is compiled for; a step runs on one chip."""
    contenders: tuple[str, ...] = (
        *("floor", "full", "lora", "lora-outer", "dora", "dora-outer", "dora-detached"),
        *("lora-plain", "merge", "qwix", "qwix-float32", "gemma-peft"),
    )
    """What is compiled."""
    layers: int = CASE.layers
    """Layers of the decoder."""
    remat: bool = True
    """Whether layers are rematerialised."""
    out: Path = Path("benchmarks/results/tpu.json")
    """Where results go; others that are there already stay."""


def count(contender: str, case: Case, topology: str) -> dict[str, float]:
    """Costs of a compiled step of AdamW on one chip."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    chip = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
    problem = CONTENDERS[contender](case)
    tx, train_step = adamw_step(problem.loss)

    def abstract(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=chip), tree
        )

    args = problem.trained, jax.eval_shape(tx.init, problem.trained), problem.frozen
    batch = tuple(map(jnp.asarray, data.batch(case)))
    begin = time.perf_counter()
    lowered = train_step.lower(*map(abstract, (*args, batch)))
    compiled = lowered.compile()
    found = {k: v for k, v in costs(compiled, lowered).items() if k != "traced_flops"}
    found["estimated_cycles"] = estimated_cycles(compiled.as_text())
    return {**found, "compile_seconds": time.perf_counter() - begin}


def estimated_cycles(hlo: str) -> int:
    """The sum of the compiler's estimates for the operations of a program, one after another."""
    entry = hlo[hlo.index("\nENTRY ") :]
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', entry)))


def main(options: Options) -> None:
    """Counts, and writes each result as soon as it is there."""
    case = dataclasses.replace(CASE, layers=options.layers, remat=options.remat)
    for topology in options.topologies:
        print(topology, flush=True)
        for contender in options.contenders:
            try:
                one = count(contender, case, topology)
            except ImportError as error:
                one = {"error": f"not installed: {error}"}
            results = files.read(options.out)
            name = f"{topology}{'' if options.remat else ' without remat'}"
            entry = results.setdefault(name, {"contenders": {}})
            entry |= {"case": dataclasses.asdict(case), "environment": environment()}
            entry["contenders"][contender] = one
            files.write(options.out, results)
            cells = one.get("error") or (
                f"{one['flops'] / 1e12:.3f} TFLOP, {one['bytes_accessed'] / 2**30:.2f} GiB "
                f"accessed, {one['temp_bytes'] / 2**30:.3f} GiB temporary, "
                f"{one['estimated_cycles'] / 1e6:.1f} Mcycles estimated"
            )
            print(f"  {contender:14} {cells}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
