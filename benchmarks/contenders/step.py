"""What a contender is, whatever it is written with. Needs no framework, and no other file."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

# Of AdamW, in every framework.
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 1e-4


@dataclasses.dataclass
class Step:
    """A contender that is built, but not compiled.

    Attributes:
      jobs: what can be timed, by its name: a call that computes to the end and returns the loss,
        or a number that depends on all that it computes. A contender that trains has
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
