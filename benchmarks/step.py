"""What a contender is, whatever it is written with. Needs no framework."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

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
    "lora-plain": "lora",
    "merge": "lora",
    "qwix": "lora",
    "gemma-peft": "lora",
    "nnx-lora": "lora",
    "peft-lora": "lora",
    "peft-lora-autocast": "lora",
    "peft-lora-compiled": "lora",
    "dora": "dora",
    "dora-outer": "dora",
    "dora-detached": "dora",
    "peft-dora": "dora",
    "peft-dora-autocast": "dora",
    "peft-dora-compiled": "dora",
    "attention": "attention",
    # Those that serve (`benchmarks.serving`): the first answers are the same.
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
    ("lora", "lora-plain", "merge", "qwix", "peft-lora"),
    ("nnx-lora", "gemma-peft"),
    ("dora-detached", "peft-dora"),
)
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 1e-4
FIRST_STEPS = 3


@dataclasses.dataclass
class Step:
    """A contender, of which nothing is compiled yet.

    Attributes:
      jobs: what can be timed, by its name: a call, to the end of its computation, that says the
        loss, or a number that depends on all that it computes. A contender that trains has
        ``"step"``, one step of AdamW.
      facts: what is known without running.
      compile: makes all jobs ready, and adds to the facts.
      memory: bytes on the device at most, where that is known.
      repeats: how often a call of a job does its work, where that is more than once.
    """

    jobs: dict[str, Callable[[], float]]
    facts: dict[str, Any]
    compile: Callable[[], None] = lambda: None
    memory: Callable[[], dict[str, int]] = dict
    repeats: Mapping[str, int] = dataclasses.field(default_factory=dict)


def build(contender: str, case: Any) -> Step:
    """The contender by its name; imports its framework only now.

    Raises:
      ImportError: what it needs is not installed.
    """
    contenders: dict[str, Callable[[Any], Step]]
    if contender.startswith(("torch", "peft")):
        from benchmarks.contenders_torch import CONTENDERS as contenders
    elif contender == "attention":
        from benchmarks.attention import CONTENDERS as contenders
    elif contender.startswith("serve"):
        from benchmarks.serving import CONTENDERS as contenders
    else:
        from benchmarks.contenders import CONTENDERS as contenders
    return contenders[contender](case)
