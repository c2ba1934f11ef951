"""What the commands print: tables, lines and bars of progress."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import rich.progress
from rich.console import Console

from lora_jax.trees._table import text_table

console = Console(highlight=False, soft_wrap=True)


def print_line(text: object) -> None:
    """Prints a line as it is."""
    console.print(str(text), markup=False)


def print_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    """Prints a table.

    Where it is wider than the terminal, names lose their beginnings, and digits nothing.
    """
    lines = text_table(head, body, left=1)
    if console.is_terminal or "COLUMNS" in os.environ:
        over = max(map(len, lines)) - console.width
        room = max(max(len(row[0]) for row in (head, *body)) - max(over, 0), 16)
        short = [n if len(n) <= room else f"...{n[3 - room :]}" for n, *_ in body]
        lines = text_table(
            head, [(n, *row[1:]) for n, row in zip(short, body, strict=True)], left=1
        )
    print_line("\n".join(lines))


def progress_bar() -> rich.progress.Progress:
    """A bar of progress, which is gone when it is done; tasks are added to it."""
    return rich.progress.Progress(console=Console(stderr=True), transient=True)


def progress(items: Iterable[Any], what: str) -> Iterable[Any]:
    """The items, with a bar of progress while they are gone through."""
    items = list(items)
    return rich.progress.track(items, what, console=Console(stderr=True), transient=True)
