"""Writes `docs/benchmarks.md` and its figures from what was measured.

    python -m benchmarks.report

What stands between the marks of the page is replaced, and the rest of it stays.
"""

import dataclasses
from pathlib import Path
from typing import Any

import tyro

from benchmarks.reports import (
    gpu,
    many,
    mesh,
    operations,
    overheads,
    quantized,
    remat,
    tpu,
    train_step,
)
from benchmarks.reports.figure import bars
from benchmarks.reports.markdown import places
from benchmarks.running import files

BEGIN = "<!-- begin: written by `python -m benchmarks.report` -->"
END = "<!-- end: written by `python -m benchmarks.report` -->"
# The sections without a figure: the file of results, the title, and what writes the tables.
SECTIONS = (
    ("overheads", "What is paid once", overheads.section),
    ("many", "Many adapters of one base", many.section),
    ("operations", "Where the time of a step goes", operations.section),
    ("tpu", "A step on a TPU, as its compiler counts it", tpu.section),
    ("mesh", "A step on 16 TPUs, as their compiler counts it", mesh.section),
    ("remat", "Rematerialised layers, as the compilers count them", remat.section),
    ("quantized", "SmolLM2 on quantized bases", quantized.section),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Writes the page and the figure."""

    results: Path = Path("benchmarks/results")
    """Folder of results."""
    page: Path = Path("docs/benchmarks.md")
    """The page."""
    figure: Path = Path("docs/benchmarks.png")
    """The figure."""


def replaced(page: str, content: str) -> str:
    """The page with new content between its marks; without marks, at its end."""
    block = f"{BEGIN}\n\n{content}\n\n{END}"
    if BEGIN in page and END in page:
        before, _, rest = page.partition(BEGIN)
        return before + block + rest.partition(END)[2]
    return f"{page.rstrip()}\n\n{block}\n".lstrip()


def main(options: Options) -> None:
    """Writes the page and its figures."""
    parts = []
    steps: dict[str, Any] = {}
    for path in sorted(options.results.glob("train_step*.json")):
        steps |= files.read(path)
    if steps:
        if panels := train_step.ratios(steps):
            files.write_bytes(options.figure, bars(panels, "time of a step / floor"))
            parts.append(f"![Time of a step as a multiple of the floor's]({options.figure.name})")
        parts.append(f"## A step of training\n\n{places(steps)}\n\n{train_step.section(steps)}")
    timed, figure = gpu.read(options.results), options.figure.with_stem("gpu")
    if panels := gpu.ratios(timed):
        files.write_bytes(figure, bars(panels, "time / the first contender's"))
    parts.append(f"## On a GPU\n\n{gpu.section(timed, figure.name)}")
    for name, title, section in SECTIONS:
        if results := files.read(options.results / f"{name}.json"):
            parts.append(f"## {title}\n\n{places(results)}\n\n{section(results)}")
    page = options.page.read_text() if options.page.exists() else "# Benchmarks\n"
    files.write_bytes(options.page, replaced(page, "\n\n".join(parts)).encode())


if __name__ == "__main__":
    main(tyro.cli(Options))
