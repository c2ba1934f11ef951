"""What `python -m benchmarks.gpu` wrote, as tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.reports import markdown
from benchmarks.running import files

UNTIMED = (
    "**No GPU was timed.** `make bench-gpu` measures on one, and this section is made from what it "
    "writes."
)


def read(folder: Path) -> list[dict[str, Any]]:
    """All results of GPUs in a folder.

    Raises:
      ValueError: if a file is of a CPU, or of a rehearsal.
    """
    out = []
    for path in sorted(folder.glob("gpu-*.json")):
        result = files.read(path)
        if result["tiny"] or result["device"]["platform"] != "gpu":
            raise ValueError(
                f"{path} was not measured on a GPU, or in small, so that it says nothing about "
                f"GPUs: move it away."
            )
        out.append(result)
    return out


def section(results: Sequence[dict[str, Any]], figure: str) -> str:
    """What was measured, device by device; a sentence where nothing was.

    Args:
      results: of `read`.
      figure: path of the figure, from the page.
    """
    if not results:
        return UNTIMED
    parts = [f"![Time of a step on a GPU, as a multiple of the first contender's]({figure})"]
    devices: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        devices.setdefault(result["device"]["kind"], []).append(result)
    for kind, ones in devices.items():
        parts.append(f"### {kind}")
        parts += dict.fromkeys(place(result) for result in ones)
        for result in ones:
            parts.append(f"#### {result['title']} (`{result['name']}`)")
            if not result["complete"]:
                parts.append("Not all of it was measured.")
            for heat in result["heats"]:
                parts += heat_parts(heat)
    return "\n\n".join(parts)


def place(result: dict[str, Any]) -> str:
    """Device, versions and commit in words."""
    device, environment = result["device"], result["environment"]
    versions = ", ".join(
        f"{name} {version}"
        for name, version in environment["packages"].items()
        if version != "not installed"
    )
    driver = device.get("driver_version", "unknown")
    attention = result["attention"]["chosen"]
    return (
        f"Driver {driver}; {environment['date'][:10]}; commit {environment['commit'][:12]}; Python "
        f"{environment['python']}, {versions}. Attention in JAX: `{attention}`."
    )


def heat_parts(heat: dict[str, Any]) -> list[str]:
    """A heat: its shapes, its table, and who was left out."""
    contenders = heat["contenders"]
    reference = contenders[heat["reference"]]
    parts = [f"{heat['title']}: {markdown.shape(reference['case'])}.".removeprefix(": ")]
    measured = {label: one for label, one in contenders.items() if "jobs" in one}
    if measured:
        parts.append(times(measured, heat["reference"]))
    for label, one in contenders.items():
        for job, kernels in one.get("kernels", {}).items():
            rows = [
                [
                    f"`{row['name'][:80]}`",
                    markdown.digits(1e3 * row["seconds"]),
                    f"{row['calls']:g}",
                ]
                for row in kernels
            ]
            parts.append(markdown.table((f"{label}, {job}: kernel", "ms", "calls"), rows))
    missing = [
        f"- {markdown.title(label)}: {one.get('left_out') or one['error']}"
        for label, one in contenders.items()
        if "left_out" in one or "error" in one
    ]
    if missing:
        parts.append("Not measured:\n\n" + "\n".join(missing))
    return parts


def times(measured: dict[str, Any], reference: str) -> str:
    """The table of a heat: a line for each job of each contender."""
    header = (
        "",
        "ms",
        f"of {markdown.title(reference)} (quartiles)",
        "memory at most, GiB",
        "compile, s",
    )
    rows = []
    for label, one in measured.items():
        for i, (job, found) in enumerate(one["jobs"].items()):
            name = markdown.title(label) + ("" if job == "step" else f", {job}")
            peak = one["memory"].get("peak_device")
            rows.append(
                [
                    name,
                    markdown.milliseconds(found),
                    markdown.interval(found.get("to_reference")) if label != reference else "1",
                    f"{peak / 2**30:.1f}" if peak and i == 0 else "",  # of all jobs
                    compile_seconds(one["facts"], job),
                ]
            )
    return markdown.table(header, rows)


def compile_seconds(facts: dict[str, Any], job: str) -> str:
    """How long a program was compiled, if it was not compiled before in the same run."""
    program = facts.get("programs", {}).get(job, facts)
    if "compile_seconds" not in program or program.get("compiled_before"):
        return ""
    return f"{program['compile_seconds']:.1f}"


def ratios(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """For the figure: what is a multiple of the reference, by case."""
    out = {}
    for result in results:
        for heat in result["heats"]:
            name = ", ".join(filter(None, (result["name"], heat["title"])))
            found = {
                label if job == "step" else f"{label}, {job}": entry["to_reference"]
                for label, one in heat["contenders"].items()
                for job, entry in one.get("jobs", {}).items()
                if label != heat["reference"] and "to_reference" in entry
            }
            if found:
                out[f"{result['device']['kind']}: {name}"] = found
    return out
