"""What `python -m benchmarks.mesh` wrote, as tables."""

from typing import Any

from benchmarks.reports import markdown

# Names of counts, with their key in the results and their unit.
COUNTS = {
    "GiB sent": ("sent_bytes", 2**30),
    "GiB temporary": ("temp_bytes", 2**30),
    "GiB held": ("held_bytes", 2**30),
}


def section(results: dict[str, Any]) -> str:
    """What the TPU's compiler counts on each chip, and that in steps of LoRA."""
    parts = []
    for name, result in results.items():
        contenders = result["contenders"]
        lora = contenders["lora"]
        rows = []
        for key, one in contenders.items():
            cells = [markdown.title(key)]
            for count, unit in COUNTS.values():
                if count in one:
                    cells += [f"{one[count] / unit:.2f}", f"{one[count] / lora[count]:.3f}"]
                else:
                    cells += ["", ""]
            rows.append(cells)
        parts.append(f"### {name}\n\n{markdown.shape(result['case'])}.")
        header = ("", *(title for unit in COUNTS for title in (unit, "of LoRA")))
        parts.append(markdown.table(header, rows))
    return "\n\n".join(parts)
