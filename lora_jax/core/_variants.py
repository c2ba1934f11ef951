"""LoRA and DoRA as the papers write them: the reference that everything else must equal.

``W`` is a Flax kernel of shape ``(d, k)``, input first, and a layer computes ``y = x W``. ``U``
is ``(d, r)``, ``V`` is ``(r, k)``, ``m`` is ``(k,)``, ``s`` a number; all may have the same batch
axes in front.

The norm ``||.||_c`` of DoRA is one norm for each column of ``W``, which is one for each *output
feature*: axis ``-2`` here. PyTorch stores weights ``(out, in)``, so that there the same norm
reads ``dim=1``.

A new variant gives the two functions of :class:`Variant` and an entry in ``VARIANTS``; one whose
``a`` is not its ``m`` also gives ``a``, in ``products/_norm.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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


def safe_sqrt(x: chex.Array) -> chex.Array:
    """The square root, with value and gradient 0 where ``x`` is not positive."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def magnitude_ratio(m: chex.Array, norm: chex.Array) -> chex.Array:
    """``m / norm``, and ``m`` where the norm is 0: the column that it scales is 0 there."""
    return m / jnp.where(norm > 0, norm, 1)


def product(U: chex.Array, V: chex.Array) -> chex.Array:
    """``U V`` at full precision, whatever the accelerator's default for matrix products."""
    return jnp.matmul(U, V, precision=jax.lax.Precision.HIGHEST)


def lora_kernel(
    W: chex.Array,
    U: chex.Array,
    V: chex.Array,
    m: chex.Array | None,
    s: float,
    detach_norm: bool,
) -> chex.Array:
    """LoRA (Hu et al. 2021, equation 3): ``W' = W + s U V``."""
    del m, detach_norm
    return W + s * product(U, V)


def dora_kernel(
    W: chex.Array,
    U: chex.Array,
    V: chex.Array,
    m: chex.Array | None,
    s: float,
    detach_norm: bool,
) -> chex.Array:
    """DoRA (Liu et al. 2024, equation 5): ``W' = m (W + s U V) / ||W + s U V||_c``."""
    assert m is not None
    adapted = W + s * product(U, V)
    norm = column_norm(adapted)
    if detach_norm:
        norm = jax.lax.stop_gradient(norm)
    return magnitude_ratio(m, norm)[..., None, :] * adapted


def scaled_kernel(
    W: chex.Array,
    U: chex.Array,
    V: chex.Array,
    m: chex.Array | None,
    s: float,
    detach_norm: bool,
) -> chex.Array:
    """DoRA whose norm is already computed: ``W' = a (W + s U V)``, and ``m`` holds ``a``.

    :func:`lora_jax.cache_norm` makes it, ``a = m / ||W + s U V||_c``, for inference.
    """
    assert m is not None
    return m[..., None, :] * lora_kernel(W, U, V, None, s, detach_norm)


def no_scaling(W: chex.Array) -> chex.Array:
    """The ``a`` that changes nothing: 1 for every column."""
    return jnp.ones((*W.shape[:-2], W.shape[-1]), W.dtype)


class Variant(NamedTuple):
    """What a variant must give.

    Attributes:
      magnitude: ``m`` at the start, ``(..., d, k) -> (..., k)``, or ``None`` where the variant
        has no ``m``.
      kernel: ``W'`` from ``(W, U, V, m, s, detach_norm)``.
      trained: whether a rule may ask for it.
    """

    magnitude: Callable[[chex.Array], chex.Array] | None
    kernel: Callable[
        [chex.Array, chex.Array, chex.Array, chex.Array | None, float, bool], chex.Array
    ]
    trained: bool = True


VARIANTS = {
    "lora": Variant(magnitude=None, kernel=lora_kernel),
    "dora": Variant(magnitude=column_norm, kernel=dora_kernel),
    "scaled": Variant(magnitude=no_scaling, kernel=scaled_kernel, trained=False),
}
