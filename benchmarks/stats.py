"""Medians, quartiles and ratios; where results are kept."""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "chex", "numpy", "lora_jax"),
    *("libtpu", "qwix", "gemma", "torch", "peft", "transformers"),
)


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return dict.fromkeys(("low", "median", "high"), values[0])
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"low": low, "median": statistics.median(values), "high": high}


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """The ratio of the medians, with the quartiles of the ratios round by round."""
    paired = quartiles([a / b for a, b in zip(over, under, strict=True)])
    return {**paired, "median": statistics.median(over) / statistics.median(under)}


def environment() -> dict[str, Any]:
    """Where and with what it was measured."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        cpu = next((value.strip() for key, value in lines if key.strip() == "model name"), cpu)
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load": os.getloadavg(),
    }


def rounded(value: Any) -> Any:
    """The same with six significant digits, which is more than was measured."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [rounded(item) for item in value]
    return value


def write(path: Path, results: Any) -> None:
    """Writes JSON, all or nothing."""
    write_bytes(path, (json.dumps(rounded(results), indent=1) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read(path: Path) -> dict[str, Any]:
    """What is there already."""
    return json.loads(path.read_text()) if path.exists() else {}
