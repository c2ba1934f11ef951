"""What a computation is chosen by, for each platform, and what measured it.

No number here changes a result by more than rounding. On a GPU or TPU none of these choices has
been timed yet: but for what is exact they have what a CPU has, until the command is run there.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Of one platform.

    Attributes:
      exact_float32: whether products of float32 numbers are computed as such by default. Where they
        are not, ``K = a (W + s U V)`` would lose a small update.
      dense_rows: how many rows for each input make the dense product as fast as the factored one:
        ``python -m benchmarks.train_step --cases minilm --contenders lora-factored lora-merged
        --tokens 64 512 2048 8192``.
      copy: what gathering a number of the factors of an adapter takes, in multiplications of
        one-hot: ``python -m benchmarks.operations``.
      small: what one of the first multiplications of a gathered row takes, likewise.
      few: how many vectors of a row are its first.
    """

    exact_float32: bool
    dense_rows: float = 1.0
    copy: int = 4
    small: int = 5
    few: int = 16


TUNING = {
    "cpu": Tuning(exact_float32=True),
    "gpu": Tuning(exact_float32=False),
    "tpu": Tuning(exact_float32=False),
}
