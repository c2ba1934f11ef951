"""What `python -m benchmarks.train_step` wrote, as tables."""

from typing import Any

from benchmarks.reports import markdown


def section(results: dict[str, Any]) -> str:
    """Every case that is not swept, and then a table for each sweep."""
    parts, sweeps = [], {}
    for name, result in results.items():
        base, _, swept = name.partition(" ")
        if swept:
            sweeps.setdefault((base, swept.split("=")[0]), {})[swept] = result
        else:
            parts.append(case_part(name, result))
    parts += [sweep_part(base, field, swept) for (base, field), swept in sweeps.items()]
    return "\n\n".join(parts)


def case_part(name: str, result: dict[str, Any]) -> str:
    """A case: its shapes, how it was measured, its contenders, and pairs of them."""
    parts = [
        f"### {name}\n\n{markdown.shape(result['case'])}.",
        f"{result['rounds']} rounds of {result['steps']} steps, "
        f"{result['together']} contenders at most in memory at a time.",
        case_table(result),
    ]
    if result["pairs"]:
        rows = [[f"`{key}`", markdown.interval(value)] for key, value in result["pairs"].items()]
        parts.append(markdown.table(("time of a step", "ratio (quartiles)"), rows))
    return "\n\n".join(parts)


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


def sweep_part(base: str, field: str, swept: dict[str, dict[str, Any]]) -> str:
    """A case with several values of one field, side by side."""
    names = list(dict.fromkeys(n for result in swept.values() for n in result["contenders"]))
    rows = [["floor, ms", *(markdown.milliseconds(step_of(r, "floor")) for r in swept.values())]]
    for name in names:
        if name != "floor":
            steps = [step_of(result, name) for result in swept.values()]
            cells = [markdown.interval(step and step.get("to_floor")) for step in steps]
            rows.append([markdown.title(name), *cells])
    return "\n\n".join(
        [
            f"### {base}, by {field}",
            "The time of a step as a multiple of the floor's, which is in the first line in ms.",
            markdown.table(("", *swept), rows),
        ]
    )


def step_of(result: dict[str, Any], contender: str) -> dict[str, Any] | None:
    """The step of a contender, where it was measured."""
    step: dict[str, Any] | None = result["contenders"].get(contender, {}).get("step")
    return step


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
