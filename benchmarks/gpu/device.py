"""What there is to measure on, and what the results say of it."""

import shutil
import subprocess
from pathlib import Path
from typing import Any


def nvidia_smi() -> dict[str, Any]:
    """Name, driver, memory and limits of the first GPU; empty where there is none."""
    if not shutil.which("nvidia-smi"):
        return {}
    fields = ("name", "driver_version", "memory.total", "clocks.max.sm", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        values = [value.strip() for value in out.stdout.splitlines()[0].split(",")]
        found: dict[str, Any] = dict(zip(fields, values, strict=True))
        return found | {"memory_bytes": int(found.pop("memory.total")) * 2**20}
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return {}


def commit() -> str:
    """Of the library, as far as git knows."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    here = Path(__file__).parent
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return out.stdout.strip()
