"""What all cases of one run of the command have in common: options, time, and the GPU."""

import argparse
import dataclasses
import re
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.memory import bytes_needed
from benchmarks.models.cases import Case
from benchmarks.running.process import Worker

# Seconds that are kept for writing and ending.
END_SECONDS = 3.0
# The share of a GPU's memory that is given to contenders.
USABLE = 0.93


@dataclasses.dataclass
class Run:
    """What all heats have in common.

    Attributes:
      options: of the command line.
      deadline: of `time.monotonic`.
      gpu: what `nvidia-smi` says of the GPU; empty where there is none.
      scratch: folder for logs, and for what XLA finds out when it compiles.
      device: what jax computes on.
      attention: which implementation is the fastest here, and how that was found.
      failed: what went wrong.
      flags: of XLA, of a rehearsal on a CPU.
      limit: of `time.monotonic`, so that one case does not take all the time.
    """

    options: argparse.Namespace
    deadline: float
    gpu: dict[str, Any]
    scratch: Path
    device: dict[str, Any] = dataclasses.field(default_factory=dict)
    attention: dict[str, Any] = dataclasses.field(default_factory=dict)
    failed: list[str] = dataclasses.field(default_factory=list)
    flags: str = ""
    limit: float = float("inf")

    @property
    def end(self) -> float:
        """When the last measurement has to end, of `time.monotonic`."""
        return min(self.deadline - END_SECONDS, self.limit)

    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.monotonic()

    def worker(self, contender: str, case: Case, log: str) -> Worker:
        """Starts a contender."""
        environment = {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            # So that which product is the fastest is found out once for all contenders, and that
            # the small programs that make weights are compiled once.
            "JAX_COMPILATION_CACHE_DIR": str(self.scratch / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        if self.gpu:
            share = min(bytes_needed(contender, case) / self.gpu["memory_bytes"], USABLE)
            # Else the allocator doubles what it takes each time, and leaves no room.
            environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{share:.3f}"
        elif self.options.tiny:
            environment |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
            environment |= {"XLA_FLAGS": self.flags} if self.flags else {}
        name = re.sub(r"\W+", "-", f"{log}-{contender}")
        return Worker(contender, case, self.scratch / f"{name}.log", environment)
