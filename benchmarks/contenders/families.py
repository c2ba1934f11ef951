"""Which contenders train the same numbers and compute the same losses. Needs no framework."""

import math
from collections.abc import Mapping

from benchmarks.models.cases import Case, kernels, shapes

# Contenders of one family train the same numbers, and the first loss is the same.
FAMILIES = {
    "floor": "floor",
    "full": "full",
    "torch-full": "full",
    "torch-full-compiled": "full",
    "lora": "lora",
    "lora-factored": "lora",
    "lora-outer": "lora",
    "lora-merged": "lora",
    "lora-in-nnx": "lora",
    "lora-plain": "lora",
    "merge": "lora",
    "qwix": "lora",
    "gemma-peft": "lora",
    "nnx-lora": "lora",
    "peft-lora": "lora",
    "peft-lora-autocast": "lora",
    "peft-lora-compiled": "lora",
    "dora": "dora",
    "dora-in-nnx": "dora",
    "dora-outer": "dora",
    "dora-detached": "dora",
    "peft-dora": "dora",
    "peft-dora-autocast": "dora",
    "peft-dora-compiled": "dora",
    "attention": "attention",
    # Those that serve (`benchmarks.contenders.serving`): the first answers are the same.
    "serve-base": "serve-base",
    "serve-merged": "serve-lora",
    "serve-lora": "serve-lora",
    "serve-gather": "serve-lora",
    "serve-one-hot": "serve-lora",
    "serve-ragged": "serve-lora",
    "serve-dora": "serve-dora",
}
# Contenders of one group have the same gradients too, so that the losses of all steps are the same.
# nnx and gemma know no scale, and so their V learns at another rate.
TRAJECTORIES = (
    ("full", "torch-full"),
    ("lora", "lora-in-nnx", "lora-plain", "merge", "qwix", "peft-lora"),
    ("nnx-lora", "gemma-peft"),
    ("dora", "dora-in-nnx"),
    ("dora-detached", "peft-dora"),
)


def trained(case: Case, family: str) -> int:
    """How many numbers a contender of a family of `FAMILIES` trains."""
    if family == "attention" or family.startswith("serve"):
        return 0
    if family == "floor":
        return case.width
    if family == "full":
        return sum(math.prod(shape) for shape in shapes(case).values())
    magnitudes = family == "dora"
    return sum(case.rank * (d + k) + magnitudes * k for d, k in kernels(case).values())


def check_losses(
    losses: Mapping[str, list[float]],
    tolerance: float,
    families: Mapping[str, str] = FAMILIES,
    exact: bool = False,
) -> None:
    """Checks that a family agrees on the first loss, and a group of `TRAJECTORIES` on all losses.

    Args:
      losses: of each contender; of those that serve, of each of their jobs.
      tolerance: relative.
      families: of each contender.
      exact: that rounding is small enough for the losses of later steps to agree too.

    Raises:
      RuntimeError: if two of them do not agree: then they do not compute the same.
    """
    same = {"floor": "full", "full": "full"}  # the base is the same
    groups: dict[str, list[str]] = {}
    for name in losses:
        groups.setdefault(same.get(families[name], families[name]), []).append(name)
    compared = [
        (names, None if family.startswith("serve") else 1) for family, names in groups.items()
    ]
    if exact:
        compared += [([n for n in group if n in losses], None) for group in TRAJECTORIES]
    for names, count in compared:
        # The longest first, so that what is compared is all that each has.
        names = sorted(names, key=lambda name: -len(losses[name]))
        for name in names[1:]:
            pairs = zip(losses[names[0]][:count], losses[name][:count], strict=False)
            for a, b in pairs:
                if not abs(a - b) <= tolerance * max(abs(a), abs(b)):
                    raise RuntimeError(
                        f"{name} does not compute what {names[0]} does: its first losses are "
                        f"{losses[name]}, not {losses[names[0]]}."
                    )
