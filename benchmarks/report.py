"""Writes `docs/benchmarks.md` and its figure from what was measured.

    python -m benchmarks.report

What stands between the marks of the page is replaced, and the rest of it stays.
"""

import dataclasses
import io
from pathlib import Path
from typing import Any

import tyro

from benchmarks import markdown, stats
from benchmarks.gpu import page as gpu_page

BEGIN = "<!-- begin: written by `python -m benchmarks.report` -->"
END = "<!-- end: written by `python -m benchmarks.report` -->"
TPU_COUNTS = {
    "TFLOP": ("flops", 1e12),
    "GiB accessed": ("bytes_accessed", 2**30),
    "GiB temporary": ("temp_bytes", 2**30),
    "Mcycles, estimated": ("estimated_cycles", 1e6),
}
OURS, OTHERS, TORCH = "#1f77b4", "#9aa5b1", "#d9a066"


@dataclasses.dataclass(frozen=True)
class Options:
    """Writes the page and the figure."""

    results: Path = Path("benchmarks/results")
    """Folder of results."""
    page: Path = Path("docs/benchmarks.md")
    """The page."""
    figure: Path = Path("docs/benchmarks.png")
    """The figure."""


def place(environment: dict[str, Any]) -> str:
    """The machine and the versions in words."""
    versions = ", ".join(f"{k} {v}" for k, v in environment["packages"].items())
    return (
        f"{environment['cpu']}, {environment['cores']} cores, "
        f"{environment['memory_bytes'] / 2**30:.0f} GiB; {environment['date'][:10]}; "
        f"Python {environment['python']}, {versions}."
    )


def places(results: dict[str, Any]) -> str:
    """All machines and versions, each once."""
    return "\n\n".join(dict.fromkeys(place(result["environment"]) for result in results.values()))


def case_table(result: dict[str, Any]) -> str:
    """All contenders of a case."""
    header = (
        "",
        "step, ms",
        "of the floor (quartiles)",
        "forward, ms",
        "merge, ms",
        "memory of a step, MiB",
        "temporary (XLA), MiB",
        "trace + lower, s",
        "compile, s",
        "trained",
    )
    rows = []
    for name, one in result["contenders"].items():
        title = markdown.title(name)
        if "error" in one:
            rows.append([title, one["error"].split(":")[0], *[""] * (len(header) - 2)])
            continue
        facts, step = one["facts"], one.get("step")
        trace = "trace_seconds" in facts and facts["trace_seconds"] + facts["lower_seconds"]
        rows.append(
            [
                title,
                markdown.milliseconds(step),
                markdown.interval(step.get("to_floor") if step else None),
                markdown.milliseconds(one.get("forward")),
                markdown.milliseconds(one.get("merge")),
                markdown.mebibytes(one["memory"].get("run_rss", one["memory"]["peak_rss"])),
                markdown.mebibytes(facts.get("temp_bytes")),
                f"{trace:.2f}" if trace else "",
                f"{facts['compile_seconds']:.1f}" if "compile_seconds" in facts else "",
                f"{facts['trained']:,}",
            ]
        )
    return markdown.table(header, rows)


def train_step(results: dict[str, Any]) -> str:
    """Every case that is not swept, and then a table for each sweep."""
    parts, sweeps = [], {}
    for name, result in results.items():
        base, _, swept = name.partition(" ")
        if swept:
            sweeps.setdefault((base, swept.split("=")[0]), {})[swept] = result
            continue
        parts.append(f"### {name}\n\n{markdown.shape(result['case'])}.")
        parts.append(
            f"{result['rounds']} rounds of {result['steps']} steps, "
            f"{result['together']} contenders at most in memory at a time."
        )
        parts.append(case_table(result))
        if result["pairs"]:
            rows = [
                [f"`{key}`", markdown.interval(value)] for key, value in result["pairs"].items()
            ]
            parts.append(markdown.table(("time of a step", "ratio (quartiles)"), rows))
    for (base, field), swept in sweeps.items():
        parts.append(f"### {base}, by {field}")
        parts.append(
            "The time of a step as a multiple of the floor's, which is in the first line in ms."
        )
        names = list(dict.fromkeys(n for result in swept.values() for n in result["contenders"]))
        rows = [
            ["floor, ms"] + [markdown.milliseconds(floor_of(result)) for result in swept.values()]
        ]
        for name in names:
            if name != "floor":
                steps = [
                    result["contenders"].get(name, {}).get("step") for result in swept.values()
                ]
                ratios = [markdown.interval(step and step.get("to_floor")) for step in steps]
                rows.append([markdown.title(name), *ratios])
        parts.append(markdown.table(("", *swept), rows))
    return "\n\n".join(parts)


