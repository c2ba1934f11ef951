"""Medians, quartiles, and ratios of what was measured in the same rounds."""

import statistics
from collections.abc import Sequence


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return dict.fromkeys(("low", "median", "high"), values[0])
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"low": low, "median": statistics.median(values), "high": high}


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """The ratio of the medians, with the quartiles of the ratios round by round."""
    paired = quartiles([a / b for a, b in zip(over, under, strict=True)])
    return {**paired, "median": statistics.median(over) / statistics.median(under)}
