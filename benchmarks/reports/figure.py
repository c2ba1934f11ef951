"""The figure of ratios that a page begins with."""

import io

from benchmarks.reports import markdown

OURS, OTHERS, TORCH = "#1f77b4", "#9aa5b1", "#d9a066"


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