def floor_of(result: dict[str, Any]) -> dict[str, Any] | None:
    """The floor's step."""
    return result["contenders"].get("floor", {}).get("step")


def overheads(results: dict[str, Any]) -> str:
    """What is paid once: imports, traces, compilations."""
    parts = []
    for name, result in results.items():
        parts.append(f"### {name}\n\n{result['what']}")
        base = result["base"]
        rows = [
            [
                f"`{key}`",
                markdown.milliseconds(one),
                markdown.interval(one.get("to_base")) if key != base else "1",
            ]
            for key, one in result["times"].items()
        ]
        parts.append(markdown.table(("", "ms", f"of `{base}` (quartiles)"), rows))
    return "\n\n".join(parts)


def many(results: dict[str, Any]) -> str:
    """Many adapters of one base."""
    parts = []
    for name, result in results.items():
        parts.append(f"### {name}\n\n{result['what']} {markdown.shape(result['case'])}.")
        rows = [
            [
                key,
                markdown.milliseconds(one),
                "1" if key == one["base"] else markdown.interval(one["to_base"]),
            ]
            for key, one in result["times"].items()
        ]
        bases = list(dict.fromkeys(one["base"] for one in result["times"].values()))
        parts.append(markdown.table(("", "ms", f"of {', or '.join(bases)} (quartiles)"), rows))
        if "memory" in result:
            sizes = result["memory"]
            header = ("memory of weights, MiB", f"{sizes['adapters']} use cases")
            keys = ("base", "adapter", "base and adapters", "merged models")
            rows = [[key, f"{sizes[key] / 2**20:,.1f}"] for key in keys]
            parts.append(markdown.table(header, rows))
    return "\n\n".join(parts)


def operations(results: dict[str, Any]) -> str:
    """Operations one at a time, of the model in XLA and PyTorch and of adapters in XLA."""
    parts = []
    for name, result in results.items():
        rows, sums = [], {"xla": 0.0, "torch": 0.0}
        for title, one in result["model"].items():
            sums["xla"] += one["count"] * one["median"]
            theirs = one.get("torch")
            cells = ["", ""]
            if theirs:
                sums["torch"] += one["count"] * theirs["median"]
                cells = [markdown.milliseconds(theirs), f"{one['median'] / theirs['median']:.2f}"]
            rows.append([title, str(one["count"]), markdown.milliseconds(one), *cells])
        cells = ["", ""]
        if sums["torch"]:
            cells = [markdown.digits(1e3 * sums["torch"]), f"{sums['xla'] / sums['torch']:.2f}"]
        rows.append(["**all of it**", "", markdown.digits(1e3 * sums["xla"]), *cells])
        header = ("forward and gradient of the inputs", "times", "XLA, ms", "PyTorch, ms", "ratio")
        parts += [f"### {name}\n\n{markdown.shape(result['case'])}.", markdown.table(header, rows)]
        kinds: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for title, one in [*result["model"].items(), *result["adapters"].items()]:
            kind, _, kernel = title.partition(", ")
            if kernel:
                kinds.setdefault(kind, []).append((kernel, one))
        kernels = dict.fromkeys(kernel for ones in kinds.values() for kernel, _ in ones)
        rows = []
        for kind, ones in kinds.items():
            total = sum(one["count"] * one["median"] for _, one in ones)
            cells = [markdown.milliseconds(dict(ones)[kernel]) for kernel in kernels]
            rows.append([kind, *cells, markdown.digits(1e3 * total)])
        parts.append(markdown.table(("XLA, ms", *kernels, "all of it"), rows))
    return "\n\n".join(parts)


