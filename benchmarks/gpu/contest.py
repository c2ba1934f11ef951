"""One heat: groups of contenders that fit into the memory, each beside the reference."""

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

from benchmarks.contenders.families import check_losses
from benchmarks.gpu.memory import bytes_needed
from benchmarks.gpu.races import Heat
from benchmarks.gpu.run import END_SECONDS, USABLE, Run
from benchmarks.models.cases import Case
from benchmarks.running import stats
from benchmarks.running.process import Worker
from benchmarks.running.race import medians, take_turns

# How far first losses may be apart: of means over many tokens in 16 bits, of products in TF32, and
# of the digests of those that serve. Random weights and labels make the first of them blunt: that
# contenders compute the same is tested in float32, over several steps.
TOLERANCES = {"bfloat16": 2e-4, "float32": 1e-3}
SERVE_TOLERANCE = 2e-3
# Seconds that the rounds of a group may take, and that contenders may take to become ready.
GROUP_SECONDS, READY_SECONDS = 12.0, 90.0
# Bytes that each process holds on a GPU besides its arrays.
CONTEXT = 1.5 * 2**30
# What is not a failure: what is not installed, not possible, or not in time.
LEFT_OUT = re.compile(r"not installed: |not profiled: |cut: |.*product='dense'\) is not possible")


