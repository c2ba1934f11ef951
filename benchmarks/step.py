"""What a contender is, whatever it is written with. Needs no framework."""

import dataclasses
from collections.abc import Callable
from typing import Any

# Contenders of one family train the same numbers, and the first loss is the same.
FAMILIES = {
    "floor": "floor",
    "full": "full",
    "torch-full": "full",
    "lora": "lora",
    "lora-plain": "lora",
    "merge": "lora",
    "qwix": "lora",
    "gemma-peft": "lora",
    "nnx-lora": "lora",
    "peft-lora": "lora",
    "dora": "dora",
    "dora-detached": "dora",
    "peft-dora": "dora",
}
# Contenders of one group have the same gradients too, so that the losses of all steps are the same.
# nnx and gemma know no scale, and so their V learns at another rate.
TRAJECTORIES = (
    ("full", "torch-full"),
    ("lora", "lora-plain", "merge", "qwix", "peft-lora"),
    ("nnx-lora", "gemma-peft"),
    ("dora-detached", "peft-dora"),
)
TORCH = ("torch-full", "peft-lora", "peft-dora")
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 1e-4
FIRST_STEPS = 3


@dataclasses.dataclass
class Step:
    """A contender that is ready to run.

    Attributes:
      run: one step of AdamW; the loss before it.
      forward: the loss, without a gradient.
      facts: what is known without running.
      merge: makes plain parameters, where a contender can.
    """

    run: Callable[[], float]
    forward: Callable[[], float]
    facts: dict[str, Any]
    merge: Callable[[], None] | None = None


def build(contender: str, case: Any) -> Step:
    """The contender by its name; imports its framework only now.

    Raises:
      ImportError: what it needs is not installed.
    """
    if contender in TORCH:
        from benchmarks.contenders_torch import CONTENDERS
    else:
        from benchmarks.contenders import CONTENDERS
    return CONTENDERS[contender](case)
