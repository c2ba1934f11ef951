"""What `python -m benchmarks.many` wrote, as tables."""

from typing import Any

from benchmarks.reports import markdown


def section(results: dict[str, Any]) -> str:
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