class Contest:
    """Measures a heat.

    Args:
      run: what all have in common.
      heat: who takes part.
      results: of each contender, by its label; they are entered here.
      save: is called whenever there is more.
    """

    def __init__(
        self, run: Run, heat: Heat, results: dict[str, Any], save: Callable[[], None]
    ) -> None:
        self._run, self._heat, self._results, self._save = run, heat, results, save
        chosen = run.options.contenders
        self._entries = {
            label: (contender, dataclasses.replace(case, attention=attention(run, case)))
            for label, (contender, case) in heat.entries.items()
            if not chosen or label == heat.reference or {label, contender} & {*chosen}
        }
        self._running: dict[str, Worker] = {}
        self._losses: dict[str, list[float]] = {}

    def measure(self) -> None:
        """All contenders, as far as there is time."""
        reference = self._heat.reference
        try:
            for i, group in enumerate(self.groups()):
                if self._run.left() <= 0:
                    break
                self.start([reference, *group] if i == 0 else group)
                if reference not in self._running:
                    break
                self.compete()
                for label in group:
                    if label in self._running:
                        self._running.pop(label).stop()
                self._save()
        finally:
            for worker in self._running.values():
                worker.stop()
            why = "there was no time left"
            if self._results.get(reference, {}).keys() & {"error", "left_out"}:
                why = f"{reference} could not be measured"
            for label in self._entries.keys() - self._results.keys():
                self.drop(label, f"cut: {why}")
            self._results.update({label: self._results.pop(label) for label in self._entries})
            self._save()

    def groups(self) -> list[list[str]]:
        """Contenders that fit into the memory together, and beside the reference."""
        reference, *others = self._entries
        total = USABLE * self._run.gpu.get("memory_bytes", 1e15)
        needed = {
            label: bytes_needed(contender, case) + CONTEXT
            for label, (contender, case) in self._entries.items()
        }
        out: list[list[str]] = [[]]
        room = total - needed[reference]
        for label in others:
            if out[-1] and needed[label] > room:
                out.append([])
                room = total - needed[reference]
            out[-1].append(label)
            room -= needed[label]
        return out

    def start(self, labels: list[str]) -> None:
        """Builds contenders at the same time; compiles the reference, and then the others."""
        for label in labels:
            contender, case = self._entries[label]
            log = f"{self._heat.title}-{label}-{case.name}"
            self._running[label] = self._run.worker(contender, case, log)
        until = self.until(READY_SECONDS)
        for label in labels:
            self._running[label].wait_built(until)
        queue = [label for label in labels if "error" not in self._running[label].built]
        first = [label for label in queue if label == self._heat.reference]
        rest, size = queue[len(first) :], self._heat.together
        for chunk in (first, *(rest[i : i + size] for i in range(0, len(rest), size))):
            for label in chunk:
                self._running[label].send("compile")
            until = self.until(READY_SECONDS)
            for label in chunk:
                self._running[label].wait_ready(until)
        for label in labels:
            self.check(label)

    def until(self, seconds: float) -> float:
        """So many seconds from now, or the end."""
        return min(self._run.end, time.monotonic() + seconds)

    def check(self, label: str) -> None:
        """Drops a contender that is not ready, or does not compute what the others do."""
        ready = self._running[label].ready
        if "error" in ready:
            self.drop(label, ready["error"])
            return
        losses = {**self._losses, label: ready["losses"]}
        families = {label: self._heat.family(label) for label in losses}
        contender, case = self._entries[label]
        serves = contender.startswith("serve")
        tolerance = SERVE_TOLERANCE if serves else TOLERANCES[case.dtype]
        try:
            check_losses(losses, tolerance, families)
        except RuntimeError as error:
            self.drop(label, str(error))
            return
        self._losses = losses
        facts = ready["facts"]
        print(
            f"  {label}: loss {ready['losses'][0]:.5f}, built in {facts['build_seconds']:.1f} s, "
            f"first steps after {facts['first_seconds']:.1f} s",
            flush=True,
        )

    def compete(self) -> None:
        """The rounds of those that are running, and what came out of them."""
        options, reference = self._run.options, self._heat.reference
        if options.profile:
            for label, worker in self._running.items():
                self.profile(label, worker)
            return
        turns, errors = take_turns(
            self._running,
            lambda label: jobs_of(self._running[label]),
            options.rounds,
            options.steps,
            until=self.until(GROUP_SECONDS),
            end=self._run.end + END_SECONDS / 2,
        )
        for label, error in errors.items():
            self.drop(label, error)
        theirs = turns.get(reference, {})
        for label, jobs in turns.items():
            if label in self._results:  # the reference, of a group before
                continue
            worker = self._running[label]
            last = worker.ask("facts", self._run.end + END_SECONDS / 2)
            one = self.entry(label) | {"losses": self._losses[label], "jobs": {}}
            one |= {"facts": last.pop("facts", {}), "memory": last}
            for job, rounds in jobs.items():
                entered = {**stats.quartiles(medians(rounds)), "seconds": rounds}
                reference_rounds = theirs.get(job.split(",")[0])
                if reference_rounds:
                    entered["reference_seconds"] = reference_rounds
                    entered["to_reference"] = stats.ratio(
                        medians(rounds), medians(reference_rounds)
                    )
                one["jobs"][job] = entered
            self._results[label] = one
            print(f"  {label}: {in_short(one)}", flush=True)

    def profile(self, label: str, worker: Worker) -> None:
        """The most expensive kernels of a step, or of each job."""
        if label in self._results:
            return
        if self._entries[label][0].startswith(("torch", "peft")):
            self._results[label] = self.entry(label)
            self._results[label]["left_out"] = "not profiled: jax.profiler sees what JAX runs only"
            return
        self._results[label] = self.entry(label) | {"kernels": {}}
        for job in jobs_of(worker):
            answer = worker.ask(f"profile {job}", self._run.end)
            if "error" in answer:
                self.drop(label, answer["error"])
                return
            self._results[label]["kernels"][job] = answer["kernels"]

    def entry(self, label: str) -> dict[str, Any]:
        """What the results hold of every contender."""
        contender, case = self._entries[label]
        return {"contender": contender, "case": dataclasses.asdict(case)}

    def drop(self, label: str, error: str) -> None:
        """Notes why a contender was not measured, and ends it."""
        left_out = LEFT_OUT.match(error) is not None
        if "jobs" not in self._results.get(label, {}):  # else it is the reference, measured before
            self._results[label] = self.entry(label) | {"left_out" if left_out else "error": error}
        print(f"  {label}: {'left out, ' if left_out else 'ERROR, '}{error}", flush=True)
        if not left_out:
            self._run.failed.append(f"{label}: {error}")
        if label in self._running:
            worker = self._running.pop(label)
            worker.stop()
            if not left_out:
                self._results[label]["log"] = worker.written()


def attention(run: Run, case: Case) -> str:
    """The fastest implementation; cuDNN has none for 32 bits."""
    chosen: str = run.attention["chosen"]
    return "xla" if case.dtype == "float32" else chosen


def jobs_of(worker: Worker) -> list[str]:
    """What is measured: of those that train a step, of others all that they can."""
    jobs: list[str] = worker.ready["jobs"]
    return ["step"] if "step" in jobs else jobs


def in_short(result: dict[str, Any]) -> str:
    """The times of a contender."""
    return ", ".join(
        f"{job} {1e3 * one['median']:.2f} ms"
        + (f" = {one['to_reference']['median']:.3f}" if "to_reference" in one else "")
        for job, one in result["jobs"].items()
    )
