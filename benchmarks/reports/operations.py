"""What `python -m benchmarks.operations` wrote, as tables."""

from typing import Any

from benchmarks.reports import markdown


def section(results: dict[str, Any]) -> str:
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
