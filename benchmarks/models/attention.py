"""Attention in JAX, for the models in Linen and in NNX, with a cache or without."""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.models.cases import Case

Cache = tuple[jax.Array, jax.Array]  # keys and values, (batch, size, heads, features)


def attend(case: Case, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of ``(batch, length, width)``; a decoder's is causal, with rotary positions."""
    q, k, v = (heads_of(case, x) for x in (q, k, v))
    if causal := case.model == "decoder":
        q, k = rotary(q), rotary(k)
    return attention(case, q, k, v, causal)


def attend_cached(
    case: Case, q: jax.Array, k: jax.Array, v: jax.Array, cache: Cache, position: Any
) -> tuple[jax.Array, Cache]:
    """The same with a cache, which is written, and read where there is one token.

    Args:
      case: with the heads.
      q: ``(batch, length, width)``.
      k: likewise.
      v: likewise.
      cache: keys and values, ``(batch, size, heads, features)``.
      position: of the first of these tokens; 0 where there are more than one.
    """
    q, k, v = (heads_of(case, x) for x in (q, k, v))
    q, k = rotary(q, position), rotary(k, position)
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(old, new, position, 1)
        for old, new in zip(cache, (k, v), strict=True)
    )
    if q.shape[1] > 1:
        return attention(case, q, k, v, True), (keys, values)
    seen = jnp.arange(keys.shape[1]) <= position
    out = jax.nn.dot_product_attention(q, keys, values, mask=seen[None, None, None])
    return out.reshape(*out.shape[:2], -1), (keys, values)


def heads_of(case: Case, x: jax.Array) -> jax.Array:
    """``(batch, length, heads, features)``."""
    return x.reshape(*x.shape[:2], -1, case.head_features)


def attention(case: Case, q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    """Attention of ``(batch, length, heads, features)``, to ``(batch, length, width)``."""
    if case.attention == "einsum":
        out = einsum_attention(q, k, v, causal)
    else:
        implementation: Any = case.attention
        out = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=implementation)
    return out.reshape(*out.shape[:2], -1)


def einsum_attention(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    """Attention as two products.

    Heads are in front of positions in both products: on CPUs that is much faster than the same
    sums over ``(batch, length, heads, features)``.
    """
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    logits = jnp.einsum("bhqd,bhkd->bhqk", q * q.shape[-1] ** -0.5, k)
    if causal:
        seen = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        logits = jnp.where(seen, logits, jnp.finfo(logits.dtype).min)
    shares = jax.nn.softmax(logits.astype(jnp.float32)).astype(v.dtype)
    return jnp.einsum("bhqk,bhkd->bhqd", shares, v).swapaxes(1, 2)


def rotary(x: jax.Array, position: Any = 0) -> jax.Array:
    """Rotary positions of ``(batch, length, heads, features)``, from a position on."""
    half = x.shape[-1] // 2
    positions = position + jnp.arange(x.shape[1])
    angles = positions[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = (f(angles)[:, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
