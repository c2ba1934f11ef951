"""One contender in a process of its own, which does as it is told, a line at a time.

    python -m benchmarks.worker lora '{"name": ..., ...}'

Builds the contender, takes its first steps, and says that it is ready. Then `step N`, `forward N`
and `merge N` answer with N times, `facts` with what is known, and `quit` ends it. Every answer is a
line of JSON; one with `error` is the last.
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

from benchmarks.cases import Case, trained
from benchmarks.step import FAMILIES, FIRST_STEPS, Step, build


def timed(function: Callable[[], Any], count: int) -> dict[str, Any]:
    """Seconds of each of `count` calls, and the memory that there was at most."""
    seconds, value = [], None
    for _ in range(count):
        begin = time.perf_counter()
        value = function()
        seconds.append(time.perf_counter() - begin)
    return {"seconds": seconds, "value": value, **memory()}


def memory() -> dict[str, int]:
    """Bytes in memory at most: of the whole process, and since `forget_peak`."""
    out = {"peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        out["run_rss"] = int(lines["VmHWM"].split()[0]) * 1024
    return out


def forget_peak() -> None:
    """Starts anew to measure the memory at most, for what building and compiling took is past."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def obey(step: Step, lines: TextIO, answer: Callable[[dict[str, Any]], None]) -> None:
    """Does what each line says."""
    jobs = {"step": step.run, "forward": step.forward, "merge": step.merge}
    for line in lines:
        command, *count = line.split()
        if command == "quit":
            return
        if command == "facts":
            answer({"facts": step.facts, **memory()})
        elif jobs.get(command) is None:
            answer({"missing": command})
        else:
            answer(timed(jobs[command], int(*count)))


def main(
    contender: str, case: Case, lines: TextIO, answer: Callable[[dict[str, Any]], None]
) -> None:
    """Builds and obeys; what goes wrong is an answer too."""
    try:
        begin = time.perf_counter()
        step = build(contender, case)
        built = time.perf_counter() - begin
        expected = trained(case, FAMILIES[contender])
        if step.facts["trained"] != expected:
            raise ValueError(f"trains {step.facts['trained']} numbers, not {expected}")
        step.facts["build_seconds"] = built
        forget_peak()
        losses = [step.run() for _ in range(FIRST_STEPS)]
        answer({"ready": contender, "losses": losses, "facts": step.facts, **memory()})
        obey(step, lines, answer)
    except ImportError as error:
        answer({"error": f"not installed: {error}"})
    except Exception as error:
        traceback.print_exc()
        answer({"error": traceback.format_exception_only(error)[-1].strip()})


if __name__ == "__main__":
    # Libraries print what they like; answers go where they cannot.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    main(
        sys.argv[1],
        Case(**json.loads(sys.argv[2])),
        sys.stdin,
        lambda message: print(json.dumps(message), file=out, flush=True),
    )