def tpu(results: dict[str, Any]) -> str:
    """What the TPU's compiler counts, and that in floors."""
    parts = []
    for name, result in results.items():
        contenders = result["contenders"]
        floor = contenders["floor"]
        empty = [""] * (2 * len(TPU_COUNTS) - 1)
        rows = []
        for key, one in contenders.items():
            if "error" in one:
                rows.append([markdown.title(key), one["error"].split(":")[0], *empty])
                continue
            cells = [markdown.title(key)]
            for count, unit in TPU_COUNTS.values():
                cells += [f"{one[count] / unit:.2f}", f"{one[count] / floor[count]:.3f}"]
            rows.append(cells)
        parts.append(f"### {name}\n\n{markdown.shape(result['case'])}.")
        header = ("", *(title for unit in TPU_COUNTS for title in (unit, "floors")))
        parts.append(markdown.table(header, rows))
    return "\n\n".join(parts)


def ratios(results: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """For the figure: what is a multiple of the floor, by case."""
    return {
        name: {
            key: one["step"]["to_floor"]
            for key, one in result["contenders"].items()
            if key != "floor" and "to_floor" in one.get("step", {})
        }
        for name, result in results.items()
        if " " not in name
    }


def bars(panels: dict[str, dict[str, dict[str, float]]], label: str) -> bytes:
    """A figure of ratios, a panel for each case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 3.6 * rows), layout="constrained", squeeze=False
    )
    for axes, (name, found) in zip(grid.flat, panels.items(), strict=False):
        order = sorted(found, key=lambda key: -found[key]["median"])
        middle = [found[key]["median"] for key in order]
        # The ratio of the medians may lie outside of the quartiles of the ratios.
        low = [max(found[key]["median"] - found[key]["low"], 0) for key in order]
        high = [max(found[key]["high"] - found[key]["median"], 0) for key in order]
        colors = [color(key) for key in order]
        axes.barh(
            order, middle, xerr=(low, high), color=colors, height=0.7, error_kw={"linewidth": 1}
        )
        for y, (value, up) in enumerate(zip(middle, high, strict=True)):
            axes.text(value + up, y, f" {value:.2f}", va="center", fontsize=8)
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlim(0, 1.15 * max((m + h for m, h in zip(middle, high, strict=True)), default=1))
        axes.set_title(name, loc="left")
        axes.set_xlabel(label)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150)
    plt.close(figure)
    return buffer.getvalue()


def color(contender: str) -> str:
    """Ours, others', PyTorch's."""
    if contender.startswith(("torch", "peft")):
        return TORCH
    return OURS if "lora_jax" in markdown.title(contender) else OTHERS


def replaced(page: str, content: str) -> str:
    """The page with new content between its marks; without marks, at its end."""
    block = f"{BEGIN}\n\n{content}\n\n{END}"
    if BEGIN in page and END in page:
        before, _, rest = page.partition(BEGIN)
        return before + block + rest.partition(END)[2]
    return f"{page.rstrip()}\n\n{block}\n".lstrip()


def main(options: Options) -> None:
    """Writes both."""
    parts = []
    steps: dict[str, Any] = {}
    for path in sorted(options.results.glob("train_step*.json")):
        steps |= stats.read(path)
    if steps:
        if panels := ratios(steps):
            stats.write_bytes(options.figure, bars(panels, "time of a step / floor"))
            parts.append(f"![Time of a step as a multiple of the floor's]({options.figure.name})")
        parts.append(f"## A step of training\n\n{places(steps)}\n\n{train_step(steps)}")
    timed, figure = gpu_page.read(options.results), options.figure.with_stem("gpu")
    if panels := gpu_page.ratios(timed):
        stats.write_bytes(figure, bars(panels, "time / the first contender's"))
    parts.append(f"## On a GPU\n\n{gpu_page.section(timed, figure.name)}")
    once = stats.read(options.results / "overheads.json")
    if once:
        parts.append(f"## What is paid once\n\n{places(once)}\n\n{overheads(once)}")
    served = stats.read(options.results / "many.json")
    if served:
        parts.append(f"## Many adapters of one base\n\n{places(served)}\n\n{many(served)}")
    alone = stats.read(options.results / "operations.json")
    if alone:
        parts.append(f"## Where the time of a step goes\n\n{places(alone)}\n\n{operations(alone)}")
    counted = stats.read(options.results / "tpu.json")
    if counted:
        parts.append(
            f"## A step on a TPU, as its compiler counts it\n\n{places(counted)}\n\n{tpu(counted)}"
        )
    page = options.page.read_text() if options.page.exists() else "# Benchmarks\n"
    stats.write_bytes(options.page, replaced(page, "\n\n".join(parts)).encode())


if __name__ == "__main__":
    main(tyro.cli(Options))
