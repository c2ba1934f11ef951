"""What `python -m benchmarks.remat` wrote, as a table."""

from typing import Any

from benchmarks.reports import markdown

KEPT = {"all": "no remat", "nothing": "`nn.remat`", "save_only_xU": "the same, `save_only_xU`"}


def section(results: dict[str, Any]) -> str:
    """Counts of each compiler, and those in what a step without rematerialisation has."""
    parts = []
    for accelerator, result in results.items():
        rows = []
        for contender, kinds in result["counts"].items():
            base = kinds["all"]
            for kept, one in kinds.items():
                cells = [f"{markdown.title(contender)}, {KEPT[kept]}"]
                for key, unit in (("temp_bytes", 2**20), ("flops", 1e9), ("bytes_accessed", 2**30)):
                    cells += [f"{one[key] / unit:,.2f}", f"{one[key] / base[key]:.3f}"]
                rows.append(cells)
        parts.append(f"### {accelerator}\n\n{markdown.shape(result['case'])}.")
        header = ("", "MiB temporary", "", "GFLOP", "", "GiB accessed", "")
        parts.append(markdown.table(header, rows))
    return "\n\n".join(parts)
