"""The most expensive kernels of a job, from `jax.profiler`."""

import collections
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

RUNS = 3


def most_expensive(job: Callable[[], Any], count: int = 10) -> list[dict[str, Any]]:
    """Name, seconds and calls of the kernels that take most of a run of a job; the sum is last.

    On a GPU these are the kernels of its streams, on a CPU the operations of XLA's threads.

    Raises:
      RuntimeError: if this jax cannot read a profile.
    """
    if not hasattr(jax.profiler, "ProfileData"):
        raise RuntimeError(f"jax {jax.__version__} has no jax.profiler.ProfileData.")
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(RUNS):
                job()
        seconds: collections.Counter[str] = collections.Counter()
        calls: collections.Counter[str] = collections.Counter()
        for path in Path(folder).rglob("*.xplane.pb"):
            for name, nanoseconds in events(jax.profiler.ProfileData.from_file(str(path))):
                seconds[name] += nanoseconds / 1e9 / RUNS
                calls[name] += 1
    rows = [
        {"name": name, "seconds": value, "calls": calls[name] / RUNS}
        for name, value in seconds.most_common(count)
    ]
    total = {"seconds": sum(seconds.values()), "calls": sum(calls.values()) / RUNS}
    return [*rows, {"name": f"all {len(seconds)} kernels", **total}]


def events(profile: Any) -> Iterator[tuple[str, float]]:
    """Names and nanoseconds of what was computed."""
    planes = list(profile.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in devices or [plane for plane in planes if plane.name.startswith("/host:CPU")]:
        start = "Stream" if devices else "tf_XLA"
        for line in plane.lines:
            if line.name.startswith(start):
                for event in line.events:
                    # With two colons it is a function of the runtime, which waits for others.
                    if "::" not in event.name and not event.name.startswith(("end: ", "Thunk")):
                        yield event.name, event.duration_ns
