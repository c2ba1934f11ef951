"""``lora-jax inspect``: what is in an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from lora_jax.cli._arguments import Adapter
from lora_jax.cli._printing import print_line, print_table, progress
from lora_jax.cli.adapters._adapted_matrix import AdaptedMatrix
from lora_jax.cli.adapters._open_adapter import open_adapter


def inspect(path: Adapter) -> int:
    """Shows what is in an adapter of any format.

    Example: lora-jax inspect my-adapter

    Args:
        path: the adapter's folder.
    """
    adapter = open_adapter(path)
    rows: dict[tuple[str, ...], list[tuple[str, AdaptedMatrix, np.ndarray]]] = {}
    for name, one in progress(adapter.matrices.items(), "singular values"):
        size = f"{one.U.shape[0]} x {one.V.shape[1]}"
        kind = "LoRA" if one.m is None else "DoRA"
        alike = (_pattern(name), size, kind, str(one.rank), f"{one.scale:g}")
        rows.setdefault(alike, []).append((name, one, one.singular_values))
    head = ("matrix", "d x k", "variant", "rank", "scale", "||s U V||", "largest", "eff. rank")
    body = [
        (
            _name(pattern, [name for name, _, _ in group]),
            *alike,
            _range(_digits(float(np.linalg.norm(values))) for _, _, values in group),
            _range(_digits(float(values[0])) for _, _, values in group),
            _range(f"{one.effective_rank:.1f}" for _, one, _ in group),
        )
        for (pattern, *alike), group in rows.items()
    ]
    print_table(head, body)
    if adapter.fully_trained:
        arrays: dict[tuple[str, ...], list[str]] = {}
        for name, array in adapter.fully_trained.items():
            shape = " x ".join(map(str, array.shape))
            arrays.setdefault((_pattern(name), shape, array.dtype.name), []).append(name)
        lines = [(_name(pattern, names), *facts) for (pattern, *facts), names in arrays.items()]
        print_table(("fully trained", "shape", "dtype"), lines)
    trained = sum(one.size for one in adapter.matrices.values())
    trained += sum(array.size for array in adapter.fully_trained.values())
    nbytes = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    facts = {"format": adapter.format, **adapter.facts}
    facts |= {"numbers": f"{trained:,}", "bytes": f"{nbytes:,}"}
    print_line(", ".join(f"{key} {value}" for key, value in facts.items()))
    return 0


def _pattern(name: str) -> str:
    """A name without its numbers: what layers have in common."""
    return re.sub(r"\d+", "*", name)


def _name(pattern: str, names: Sequence[str]) -> str:
    """One name, or what several are that differ in numbers only."""
    return names[0] if len(names) == 1 else f"{pattern} ({len(names)})"


def _digits(value: float) -> str:
    """A number with three digits."""
    return f"{float(f'{value:.3g}'):g}"


def _range(values: Iterable[str]) -> str:
    """The smallest and the largest of some numbers."""
    ordered = sorted(values, key=float)
    return " to ".join(dict.fromkeys((ordered[0], ordered[-1])))
