"""How a kernel is quantized, as a user says it."""

from __future__ import annotations

import dataclasses

KINDS = ("int8", "int4", "nf4", "fp8")
# Those of 4 bits have one scale for this many numbers of a column, as in QLoRA.
BLOCK_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How a kernel is quantized.

    Attributes:
      kind: ``"int8"``, ``"int4"``, ``"nf4"`` (the 4-bit NormalFloat of QLoRA, Dettmers et al. 2023,
        section 3) or ``"fp8"`` (``float8_e4m3fn``).
      block_size: how many numbers of a column of ``W`` share a scale, or fewer, where a column is
        no multiple of it; 0 for whole columns. By default 64 for 4 bits, and 0 for 8.
      double_quant: whether the scales are quantized too, to 8 bits for 256 of them (QLoRA, section
        3). By default for 4 bits.

    Raises:
      TypeError: if a field is of another type.
      ValueError: if there is no such kind, or a block size is below 0.

    Example:
      >>> Quantization("nf4")
      Quantization(kind='nf4', block_size=64, double_quant=True)
      >>> Quantization("int8")
      Quantization(kind='int8', block_size=0, double_quant=False)
    """

    kind: str
    block_size: int | None = None
    double_quant: bool | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"There is no kind of quantization {self.kind!r}: it is one of {', '.join(KINDS)}."
            )
        four_bits = self.kind in ("int4", "nf4")
        size = (BLOCK_SIZE if four_bits else 0) if self.block_size is None else self.block_size
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"Quantization(block_size=...) must be an int, got {size!r}.")
        if size < 0:
            raise ValueError(f"Quantization(block_size={size}): it must not be below 0.")
        double = four_bits if self.double_quant is None else self.double_quant
        if not isinstance(double, bool):
            raise TypeError(f"Quantization(double_quant=...) must be a bool, got {double!r}.")
        object.__setattr__(self, "block_size", size)
        object.__setattr__(self, "double_quant", double)
