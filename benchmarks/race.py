"""Contenders take turns: each is a process of its own, and only one computes at a time."""

import json
import os
import random
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.step import FAMILIES, TRAJECTORIES


class Worker:
    """A contender's process, seen from here.

    Attributes:
      contender: what it is.
      log: where its own words go.
      built: its first answer.
      ready: its answer to `compile`.
    """

    def __init__(
        self, contender: str, case: Case, log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.contender, self.log = contender, log
        self.built: dict[str, Any] = {}
        self.ready: dict[str, Any] = {}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", contender, case.dumps()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                # Else transformers imports JAX, in whose memory PEFT has no part.
                env={"USE_FLAX": "0", **os.environ, **(env or {})},
            )

    def compile(self, deadline: float | None = None) -> None:
        """Waits until it is built, has it compiled, and waits for that."""
        self.wait_built(deadline)
        if "error" not in self.built:
            self.say("compile")
            self.wait_ready(deadline)

    def wait_built(self, deadline: float | None = None) -> None:
        """Waits for the first answer."""
        self.built = self.answer(deadline)
        if "error" in self.built:
            self.ready = self.built

    def wait_ready(self, deadline: float | None = None) -> None:
        """Waits for the answer to `compile`."""
        self.ready = self.answer(deadline)

    def ask(self, line: str, deadline: float | None = None) -> dict[str, Any]:
        """Sends a command and waits for its answer."""
        self.say(line)
        return self.answer(deadline)

    def say(self, line: str) -> None:
        """Sends a command."""
        assert self._process.stdin
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except OSError:  # it died, which its answer says
            return

    def answer(self, deadline: float | None = None) -> dict[str, Any]:
        """The next answer; a process that died has one too, and one that is late.

        Args:
          deadline: of `time.monotonic`, after which the process is ended.
        """
        stream = self._process.stdout
        assert stream
        # There is one answer for each command, so that none waits in the buffer.
        left = None if deadline is None else max(deadline - time.monotonic(), 0)
        if not select.select([stream], [], [], left)[0]:
            self.stop()
            return {"error": "cut: it was not ready in time"}
        line = stream.readline()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        code = self._process.wait()
        return {"error": f"died with exit status {code}: {self.last_words()}"}

    def last_words(self) -> str:
        """The last line that it wrote."""
        lines = self.written().splitlines()
        return lines[-1][:300] if lines else "it wrote nothing"

    def written(self, size: int = 4000) -> str:
        """The end of what it wrote."""
        return self.log.read_text(errors="replace").strip()[-size:]

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


def check_losses(
    losses: Mapping[str, list[float]],
    tolerance: float,
    families: Mapping[str, str] = FAMILIES,
    exact: bool = False,
) -> None:
    """All of a family must agree on the first losses, and all of a group on all losses.

    Args:
      losses: of each contender; of those that serve, of each of their jobs.
      tolerance: relative.
      families: of each contender.
      exact: that rounding is small enough for the losses of later steps to agree too.

    Raises:
      RuntimeError: they do not, so that they do not compute the same.
    """
    same = {"floor": "full", "full": "full"}  # the base is the same
    groups: dict[str, list[str]] = {}
    for name in losses:
        groups.setdefault(same.get(families[name], families[name]), []).append(name)
    compared = [
        (names, None if family.startswith("serve") else 1) for family, names in groups.items()
    ]
    if exact:
        compared += [([n for n in group if n in losses], None) for group in TRAJECTORIES]
    for names, count in compared:
        # The longest first, so that what is compared is all that each has.
        names = sorted(names, key=lambda name: -len(losses[name]))
        for name in names[1:]:
            pairs = zip(losses[names[0]][:count], losses[name][:count], strict=False)
            for a, b in pairs:
                if not abs(a - b) <= tolerance * max(abs(a), abs(b)):
                    raise RuntimeError(
                        f"{name} does not compute what {names[0]} does: its first losses are "
                        f"{losses[name]}, not {losses[names[0]]}."
                    )


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
      jobs: of a contender.
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
