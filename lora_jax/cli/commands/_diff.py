"""``lora-jax diff``: how far two adapters are apart."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from lora_jax.cli._arguments import Adapter, Names, Other, read_names
from lora_jax.cli._printing import print_line, print_table
from lora_jax.cli.adapters._adapted_matrix import AdaptedMatrix, difference
from lora_jax.cli.adapters._open_adapter import OpenedAdapter, is_peft, open_adapter, opened
from lora_jax.cli.adapters._trees_without_model import as_peft


def diff(first: Adapter, second: Other, names: Names = "transformers") -> int:
    """Compares two adapters of any format. Exits with 1 where they differ.

    Example: lora-jax diff my-adapter another

    Args:
        first: an adapter's folder.
        second: another one's.
        names: a family of names (transformers, gemma), or a JSON file, as for convert; used where
            one is of lora_jax and the other of PEFT.
    """
    a, b = _opened_by_same_names(first, second, names)
    head = ("matrix", "rank", "||A - B|| / ||A||", "cosine", "m, largest difference", "else")
    body: list[tuple[str, ...]] = []
    differs = False
    for name in dict.fromkeys((*a.matrices, *b.matrices)):
        if name not in a.matrices or name not in b.matrices:
            body.append((name, f"only in {first if name in a.matrices else second}", *[""] * 4))
            differs = True
            continue
        one, other = a.matrices[name], b.matrices[name]
        if one.U.shape[0] != other.U.shape[0] or one.V.shape[1] != other.V.shape[1]:
            body.append((name, "of different shapes", *[""] * 4))
            differs = True
            continue
        relative, cosine = difference(one, other)
        magnitude = _magnitudes(one, other)
        ranks, settings = f"{one.rank}, {other.rank}", _settings(one, other)
        body.append((name, ranks, f"{relative:.3g}", f"{cosine:.4f}", magnitude, settings))
        differs |= relative > 1e-6 or magnitude not in ("", "0") or settings != ""
    for name in dict.fromkeys((*a.fully_trained, *b.fully_trained)):
        if name not in a.fully_trained or name not in b.fully_trained:
            body.append(
                (name, f"only in {first if name in a.fully_trained else second}", *[""] * 4)
            )
            differs = True
        elif not _same(a.fully_trained[name], b.fully_trained[name]):
            body.append((name, "fully trained, differs", *[""] * 4))
            differs = True
    print_table(head, body)
    print_line("They differ." if differs else "They are the same.")
    return int(differs)


def _opened_by_same_names(
    first: Path, second: Path, names: str
) -> tuple[OpenedAdapter, OpenedAdapter]:
    """Two adapters by the same names: those of PEFT where one of them is of PEFT."""
    if is_peft(first) == is_peft(second):
        return open_adapter(first), open_adapter(second)
    table = read_names(names)
    with tempfile.TemporaryDirectory() as scratch:
        a, b = (
            open_adapter(one) if is_peft(one) else opened(as_peft(one, table, scratch)[0])
            for one in (first, second)
        )
    if not {*a.matrices, *a.fully_trained} & {*b.matrices, *b.fully_trained}:
        raise ValueError(
            f"By --names {names}, {first} has {next(iter(a.matrices))!r} and so on, and {second} "
            f"{next(iter(b.matrices))!r} and so on, and nothing in common: say by --names how they "
            f"are called."
        )
    return a, b


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have the same shape and numbers."""
    return a.shape == b.shape and np.array_equal(a.astype(np.float32), b.astype(np.float32))


def _magnitudes(a: AdaptedMatrix, b: AdaptedMatrix) -> str:
    """The largest difference of two magnitudes; empty for LoRA."""
    if a.m is None or b.m is None:
        return "" if a.m is b.m else "LoRA and DoRA"
    return f"{np.abs(a.m.astype(np.float32) - b.m.astype(np.float32)).max():.3g}"


def _settings(a: AdaptedMatrix, b: AdaptedMatrix) -> str:
    """In what two adapters compute otherwise, as their files say; empty where one is of PEFT."""
    fields = [
        field
        for field in a.settings
        if field in b.settings and a.settings[field] != b.settings[field]
    ]
    return "; ".join(f"{field} {a.settings[field]} and {b.settings[field]}" for field in fields)
