"""About how much memory a contender needs, to know which fit into a GPU together."""

import math

from benchmarks.contenders.families import FAMILIES
from benchmarks.models.cases import Case, kernels, shapes

# Activations that are kept for the gradient: per token and layer, in units of width + feed-forward.
KEPT = {"full": 2.0, "floor": 2.0, "lora": 4.2, "dora": 6.0}
KEPT_IN_TORCH = {"full": 8.0, "lora": 13.0, "dora": 21.0}


def bytes_needed(contender: str, case: Case) -> float:
    """About the most that a contender holds.

    What the compiler of an H100 says of the 1B shapes (`compiled.memory_analysis()`), and a fifth
    and one GiB more; of PyTorch by a count of what its operations keep. XLA tries out products when
    it compiles, and what the allocator took for them it does not join to what is free: on an H100
    8.4 GiB did not fit into 11.5 for the floor. So there is room for the largest of them, twice.
    """
    size = 2 if case.dtype == "bfloat16" else 4
    base = size * sum(math.prod(shape) for shape in shapes(case).values())
    adapters = 4 * case.rank * sum(d + k for d, k in kernels(case).values())
    family, in_torch = FAMILIES[contender], contender.startswith(("torch", "peft"))
    logits = 4 * case.tokens * case.vocab
    room = 2.0**30
    if family == "attention":
        return 2 * room + 8 * size * case.tokens * case.length * case.heads
    if family.startswith("serve"):  # of all numbers of adapters at once, and of both jobs
        caches = 4 * size * case.layers * case.tokens * case.kv_width
        return room + 1.2 * (2 * base + 100 * adapters + 6 * caches + logits)
    kept = 1.0 if case.remat else (KEPT_IN_TORCH if in_torch else KEPT)[family]
    activations = kept * size * case.tokens * (case.width + case.ff)
    if case.attention != "cudnn" and not in_torch:
        # The attention weights, which cuDNN and PyTorch never hold.
        activations += 3 * size * case.tokens * case.length * case.heads
    state = 4 * base if family == "full" else base + 4 * adapters
    held = state + case.layers * activations + (3 if in_torch else 2) * logits
    return room + 1.2 * held + (0 if in_torch else 2 * logits)
