"""A kernel that qwix has quantized, as a quantized leaf of ours: the same codes and scales.

Qwix keeps a kernel as a ``QArray`` of codes and scales with the kernel's axes, in a ``WithAux``
that says how. It is known by its attributes, so qwix need not be installed.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from lora_jax.core.quantized._array import QuantizedArray
from lora_jax.core.quantized._quantization import Quantization


def from_qwix(leaf: Any, path: str) -> Any:
    """A leaf of a base that qwix has quantized, as one of ours; any other leaf as it is.

    Args:
      leaf: a leaf of parameters.
      path: of the leaf.

    Raises:
      ValueError: if its codes stand for numbers that are not known here.
    """
    q = getattr(leaf, "array", leaf)
    if not all(hasattr(q, name) for name in ("qvalue", "scale", "qtype")):
        return leaf
    kind = _kind(q, path)
    columns = [n // s for n, s in zip(q.qvalue.shape, q.scale.shape, strict=True)]
    block_size = 0 if kind in ("int8", "fp8") else max(columns)
    return QuantizedArray(
        codes=q.qvalue.astype(jnp.uint8) if kind == "nf4" else q.qvalue,
        scale=q.scale,
        zero_point=q.zero_point,
        quantization=Quantization(kind, block_size, double_quant=False),
        kernel_dtype=jnp.dtype(q.scale.dtype),
    )


def _kind(q: Any, path: str) -> str:
    dtype = jnp.dtype(q.qvalue.dtype)
    plain = jnp.dtype(q.scale.dtype).itemsize > 1  # those of mxfp8 are powers of two in 8 bits
    if isinstance(q.qtype, str) and q.qtype == "nf4":
        return "nf4"
    if plain and jnp.issubdtype(dtype, jnp.signedinteger):
        return "int8" if dtype.itemsize == 1 and dtype.name == "int8" else "int4"
    if plain and dtype.name.startswith("float8"):
        return "fp8"
    raise ValueError(
        f"{path!r} is quantized by qwix as {q.qtype!r}, whose codes are not known here: quantize "
        f"the parameters by lora_jax.quantize, or by qwix to integers, nf4 or float8."
    )
