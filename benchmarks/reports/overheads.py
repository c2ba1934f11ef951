"""What `python -m benchmarks.overheads` wrote, as tables."""

from typing import Any

from benchmarks.reports import markdown


def section(results: dict[str, Any]) -> str:
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
