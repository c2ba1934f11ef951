"""Two models in Flax Linen, written as one writes them who knows nothing of adapters."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict

from benchmarks import cases
from benchmarks.cases import CASES, Case

__all__ = ["CASES", "Case", "Decoder", "Encoder", "loss", "make", "params"]

EPSILON = 1e-6


def attention(q: jax.Array, k: jax.Array, v: jax.Array, heads: int, causal: bool) -> jax.Array:
    """Attention of ``(batch, length, width)``; a causal one has rotary positions.

    Heads are in front of positions in both products: on CPUs that is much faster than the same
    sums over ``(batch, length, heads, features)``.
    """
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    if causal:
        q, k = rotary(q), rotary(k)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    logits = jnp.einsum("bhqd,bhkd->bhqk", q * q.shape[-1] ** -0.5, k)
    if causal:
        seen = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        logits = jnp.where(seen, logits, jnp.finfo(logits.dtype).min)
    shares = jax.nn.softmax(logits.astype(jnp.float32)).astype(v.dtype)
    out = jnp.einsum("bhqk,bhkd->bhqd", shares, v).swapaxes(1, 2)
    return out.reshape(*out.shape[:2], -1)


def rotary(x: jax.Array) -> jax.Array:
    """Rotary positions of ``(batch, length, heads, features)``."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = (f(angles)[:, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class EncoderLayer(nn.Module):
    """A layer of BERT: norms after the sums, biases, gelu."""

    heads: int
    ff: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(batch, length, width)`` to the same."""
        dense = functools.partial(nn.Dense, dtype=self.dtype, param_dtype=self.dtype)
        norm = functools.partial(
            nn.LayerNorm, epsilon=EPSILON, dtype=self.dtype, param_dtype=self.dtype
        )
        width = x.shape[-1]
        q, k, v = (dense(width, name=name)(x) for name in "qkv")
        y = dense(width, name="o")(attention(q, k, v, self.heads, causal=False))
        x = norm(name="norm_1")(x + y)
        y = nn.gelu(dense(self.ff, name="up")(x), approximate=False)
        return norm(name="norm_2")(x + dense(width, name="down")(y))


class Encoder(nn.Module):
    """A small BERT with the mean of its tokens and two classes."""

    vocab: int
    width: int
    heads: int
    ff: int
    layers: int
    dtype: Any
    remat: bool = False

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """``(batch, length)`` to logits ``(batch, 2)``."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.dtype}
        x = nn.Embed(self.vocab, self.width, name="embed", **dtypes)(ids)
        positions = nn.Embed(ids.shape[1], self.width, name="positions", **dtypes)
        x = x + positions(jnp.arange(ids.shape[1]))
        x = nn.LayerNorm(epsilon=EPSILON, name="norm", **dtypes)(x)
        layer = nn.remat(EncoderLayer) if self.remat else EncoderLayer
        for i in range(self.layers):
            x = layer(self.heads, self.ff, self.dtype, name=f"layers_{i}")(x)
        return nn.Dense(2, name="head", **dtypes)(x.mean(1))


class DecoderLayer(nn.Module):
    """A layer of Llama: RMS norms before, no biases, gated silu."""

    heads: int
    ff: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(batch, length, width)`` to the same."""
        dense = functools.partial(
            nn.Dense, use_bias=False, dtype=self.dtype, param_dtype=self.dtype
        )
        norm = functools.partial(
            nn.RMSNorm, epsilon=EPSILON, dtype=self.dtype, param_dtype=self.dtype
        )
        width = x.shape[-1]
        y = norm(name="norm_1")(x)
        q, k, v = (dense(width, name=name)(y) for name in "qkv")
        x = x + dense(width, name="o")(attention(q, k, v, self.heads, causal=True))
        y = norm(name="norm_2")(x)
        y = nn.silu(dense(self.ff, name="gate")(y)) * dense(self.ff, name="up")(y)
        return x + dense(width, name="down")(y)


class Decoder(nn.Module):
    """A small Llama."""

    vocab: int
    width: int
    heads: int
    ff: int
    layers: int
    dtype: Any
    remat: bool = False

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """``(batch, length)`` to logits ``(batch, length, vocab)``."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.dtype}
        x = nn.Embed(self.vocab, self.width, name="embed", **dtypes)(ids)
        layer = nn.remat(DecoderLayer) if self.remat else DecoderLayer
        for i in range(self.layers):
            x = layer(self.heads, self.ff, self.dtype, name=f"layers_{i}")(x)
        x = nn.RMSNorm(epsilon=EPSILON, name="norm", **dtypes)(x)
        return nn.Dense(self.vocab, use_bias=False, name="head", **dtypes)(x)


def make(case: Case, remat: bool = False) -> nn.Module:
    """The model of a case."""
    cls = Encoder if case.model == "encoder" else Decoder
    return cls(
        case.vocab,
        case.width,
        case.heads,
        case.ff,
        case.layers,
        jnp.dtype(case.dtype),
        remat,
    )


def params(case: Case) -> dict[str, Any]:
    """The weights of a case, for `make(case)`."""
    dtype = jnp.dtype(case.dtype)
    # Copies, for what numpy made cannot be donated.
    flat = {path: jnp.array(value.astype(dtype, copy=False)) for path, value in cases.weights(case)}
    return unflatten_dict(flat, sep="/")


def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy, in float32."""
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
