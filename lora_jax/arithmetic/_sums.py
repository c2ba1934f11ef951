"""The weighted sum of adapters of one kernel, exact and by their factors.

Of LoRAs, ``sum_i w_i s_i U_i V_i`` has the factors side by side. So has a sum with DoRAs in it, or
with any variant in its normal form: with ``a_i = m_i / ||W + s_i U_i V_i||_c``, and 1 for LoRA, an
adapter changes ``W`` by ``(a_i - 1) W + a_i s_i U_i V_i``, hence

    W + sum_i w_i (W'_i - W) = c W + U Z,   c = 1 + sum_i w_i (a_i - 1)
    U = [U_1 ... U_n],  Z = [w_1 a_1 s_1 V_1; ...; w_n a_n s_n V_n]

and this is the DoRA of ``U``, ``V = Z / c`` and ``m = c ||W + U V||_c``: a number ``a`` or ``c``
for each column. No singular value is needed, and the rank is the sum of the ranks. (After
:func:`lora_jax.cache_norm` ``a`` is there already, and if it is for all, ``c`` takes its place.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from lora_jax.core._adapter import Adapter
from lora_jax.core._numerics import column_norm, float32_or_more, product
from lora_jax.core.variants._apply_variant import known, low_rank_form
from lora_jax.core.variants._cached_norm import CachedNorm
from lora_jax.core.variants._dora import DoRA
from lora_jax.core.variants._lora import LoRA
from lora_jax.core.variants._variant import NormalForm


class Sum(NamedTuple):
    """``W' = c W + U Z``.

    Attributes:
      U: ``(*stack, d, r)``.
      Z: ``(*stack, r, k)``.
      c: ``(*stack, k)``, or ``None`` where it is 1, as for LoRA.
    """

    U: Any
    Z: Any
    c: Any


@jax.jit
def weighted(nodes: Sequence[Adapter], weights: Sequence[Any], W: chex.Array | None) -> Sum:
    """``W + sum_i w_i (W'_i - W)``.

    Args:
      nodes: the adapters.
      weights: ``w_i``.
      W: ``(*stack, d, k)`` in float32; LoRA does not need it.
    """
    left, Z, change, size = [], [], [], []
    for node, w in zip(nodes, weights, strict=True):
        a, L, R = _form(node, W)
        left.append(jnp.asarray(L))
        if a is None:
            Z.append((w * node.scale) * jnp.asarray(R))
        else:
            Z.append((w * node.scale) * a[..., None, :] * R)
            change.append(w * (a - 1))
            size.append(jnp.abs(w) * (jnp.abs(a) + 1))
    U = jnp.concatenate(left, axis=-1)
    both = jnp.concatenate(Z, axis=-2)
    if not change:
        return Sum(U, both, None)
    # Where nothing of W is left but U Z is, V = Z / c would be infinite: W's share is then what
    # rounding leaves of the terms that cancel.
    c, least = 1 + sum(change), 2.0**-24 * (1 + sum(size))
    stuck = (jnp.abs(c) < least) & jnp.any(both != 0, axis=-2)
    return Sum(U, both, jnp.where(stuck, least, c))


def folded(total: Sum) -> Sum:
    """The same with a rank of at most ``min(d, k)``, where the factors have more columns."""
    U, Z, c = total
    *_, d, r = U.shape
    k = Z.shape[-1]
    if r <= min(d, k):
        return total
    both, stack = product(U, Z), U.shape[:-2]
    if d <= k:
        return Sum(jnp.broadcast_to(jnp.eye(d, dtype=U.dtype), (*stack, d, d)), both, c)
    return Sum(both, jnp.broadcast_to(jnp.eye(k, dtype=U.dtype), (*stack, k, k)), c)


def plain_factors(node: Adapter) -> tuple[chex.Array, chex.Array] | None:
    """``U`` and ``V`` of a change ``s U V`` that does not depend on the kernel; else ``None``."""
    sizes = node.matrix_sizes()
    found = sizes and known(node.variant, *sizes[-2:], node.rank, exact=True)
    if not found or found.has_a or found.left is None or found.right is None:
        return None
    return node.arrays[found.left], node.arrays[found.right]


def _form(node: Adapter, W: chex.Array | None) -> NormalForm:
    """``a, L, R`` of an adapter; ``a`` is 1 for a column of norm 0, which is 0 whatever it is."""
    factors = plain_factors(node)
    if factors is not None:
        return NormalForm(None, *factors)
    if isinstance(node.variant, CachedNorm):
        return NormalForm(node.m, node.U, node.V)
    assert W is not None
    form = low_rank_form(node.variant, W, node.scale, node.arrays, exact=True)
    if form.a is None:
        return form
    norm = column_norm(W + node.scale * product(form.L, form.R))
    return form._replace(a=jnp.where(norm > 0, form.a, 1))


@jax.jit
def delta(total: Sum, W: chex.Array | None) -> chex.Array:
    """``W' - W``, dense."""
    both = product(total.U, total.Z)
    return both if total.c is None else (total.c - 1)[..., None, :] * W + both


@jax.jit
def as_adapter(total: Sum, W: chex.Array | None, like: Adapter) -> Adapter:
    """A sum as an adapter with ``s = 1``: LoRA, or what ``like`` is where it has a ``c``.

    Args:
      total: the sum.
      W: ``(*stack, d, k)`` in float32; LoRA does not need it.
      like: has all that is not of the sum, such as the axes.
    """
    U, Z = jnp.asarray(total.U, jnp.float32), jnp.asarray(total.Z, jnp.float32)
    rank = U.shape[-1]
    like = like.replace(rank=rank, alpha=float(rank), rslora=False)
    if total.c is None:
        return like.replace(arrays={"U": U, "V": Z}, variant=LoRA())
    assert W is not None
    c = jnp.asarray(total.c, W.dtype)
    V = (Z / jnp.where(c == 0, 1, c)[..., None, :]).astype(jnp.float32)
    norm = column_norm(W + product(U.astype(W.dtype), V.astype(W.dtype)))
    variant = like.variant if type(like.variant) in (CachedNorm, DoRA) else DoRA()
    m = c if isinstance(variant, CachedNorm) else c * norm
    return like.replace(arrays={"U": U, "V": V, "m": m}, variant=variant)


def matrix_of(kernel: Any, node: Adapter) -> chex.Array:
    """The adapted matrices ``(*stack, d, k)`` of a kernel, in float32."""
    array = jnp.asarray(kernel)
    return node.axes.as_matrix(array.astype(float32_or_more(array.dtype)))
