"""The numbers that codes stand for, in units of the scale of their block.

nf4     one of 16 quantiles of a normal distribution, from -1 to 1 (QLoRA, appendix E)
int8    -127 to 127
int4    -7 to 7
fp8     float8_e4m3fn, -448 to 448
"""

from __future__ import annotations

import itertools
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np

# The values of NF4, by their codes: QLoRA (Dettmers et al. 2023), appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# What the largest number of a block is in units of its scale.
LARGEST = {"nf4": 1.0, "int8": 127.0, "int4": 7.0, "fp8": 448.0}
# The code of int4 that stands for 0, as the codes are those of a half byte, 0 to 15.
_ZERO = 8


def is_packed(kind: str) -> bool:
    """Whether two codes are in one byte."""
    return kind in ("nf4", "int4")


def encode(kind: str, x: chex.Array) -> chex.Array:
    """The codes of numbers in units of their scale: those that stand for the nearest numbers.

    Args:
      kind: of quantization.
      x: the numbers, in float32 or more.

    Example:
      >>> encode("nf4", jnp.array([-1.0, 0.01, 0.9])), encode("int4", jnp.array([-7.0, 0.4]))
      (Array([ 0,  7, 15], dtype=uint8), Array([1, 8], dtype=uint8))
    """
    if kind == "nf4":
        code = jnp.zeros(x.shape, jnp.uint8)
        for low, high in itertools.pairwise(NF4):
            code = code + (x > (low + high) / 2).astype(jnp.uint8)
        return code
    limited = jnp.clip(x, -LARGEST[kind], LARGEST[kind])
    if kind == "fp8":
        return limited.astype(jnp.float8_e4m3fn)
    if kind == "int4":
        return (jnp.round(limited) + _ZERO).astype(jnp.uint8)
    return jnp.round(limited).astype(jnp.int8)


def decode(kind: str, codes: chex.Array, dtype: Any) -> chex.Array:
    """The numbers that codes stand for, in units of their scale.

    Args:
      kind: of quantization.
      codes: as :func:`encode` gives them; or of another library, which has integers as they are.
      dtype: of the numbers.

    Example:
      >>> decode("nf4", jnp.array([0, 7, 15], jnp.uint8), jnp.float32)
      Array([-1.,  0.,  1.], dtype=float32)
    """
    if kind == "nf4":
        return _chosen(codes.astype(jnp.uint8), np.array(NF4, dtype))
    values = codes.astype(dtype)
    return values - np.array(_ZERO, dtype) if kind == "int4" and codes.dtype == np.uint8 else values


def _chosen(codes: chex.Array, table: np.ndarray[Any, Any]) -> chex.Array:
    """``table[codes]``, by the bits of the codes: any compiler fuses that, but not a gather.

    Not by ``jnp.where`` of two numbers: each is a whole array to JAX, which a scan over layers
    computes once and keeps.
    """
    values: list[Any] = list(table)
    for bit in range(4):
        odd = ((codes >> np.uint8(bit)) & np.uint8(1)).astype(table.dtype)
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [odd * (high - low) + low for low, high in pairs]
    chosen: chex.Array = values[0]
    return chosen
