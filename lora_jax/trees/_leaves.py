"""One leaf: its dtype, in a box or not, and whether it is floating-point and finite."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._compat import is_traced
from lora_jax.core._boxes import content


def dtype_of(leaf: Any) -> np.dtype[Any] | None:
    """The dtype of a leaf in or without a box; ``None`` where it is not one array."""
    array = content(leaf)
    if not hasattr(array, "shape"):
        return None
    try:
        dtype: np.dtype[Any] = jnp.dtype(array.dtype)
    except (AttributeError, TypeError):  # of another library, or a key
        return None
    return dtype


def check_floating(path: str, leaf: Any, what: str = "the base has") -> None:
    """Checks that a leaf is an array of real numbers, which the codes of a quantized base are not.

    Raises:
      TypeError: if it is not one array of numbers.
      ValueError: if the numbers are integers.
    """
    dtype = dtype_of(leaf)
    if dtype is None:
        raise TypeError(
            f"{what} {leaf!r} at {path!r}, which is not one array of numbers, nor quantized by "
            f"lora_jax.quantize or qwix: dequantize it first."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{what} {dtype} at {path!r}, which is not floating-point. Integers may be the codes "
            f"of a quantized base, whose scale is elsewhere: dequantize it first."
        )


def is_finite(array: Any) -> bool:
    """Whether all of an array is finite; what is traced or elsewhere can't be checked."""
    if is_traced(array) or not getattr(array, "is_fully_addressable", True):
        return True
    with jax.ensure_compile_time_eval():  # an array that a jitted function closes over is known
        return bool(jnp.isfinite(jnp.asarray(array)).all())
