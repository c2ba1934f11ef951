"""What is measured on a GPU: cases, the most telling first."""

import dataclasses
from collections.abc import Sequence

from benchmarks.contenders.families import FAMILIES
from benchmarks.models.cases import Case

# The shapes of Llama 3.2 1B and 3B, with the rank that PEFT compares methods with for the second:
# https://github.com/huggingface/peft, method_comparison/MetaMathQA. Its batches are 4 texts of 211
# tokens in the mean.
LLAMA_1B = Case(
    "Llama 3.2 1B",
    *("decoder", 2048, 8192, 32, 16, 4, 1024, 16, "bfloat16", 128_256),
    kv_heads=8,
    tied=True,
)
LLAMA_3B = Case(
    "Llama 3.2 3B",
    *("decoder", 3072, 8192, 24, 28, 4, 256, 32, "bfloat16", 128_256),
    kv_heads=8,
    tied=True,
    adapted=("q", "v"),
)
# all-MiniLM-L6-v2 as the demo trains it.
DEMO = Case("demo", *("encoder", 384, 1536, 12, 6, 32, 32, 8, "float32", 30_522))
# In small; with heads of keys and values and a tied head, as the large ones.
TINY = Case("tiny", *("decoder", 64, 96, 4, 1, 2, 16, 4, "bfloat16", 96), kv_heads=2, tied=True)


@dataclasses.dataclass(frozen=True)
class Heat:
    """Contenders that take turns with one reference.

    Attributes:
      title: what sets it apart from other heats of the case.
      entries: contender and case, by the label that is shown; the reference is the first.
      together: how many may be compiled at the same time, when the reference is. More are quicker,
        but what XLA tries out for one product is disturbed by the others.
    """

    title: str
    entries: dict[str, tuple[str, Case]]
    together: int = 4

    @property
    def reference(self) -> str:
        """With whom the others are compared."""
        return next(iter(self.entries))

    def family(self, label: str) -> str:
        """Those of one family compute the same."""
        contender, case = self.entries[label]
        family = FAMILIES[contender]
        return family if family in ("floor", "full") else f"{family} {case.rank}"


@dataclasses.dataclass(frozen=True)
class Race:
    """A case: a name for the command line and for the file, and its heats."""

    name: str
    title: str
    heats: tuple[Heat, ...]


def heat(case: Case, contenders: Sequence[str], title: str = "", together: int = 4) -> Heat:
    """Contenders of one case, under their own names."""
    return Heat(title, {name: (name, case) for name in contenders}, together)


OURS = ("floor", "lora", "dora", "full", "lora-plain", "dora-detached")
PRODUCTS = ("lora-factored", "lora-outer", "dora-outer", "lora-merged")
TORCH = ("torch-full", "peft-lora", "peft-dora")
AUTOCAST = ("peft-lora-autocast", "peft-dora-autocast")
COMPILED = ("torch-full-compiled", "peft-lora-compiled", "peft-dora-compiled")
SERVE = ("base", "merged", "lora", "dora", "gather", "one-hot", "ragged")


def races() -> tuple[Race, ...]:
    """All cases."""
    prompts = dataclasses.replace(LLAMA_1B, batch=32, length=128)
    return (
        Race(
            "decoder",
            "A step of training",
            (heat(LLAMA_1B, OURS, together=2),),
        ),
        Race(
            "peft",
            "The same step in PyTorch, with PEFT",
            (heat(LLAMA_1B, ("lora", "dora", "full", *TORCH, *AUTOCAST, *COMPILED)),),
        ),
        Race(
            "published",
            "The setting that PEFT publishes",
            (heat(LLAMA_3B, ("lora", "dora", "full", "floor", *TORCH)),),
        ),
        Race(
            "serve",
            "Many adapters in one batch",
            (heat(prompts, [f"serve-{name}" for name in SERVE]),),
        ),
        Race(
            "forms",
            "Other ways to compute the same step",
            (heat(LLAMA_1B, ("lora", *PRODUCTS, "qwix")),),
        ),
        Race(
            "remat",
            "A step of training with `nn.remat`",
            (heat(dataclasses.replace(LLAMA_1B, remat=True), (*OURS, "lora-outer", "dora-outer")),),
        ),
        Race("demo", "The demo's step", (heat(DEMO, (*OURS, *TORCH)),)),
        Race(
            "sweeps",
            "A step of training by tokens and by rank",
            (
                by_tokens(dataclasses.replace(LLAMA_1B, batch=1, length=256)),
                by_rank(LLAMA_1B, (4, 64, 256)),
                by_tokens(dataclasses.replace(LLAMA_1B, batch=16)),
            ),
        ),
    )


def tiny_races() -> tuple[Race, ...]:
    """The same cases in small, with fewer contenders: a minute on two cores."""
    q_and_v, remat = (
        dataclasses.replace(TINY, **change) for change in ({"adapted": ("q", "v")}, {"remat": True})
    )
    demo = dataclasses.replace(
        DEMO, width=32, ff=48, heads=4, layers=1, batch=4, length=8, vocab=64
    )
    prompts = dataclasses.replace(TINY, batch=8, length=8)
    heats = {
        "decoder": [heat(TINY, OURS)],
        "peft": [heat(TINY, ("lora", *TORCH, "peft-lora-autocast"))],
        "published": [heat(q_and_v, ("lora", "full", "peft-lora"))],
        "serve": [heat(prompts, [f"serve-{name}" for name in SERVE])],
        "forms": [heat(TINY, ("lora", *PRODUCTS[1:], "qwix"))],
        "remat": [heat(remat, ("floor", "dora"))],
        "demo": [heat(demo, ("floor", "lora"))],
        "sweeps": [
            by_tokens(dataclasses.replace(TINY, batch=1), ("floor", "lora")),
            by_rank(TINY, (2,), ("lora",)),
        ],
    }
    return tuple(dataclasses.replace(race, heats=tuple(heats[race.name])) for race in races())


def by_tokens(case: Case, contenders: Sequence[str] = ("floor", "lora", "dora")) -> Heat:
    """A heat with so many tokens."""
    return heat(case, contenders, f"{case.tokens:,} tokens")


def by_rank(case: Case, ranks: Sequence[int], contenders: Sequence[str] = ("lora", "dora")) -> Heat:
    """A heat of several ranks, which have one floor."""
    entries = {"floor": ("floor", case)}
    for rank in ranks:
        for name in contenders:
            entries[f"{name}, rank {rank}"] = (name, dataclasses.replace(case, rank=rank))
    return Heat("", entries)
