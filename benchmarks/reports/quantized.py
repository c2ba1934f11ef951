"""What `python -m benchmarks.quantized` wrote, as a table."""

from typing import Any

from benchmarks.reports import markdown

VARIANTS = ("lora", "dora")


def section(results: dict[str, Any]) -> str:
    """A row for each kind: bytes and perplexity; and where it was trained on, what came of it."""
    trained = [one for kind in results.values() for one in kind.values() if isinstance(one, dict)]
    steps = max((one.get("steps", 0) for one in trained), default=0)
    rows = []
    for kind, found in results.items():
        cells = [
            f"`{kind}`",
            f"{found['bytes'] / 2**20:,.1f}",
            f"{found['bytes_to_bfloat16']:.3f}",
            f"{found['perplexity']:.1f}",
        ]
        for variant in VARIANTS:
            one = found.get(variant)
            cells.append("" if one is None else f"{one['perplexity_after']:.1f}")
        for variant in VARIANTS:
            one = found.get(variant)
            memory = one and (one["memory"]["arguments"] + one["memory"]["temporary"])
            cells.append("" if not memory else f"{memory / 2**20:,.0f}")
        rows.append(cells)
    header = ("", "MiB", "of bfloat16", "perplexity", f"LoRA, {steps} steps", "DoRA")
    table = markdown.table((*header, "MiB of a step, LoRA", "DoRA"), rows)
    text = (
        "The kernels of the linear layers in each kind: their bytes; the perplexity of held-out "
        "answers in the manner of the King James Bible, before training and after a few steps of "
        "an adapter of rank 8; and the memory of a step of 8 x 80 tokens by the compiler, "
        "arguments and temporary arrays, on CPUs."
    )
    return f"{text}\n\n{table}"
