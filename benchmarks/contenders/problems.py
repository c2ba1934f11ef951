"""The contenders that train in JAX, by name."""

import functools
from collections.abc import Callable

from benchmarks.contenders import gemma, nnx, qwix
from benchmarks.contenders.baselines import floor, full
from benchmarks.contenders.by_hand import lora_plain, merge
from benchmarks.contenders.ours import library, library_nnx
from benchmarks.contenders.training import Problem
from benchmarks.models.cases import Case

PROBLEMS: dict[str, Callable[[Case], Problem]] = {
    "floor": floor,
    "full": full,
    "lora": functools.partial(library, variant="lora"),
    "lora-factored": functools.partial(library, variant="lora", product="factored"),
    "lora-outer": functools.partial(library, variant="lora", product="outer"),
    "lora-merged": functools.partial(library, variant="lora", product="dense"),
    "dora": functools.partial(library, variant="dora"),
    "dora-outer": functools.partial(library, variant="dora", product="outer"),
    "dora-detached": functools.partial(library, variant="dora", detach_norm=True),
    "lora-in-nnx": functools.partial(library_nnx, variant="lora"),
    "dora-in-nnx": functools.partial(library_nnx, variant="dora"),
    "lora-plain": lora_plain,
    "merge": merge,
    "qwix": qwix.lora,
    "gemma-peft": gemma.lora,
    "nnx-lora": nnx.lora,
}
