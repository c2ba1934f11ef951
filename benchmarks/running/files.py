"""Results as JSON, each file written as a whole or not at all."""

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any


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
