"""Numerics that the formulas share: column norms, exact products, dtypes, broadcasting."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp


def column_norm(W: chex.Array) -> chex.Array:
    """``||W||_c``: the Euclidean norm of every column, ``(..., d, k) -> (..., k)``.

    An all-zero column has norm 0 and gradient 0, where plain differentiation gives NaN.

    Example:
      >>> column_norm(jnp.array([[3.0, 0.0], [4.0, 0.0]]))
      Array([5., 0.], dtype=float32)
    """
    return safe_sqrt(jnp.sum(jnp.square(W), axis=-2))


def safe_sqrt(x: chex.Array) -> chex.Array:
    """The square root, with value and gradient 0 where ``x`` is not positive."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def magnitude_ratio(m: chex.Array, norm: chex.Array) -> chex.Array:
    """``m / norm``, and ``m`` where the norm is 0: the column that it scales is 0 there."""
    return m / jnp.where(norm > 0, norm, 1)


def not_zero(a: chex.Array) -> chex.Array:
    """``a``, with ``1e-20`` in place of 0, with the same derivative: for what divides by it.

    No result that ``a`` is multiplied with changes by it, as that is of the size of 1.
    """
    tiny = jnp.where(jnp.abs(a) < 1e-20, 1e-20 - a, 0)
    return a + jax.lax.stop_gradient(tiny)


def product(U: chex.Array, V: chex.Array) -> chex.Array:
    """``U V`` at full precision, whatever the accelerator's default for matrix products."""
    return jnp.matmul(U, V, precision=jax.lax.Precision.HIGHEST)


def float32_or_more(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype, or float32 where it has 16 bits or less.

    Not by ``jnp.promote_types``: users may have told JAX to refuse to mix dtypes.
    """
    return jnp.dtype(dtype) if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)


def along(a: chex.Array, y: chex.Array) -> chex.Array:
    """``a``, which has the last axes of ``y``, with as many axes as ``y``.

    Not left to broadcasting: users may have told JAX to refuse arrays of fewer axes.
    """
    return jnp.expand_dims(a, tuple(range(y.ndim - a.ndim)))


def known_tangent(tangent: Any) -> Any:
    """A tangent of a ``jax.custom_jvp`` with symbolic zeros, or ``None`` where it is zero."""
    zero = isinstance(tangent, jax.custom_derivatives.SymbolicZero)
    return None if zero or tangent is None else tangent
