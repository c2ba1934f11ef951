"""Products with a kernel of 16 bits, at full precision, without a copy of it in float32.

A number of float32 is the sum of three of bfloat16, each the rest of those before it:

    A = A_1 + A_2 + A_3

``W`` is a matrix of bfloat16 as it is. So ``[A_1; A_2; A_3] W`` is one product of bfloat16, which
accelerators sum up in float32, and loses no more than a product of float32 numbers does.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from lora_jax._compat import defined_bilinear, wide_product


def exact_product(A: chex.Array, W: chex.Array) -> chex.Array:
    """``A W`` at full precision: ``(*stack, q, n), (*stack, n, k) -> (*stack, q, k)``.

    Args:
      A: in float32 or more.
      W: in any dtype.

    Example:
      >>> third = jnp.full((1, 3), 1 / 3)
      >>> float(exact_product(third, jnp.ones((3, 1), jnp.bfloat16))[0, 0])
      1.0
    """
    if (A.dtype, W.dtype) == (jnp.float32, jnp.bfloat16):
        return _product(A, W)
    return wide_product(A, W)


def split(A: chex.Array) -> chex.Array:
    """``[A_1; A_2; A_3]``: ``(*stack, q, n) -> (*stack, 3 q, n)``."""
    parts = []
    for _ in range(3):
        # Else XLA may take what is rounded and widened again for what it was.
        part = jax.lax.reduce_precision(A, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        A = jnp.where(jnp.isfinite(part), A - part, 0)  # nothing is left of infinity
    return jnp.concatenate(parts, axis=-2)


def _split_product(A: chex.Array, W: chex.Array, transposed: bool) -> chex.Array:
    *stack, q, _ = A.shape
    batch = tuple(range(W.ndim - 2))
    dims = (((A.ndim - 1,), (W.ndim - (1 if transposed else 2),)), (batch, batch))
    precision = jax.lax.Precision.DEFAULT
    out = jax.lax.dot_general(
        split(A), W, dims, precision=precision, preferred_element_type=jnp.float32
    )
    return jnp.sum(jnp.reshape(out, (*stack, 3, q, out.shape[-1])), axis=-3)


# CPUs have no arithmetic of 16 bits: they multiply in float32 in any case.
_product = defined_bilinear(_split_product, {"cpu": wide_product})
