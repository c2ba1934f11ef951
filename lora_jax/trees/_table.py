"""Rows as plain text, in columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, TypeVar

Row = TypeVar("Row")


@dataclasses.dataclass(frozen=True)
class Report(Mapping[str, Row], Generic[Row]):
    """A row for every parameter by its path.

    Attributes:
      rows: the same as a dict.
    """

    rows: Mapping[str, Row]

    def __getitem__(self, path: str) -> Row:
        """Of one parameter."""
        return self.rows[path]

    def __iter__(self) -> Iterator[str]:
        """The paths."""
        return iter(self.rows)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.rows)


def text_table(head: Sequence[str], body: Sequence[Sequence[str]], left: int) -> list[str]:
    r"""The lines of a table.

    Args:
      head: titles of the columns.
      body: the cells of every row.
      left: how many columns, from the first, stand to the left.

    Example:
      >>> print("\n".join(text_table(("path", "%"), [("a", "1.5"), ("long", "100.0")], left=1)))
      path      %
      ----  -----
      a       1.5
      long  100.0
      ----  -----
    """
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return [line(head), rule, *map(line, body), rule]
