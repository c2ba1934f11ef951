"""One contender in a process of its own, which does as it is told, a line at a time.

    python -m benchmarks.running.worker lora '{"name": ..., ...}'

Builds the contender and says that it is built. Then `compile` makes it ready, by its first steps;
`NAME N` answers with the times of N runs of a job, `facts` with what is known, `profile NAME` with
the most expensive kernels of a job, and `quit` ends it. Every answer is a line of JSON; one with
`error` is the last.
"""

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from benchmarks.contenders.families import FAMILIES, trained
from benchmarks.contenders.step import Step
from benchmarks.contenders.table import build
from benchmarks.models.cases import Case

FIRST_STEPS = 3  # whose losses are compared


def timed(step: Step, job: str, count: int) -> dict[str, Any]:
    """Seconds of each of `count` runs, and the most memory that was held."""
    seconds, value, repeats = [], None, step.repeats.get(job, 1)
    for _ in range(count):
        begin = time.perf_counter()
        value = step.jobs[job]()
        seconds.append((time.perf_counter() - begin) / repeats)
    return {"seconds": seconds, "value": value, **memory(step)}


def memory(step: Step) -> dict[str, int]:
    """Bytes at most: of the whole process, since `forget_peak`, and on the device."""
    out = {"peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "VmHWM" in lines:
            out["run_rss"] = int(lines["VmHWM"].split()[0]) * 1024
    return out | step.memory()


def forget_peak() -> None:
    """Forgets the most memory so far, which is that of building and compiling."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def first_losses(step: Step) -> list[float]:
    """What contenders are compared by: losses of the first steps, or a value of each job."""
    if "step" in step.jobs:
        return [step.jobs["step"]() for _ in range(FIRST_STEPS)]
    return [job() for job in step.jobs.values()]


def obey(step: Step, lines: TextIO, answer: Callable[[dict[str, Any]], None]) -> None:
    """Does what each line says."""
    for line in lines:
        line = line.strip()
        if line == "quit":
            return
        if line == "facts":
            answer({"facts": step.facts, **memory(step)})
            continue
        if line.startswith("profile "):
            from benchmarks.running.profiler import most_expensive

            answer({"kernels": most_expensive(step.jobs[line.removeprefix("profile ")])})
            continue
        job, _, count = line.rpartition(" ")  # a job may have spaces in its name
        answer(timed(step, job, int(count)) if job in step.jobs else {"missing": job})


def main(
    contender: str, case: Case, lines: TextIO, answer: Callable[[dict[str, Any]], None]
) -> None:
    """Builds and obeys; what goes wrong is an answer too."""
    try:
        begin = time.perf_counter()
        step = build(contender, case)
        expected = trained(case, FAMILIES[contender])
        if step.facts["trained"] != expected:
            raise ValueError(f"trains {step.facts['trained']} numbers, not {expected}")
        step.facts["build_seconds"] = time.perf_counter() - begin
        answer({"built": contender, "facts": step.facts})
        if lines.readline().strip() != "compile":
            return
        begin = time.perf_counter()
        step.compile()
        forget_peak()
        losses = first_losses(step)
        step.facts["first_seconds"] = time.perf_counter() - begin
        jobs = list(step.jobs)
        answer({"ready": contender, "jobs": jobs, "losses": losses, "facts": step.facts})
        obey(step, lines, answer)
    except ImportError as error:
        answer({"error": f"not installed: {error}"})
    except Exception as error:
        traceback.print_exc()
        # Without the notes that jax adds.
        answer({"error": f"{type(error).__name__}: {error}"[:1000]})


if __name__ == "__main__":
    # Libraries print what they like; answers go where they cannot.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    main(
        sys.argv[1],
        Case.loads(sys.argv[2]),
        sys.stdin,
        lambda message: print(json.dumps(message), file=out, flush=True),
    )
