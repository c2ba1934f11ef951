"""The report of what is trained: its rows, and its text."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_jax.trees._table import text_table


@dataclasses.dataclass(frozen=True)
class Row:
    """One trained kernel or leaf.

    Attributes:
      path: where it is in the parameters.
      shape: shape of the kernel or leaf.
      variant: ``"lora"``, ``"dora"``, or ``"full"`` for a fully trained leaf.
      rank: ``r``; ``None`` for a fully trained leaf.
      scale: ``s``; ``None`` for a fully trained leaf.
      trained: number of trained parameters.
      total: number of parameters of the kernel or leaf in the model.
      nbytes: bytes of the trained arrays.
      materialized: whether ``W'`` stands in place of the parameter itself.
      zero_columns: DoRA only: number of all-zero columns of the kernel, which have no direction;
        ``None`` for others, and for abstract arrays.
    """

    path: str
    shape: tuple[int, ...]
    variant: str
    rank: int | None
    scale: float | None
    trained: int
    total: int
    nbytes: int
    materialized: bool = False
    zero_columns: int | None = None


@dataclasses.dataclass(frozen=True)
class RuleReport:
    """What became of a rule.

    Attributes:
      pattern: its pattern.
      adapted: the kernels that it adapts.
      taken: the leaves that it matches but that others have, and who has them.
    """

    pattern: str
    adapted: tuple[str, ...]
    taken: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Summary:
    """The report as data; ``str`` of it is the report as text.

    Attributes:
      rows: one for each trained kernel or leaf.
      trained: number of trained parameters.
      total: number of parameters of the model, without the factors.
      nbytes: bytes to save for one use case.
      frozen_kernels: every leaf of two or more axes (without the stacks that ``axes`` knows) that
        is not adapted, with its shape, whether or not its layer is known.
      rules: what became of each rule; empty without ``config``.
      tied: adapted parameters that the model also reads outside of their layer; empty without
        ``axes``.
      optimizer_nbytes: bytes of the optimizer's state; ``None`` without ``tx``.
    """

    rows: tuple[Row, ...]
    trained: int
    total: int
    nbytes: int
    frozen_kernels: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    rules: tuple[RuleReport, ...] = ()
    tied: tuple[str, ...] = ()
    optimizer_nbytes: int | None = None

    @property
    def percent(self) -> float:
        """Trained parameters in per cent of the model's."""
        return 100.0 * self.trained / max(self.total, 1)

    def __str__(self) -> str:
        """The text: rows that differ in numbers of their path only are one line, with ``*``."""
        lines = _table(self.rows)
        for rule in self.rules:
            matched = f"{len(rule.adapted)} of {len(rule.adapted) + len(rule.taken)} matched"
            lines.append(f"Rule({rule.pattern!r}): {matched} leaves adapted")
            owners = _grouped(rule.taken.items(), key=lambda item: item[1])
            for owner, items in owners.items():
                lines.append(f"  not {_paths(path for path, _ in items)}: has {owner}")
        if self.frozen_kernels:
            lines.append(f"left frozen, of two or more axes: {_paths(self.frozen_kernels)}")
        if self.tied:
            lines.append(f"tied, so read outside of their layer too: {_paths(self.tied)}")
        for row in self.rows:
            if row.zero_columns:
                lines.append(
                    f"{row.path} has {row.zero_columns} all-zero columns: DoRA keeps them at zero "
                    f"until U V gives them a direction"
                )
        if self.optimizer_nbytes is not None:
            lines.append(f"optimizer state: {_bytes(self.optimizer_nbytes)}")
        frozen = self.total - sum(row.total for row in self.rows if row.variant == "full")
        sums = (
            f"trained {self.trained:,} of {self.total:,} parameters ({self.percent:.2f} %), "
            f"{frozen:,} frozen; {_bytes(self.nbytes)} to save"
        )
        return "\n".join([*lines, sums])


def _table(rows: tuple[Row, ...]) -> list[str]:
    head = ("path", "shape", "variant", "rank", "scale", "trained", "total", "%")
    body = []
    for (pattern, *_), group in _grouped(rows, key=_alike).items():
        row, count = group[0], len(group)
        trained, total = (sum(getattr(r, name) for r in group) for name in ("trained", "total"))
        body.append(
            (
                row.path if count == 1 else f"{pattern} ({count})",
                " x ".join(map(str, row.shape)),
                row.variant + (", materialized" if row.materialized else ""),
                "" if row.rank is None else str(row.rank),
                "" if row.scale is None else f"{row.scale:g}",
                f"{trained:,}",
                f"{total:,}",
                f"{100 * trained / max(total, 1):.2f}",
            )
        )
    return text_table(head, body, left=3)


def _alike(row: Row) -> tuple[Any, ...]:
    kind = row.shape, row.variant, row.rank, row.scale, row.materialized
    return (re.sub(r"\d+", "*", row.path), *kind)


def _grouped(items: Iterable[Any], key: Any) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _paths(paths: Iterable[str]) -> str:
    groups = _grouped(paths, key=lambda path: re.sub(r"\d+", "*", path))
    return ", ".join(
        same[0] if len(same) == 1 else f"{pattern} ({len(same)})"
        for pattern, same in groups.items()
    )


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
