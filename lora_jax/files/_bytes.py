"""Files opened only if they end, and written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

StrPath = str | os.PathLike[str]


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[Any]:
    """An open file, if it is not a pipe or device, which might never end."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path} is not a regular file.")
        yield file


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file so that whoever opens it sees all of it, the old or the new, at any moment."""
    with replacing(path) as partial:
        partial.write(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """An open file that takes the place of ``path`` when all is written, and vanishes if not."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes names in a folder last, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
