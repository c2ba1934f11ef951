"""What `python -m benchmarks.tpu` wrote, as tables."""

from typing import Any

from benchmarks.reports import markdown

# Names of counts, with their key in the results and their unit.
COUNTS = {
    "TFLOP": ("flops", 1e12),
    "GiB accessed": ("bytes_accessed", 2**30),
    "GiB temporary": ("temp_bytes", 2**30),
    "Mcycles, estimated": ("estimated_cycles", 1e6),
}


def section(results: dict[str, Any]) -> str:
    """What the TPU's compiler counts, and that in floors."""
    parts = []
    for name, result in results.items():
        contenders = result["contenders"]
        floor = contenders["floor"]
        empty = [""] * (2 * len(COUNTS) - 1)
        rows = []
        for key, one in contenders.items():
            if "error" in one:
                rows.append([markdown.title(key), one["error"].split(":")[0], *empty])
                continue
            cells = [markdown.title(key)]
            for count, unit in COUNTS.values():
                cells += [f"{one[count] / unit:.2f}", f"{one[count] / floor[count]:.3f}"]
            rows.append(cells)
        parts.append(f"### {name}\n\n{markdown.shape(result['case'])}.")
        header = ("", *(title for unit in COUNTS for title in (unit, "floors")))
        parts.append(markdown.table(header, rows))
    return "\n\n".join(parts)
