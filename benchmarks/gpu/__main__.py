"""The command; see `benchmarks.gpu`."""

import argparse
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.contest import Contest
from benchmarks.gpu.device import commit, nvidia_smi
from benchmarks.gpu.races import Race, races, tiny_races
from benchmarks.gpu.run import Run
from benchmarks.running import files
from benchmarks.running.environment import environment


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    names = [race.name for race in races()]
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu",
        description="Measures lora_jax on one GPU, beside what one would use instead.",
    )
    cases = parser.add_mutually_exclusive_group()
    cases.add_argument(
        "--cases",
        nargs="+",
        choices=names,
        default=names,
        metavar="CASE",
        help=f"what is measured, in this order: {' '.join(names)}",
    )
    cases.add_argument(
        "--profile",
        nargs="+",
        choices=names,
        metavar="CASE",
        help="in place of times, the ten most expensive kernels of each step of these cases",
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        metavar="NAME",
        help="only these, and with whom they are compared",
    )
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="time that it takes at most (default: 7)"
    )
    parser.add_argument("--rounds", type=int, help="rounds at most (default: 10, or 2 if tiny)")
    parser.add_argument("--steps", type=int, help="steps in a round (default: 3, or 1 if tiny)")
    parser.add_argument(
        "--tiny", action="store_true", help="a rehearsal, also on a CPU: small models"
    )
    parser.add_argument("--commit", help="of the library, where git does not know it")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or "runs/gpu"),
        help="folder of results (default: $OUT, or runs/gpu where it is not set)",
    )
    options = parser.parse_args(argv)
    if options.rounds is None:
        options.rounds = 2 if options.tiny else 10
    if options.steps is None:
        options.steps = 1 if options.tiny else 3
    if options.minutes <= 0 or options.rounds < 1 or options.steps < 1:
        parser.error("--minutes, --rounds and --steps must be positive")
    known = {
        name
        for race in races()
        for heat in race.heats
        for label, (contender, _) in heat.entries.items()
        for name in (label, contender)
    }
    for name in options.contenders or ():
        if name not in known:
            parser.error(f"--contenders: there is no {name!r} among {', '.join(sorted(known))}")
    return options


# What one case may take of the time that is left, and seconds that each may.
SHARE, LEAST_SECONDS = 0.45, 60.0
# A third of the time to compile; where XLA no longer knows it, it is left out.
QUICK = "--xla_cpu_use_fusion_emitters=false"


def probe(run: Run, race: Race) -> str | None:
    """Learns what jax computes on, and which attention is the fastest; or why it cannot."""
    heat = race.heats[0]
    case = heat.entries[heat.reference][1]
    for flags in (QUICK, "") if run.options.tiny else ("",):
        run.flags = flags
        worker = run.worker("attention", case, "probe")
        try:
            worker.compile(run.end)
            if "error" in worker.ready:
                continue
            facts, seconds = worker.ready["facts"], {}
            run.device, errors = facts["device"], facts["errors"]
            for job in worker.ready["jobs"]:
                answer = worker.ask(f"{job} 5", run.end)
                if "error" in answer:
                    errors[job] = answer["error"]
                else:
                    seconds[job] = answer["seconds"]
            break
        finally:
            worker.stop()
    else:
        return f"jax does not compute here: {worker.ready['error']}"
    if not seconds:
        return f"no attention works here: {errors}"
    chosen = min(seconds, key=lambda job: min(seconds[job]))
    run.attention = {"chosen": chosen, "seconds": seconds, "errors": errors}
    if run.device["platform"] != "gpu" and not run.options.tiny:
        return (
            f"jax computes on a {run.device['platform']}, not on a GPU: is JAX installed for CUDA? "
            f"On a CPU there is --tiny."
        )
    return None


def measure(run: Run, race: Race) -> dict[str, Any]:
    """Measures a case, and writes what there is after each group of contenders."""
    result: dict[str, Any] = {
        "benchmark": "gpu",
        "name": race.name,
        "title": race.title,
        "tiny": run.options.tiny,
        "complete": False,
        "device": run.device | run.gpu,
        "environment": environment() | {"commit": run.options.commit or commit()},
        "attention": run.attention,
        "heats": [],
    }
    path = result_path(run, race.name)
    begin = time.monotonic()

    def save() -> None:
        result["seconds"] = time.monotonic() - begin
        files.write(path, result)

    for heat in race.heats:
        entry: dict[str, Any] = {"title": heat.title, "reference": heat.reference}
        entry["contenders"] = {}
        result["heats"].append(entry)
        Contest(run, heat, entry["contenders"], save).measure()
    result["complete"] = not run.options.contenders and not any(
        one.get("left_out", "").startswith("cut") for one in contenders_of(result)
    )
    save()
    return result


def contenders_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Of all heats."""
    return [one for heat in result["heats"] for one in heat["contenders"].values()]


def result_path(run: Run, name: str) -> Path:
    """Where results go: whatever is not the same has another name, so that it replaces nothing."""
    options = run.options
    parts = [
        *("gpu", run.device["kind"].lower(), "tiny" * options.tiny),
        *("profile" * bool(options.profile), name, *(options.contenders or ())),
    ]
    return options.out / f"{re.sub(r'[^0-9a-z]+', '-', ' '.join(parts))}.json"


def profile_text(result: dict[str, Any]) -> str:
    """The kernels of a case as text."""
    parts = []
    for heat in result["heats"]:
        for label, one in heat["contenders"].items():
            for job, kernels in one.get("kernels", {}).items():
                title = ", ".join(filter(None, (result["name"], heat["title"], label, job)))
                total = kernels[-1]["seconds"] or 1.0
                rows = (
                    f"{1e3 * row['seconds']:10.3f} ms {100 * row['seconds'] / total:5.1f} % "
                    f"{row['calls']:7.0f} x  {row['name'][:120]}"
                    for row in kernels
                )
                parts.append("\n".join([title, *rows]))
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Measures all that is wanted, as far as there is time."""
    options = arguments(argv)
    # What ends it early ends the contenders too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ.pop("XLA_CLIENT_MEM_FRACTION", None)  # XLA refuses it beside the one that is set
    begin = time.monotonic()
    wanted = options.profile or options.cases
    every = tiny_races() if options.tiny else races()
    chosen = [race for race in every if race.name in wanted]
    undone = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        run = Run(options, begin + 60 * options.minutes, nvidia_smi(), Path(scratch))
        if why := probe(run, every[0]):
            print(why, file=sys.stderr)
            return 1
        print(f"{run.device['kind']}, attention: {run.attention['chosen']}", flush=True)
        for race in chosen:
            run.limit = float("inf")
            if race is not chosen[-1]:
                run.limit = time.monotonic() + max(SHARE * run.left(), LEAST_SECONDS)
            if run.left() <= 0:
                undone.append(race.name)
                continue
            print(f"{race.name}: {race.title} ({run.left():.0f} s left)", flush=True)
            result = measure(run, race)
            if not result["complete"]:
                undone.append(race.name)
            if options.profile:
                text = profile_text(result)
                result_path(run, race.name).with_suffix(".txt").write_text(text)
                print(text, flush=True)
    print(f"{time.monotonic() - begin:.0f} s; results are in {options.out}", flush=True)
    if undone and not options.contenders:
        print(f"Not done, or in part, for lack of time: --cases {' '.join(undone)}", flush=True)
    for line in run.failed:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
