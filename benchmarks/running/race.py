"""Jobs take turns, round by round in a shuffled order, and only one computes at a time.

So whatever slows the machine down slows all of them. `take_turns` is for contenders that are
processes, `alternate` for functions of this process.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping

from benchmarks.running.process import Worker

# Of every run, a list for each round, by contender and job.
Seconds = dict[str, dict[str, list[list[float]]]]


def take_turns(
    workers: Mapping[str, Worker],
    jobs: Callable[[str], list[str]],
    rounds: int,
    steps: int,
    seed: int = 0,
    until: float | None = None,
    end: float | None = None,
) -> tuple[Seconds, dict[str, str]]:
    """Measures contenders, round by round in a shuffled order.

    Args:
      workers: those that are ready, by name.
      jobs: function of a contender, to the names of its jobs.
      rounds: at most.
      steps: runs of a job in a round.
      seed: of the order.
      until: of `time.monotonic`; no round that would pass it is begun, but for the first.
      end: of `time.monotonic`; a contender that is still busy then is ended.

    Returns:
      Seconds of every run of every job of every contender, a list for each round; and the errors
      of contenders that failed, which took no further part.
    """
    seconds: Seconds = {name: {} for name in workers}
    errors: dict[str, str] = {}
    order, rng = [(name, job) for name in workers for job in jobs(name)], random.Random(seed)
    longest = 0.0
    for i in range(rounds):
        begin = time.monotonic()
        if i and until is not None and begin + longest > until:
            break
        rng.shuffle(order)
        for name, job in order:
            if name in errors:
                continue
            answer = workers[name].ask(f"{job} {steps}", end)
            if "missing" in answer:
                continue
            if "error" not in answer and i == 0 and job != "step":  # that compiled
                answer = workers[name].ask(f"{job} {steps}", end)
            if "error" in answer:
                errors[name] = answer["error"]
                continue
            seconds[name].setdefault(job, []).append(answer["seconds"])
            time.sleep(0.02)  # threads of the last one may still wait for more work
        longest = max(longest, time.monotonic() - begin)
        print(".", end="", flush=True)
    print(flush=True)
    return {name: one for name, one in seconds.items() if name not in errors}, errors


def medians(rounds: list[list[float]]) -> list[float]:
    """The median of each round."""
    return [statistics.median(seconds) for seconds in rounds]


def alternate(
    jobs: dict[str, Callable[[], float]], rounds: int, seed: int
) -> dict[str, list[float]]:
    """What each job returns in each round, in a shuffled order; one round before them is void."""
    out: dict[str, list[float]] = {name: [] for name in jobs}
    order, rng = list(jobs), random.Random(seed)
    for i in range(rounds + 1):
        rng.shuffle(order)
        for name in order:
            value = jobs[name]()
            if i:
                out[name].append(value)
        print(".", end="", flush=True)
    print(flush=True)
    return out
