"""Two models in Flax Linen, written as one writes them who knows nothing of adapters."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict

from benchmarks import cases
from benchmarks.cases import Case, Noise

EPSILON = 1e-6
Cache = tuple[jax.Array, jax.Array]


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


def dense(case: Case, width: int, name: str) -> nn.Dense:
    """A product as both models have it."""
    dtype = jnp.dtype(case.dtype)
    use_bias = case.model == "encoder"
    return nn.Dense(width, use_bias, dtype=dtype, param_dtype=dtype, name=name)


def norm(case: Case, name: str) -> nn.Module:
    """A norm as the model has it."""
    dtype = jnp.dtype(case.dtype)
    cls = nn.LayerNorm if case.model == "encoder" else nn.RMSNorm
    return cls(epsilon=EPSILON, dtype=dtype, param_dtype=dtype, name=name)


def embed(case: Case, count: int, name: str) -> nn.Embed:
    """Embeddings."""
    dtype = jnp.dtype(case.dtype)
    return nn.Embed(count, case.width, dtype=dtype, param_dtype=dtype, name=name)


def queries_keys_values(case: Case, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of ``(batch, length, width)``."""
    q, k = dense(case, case.width, "q")(x), dense(case, case.kv_width, "k")(x)
    return q, k, dense(case, case.kv_width, "v")(x)


class EncoderLayer(nn.Module):
    """A layer of BERT: norms after the sums, biases, gelu."""

    case: Case

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(batch, length, width)`` to the same."""
        case = self.case
        y = attend(case, *queries_keys_values(case, x))
        x = norm(case, "norm_1")(x + dense(case, case.width, "o")(y))
        y = nn.gelu(dense(case, case.ff, "up")(x), approximate=False)
        return norm(case, "norm_2")(x + dense(case, case.width, "down")(y))


class Encoder(nn.Module):
    """A small BERT with the mean of its tokens and two classes."""

    case: Case

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """``(batch, length)`` to logits ``(batch, 2)``."""
        case = self.case
        x = embed(case, case.vocab, "embed")(ids)
        x = x + embed(case, ids.shape[1], "positions")(jnp.arange(ids.shape[1]))
        x = norm(case, "norm")(x)
        layer = nn.remat(EncoderLayer) if case.remat else EncoderLayer
        for i in range(case.layers):
            x = layer(case, name=f"layers_{i}")(x)
        return dense(case, 2, "head")(x.mean(1))


class DecoderLayer(nn.Module):
    """A layer of Llama: RMS norms before, no biases, gated silu."""

    case: Case

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: Cache | None = None, position: Any = None
    ) -> tuple[jax.Array, Cache | None]:
        """``(batch, length, width)`` to the same, and the cache."""
        case = self.case
        heads = queries_keys_values(case, norm(case, "norm_1")(x))
        if cache is None:
            y = attend(case, *heads)
        else:
            y, cache = attend_cached(case, *heads, cache, position)
        x = x + dense(case, case.width, "o")(y)
        y = norm(case, "norm_2")(x)
        y = nn.silu(dense(case, case.ff, "gate")(y)) * dense(case, case.ff, "up")(y)
        return x + dense(case, case.width, "down")(y), cache


class Decoder(nn.Module):
    """A small Llama."""

    case: Case

    @nn.compact
    def __call__(
        self, ids: jax.Array, caches: tuple[Cache, ...] | None = None, position: Any = None
    ) -> Any:
        """``(batch, length)`` to logits ``(batch, length, vocab)``.

        With a cache for each layer, to the logits of the last token, ``(batch, vocab)``, and to the
        caches.
        """
        case = self.case
        table = embed(case, case.vocab, "embed")
        x, new = table(ids), []
        layer = nn.remat(DecoderLayer) if case.remat else DecoderLayer
        for i in range(case.layers):
            cache = None if caches is None else caches[i]
            x, cache = layer(case, name=f"layers_{i}")(x, cache, position)
            new.append(cache)
        x = norm(case, "norm")(x if caches is None else x[:, -1])
        logits = table.attend(x) if case.tied else dense(case, case.vocab, "head")(x)
        return logits if caches is None else (logits, tuple(new))


def make(case: Case) -> nn.Module:
    """The model of a case."""
    return Encoder(case) if case.model == "encoder" else Decoder(case)


def params(case: Case) -> dict[str, Any]:
    """The weights of a case, for `make(case)`."""
    return unflatten_dict(array_of(cases.weights(case), jnp.dtype(case.dtype)), sep="/")


def factors(
    case: Case, dtype: Any = jnp.float32, stack: tuple[int, ...] = ()
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """``U`` and ``V`` for the path of each kernel."""
    return array_of(cases.factors(case, stack), dtype)


def array_of(tree: Any, dtype: Any) -> Any:
    """Arrays of noise, made where jax computes."""

    def one(noise: Noise) -> jax.Array:
        # The seed is traced, so that there is one program for each shape.
        array: jax.Array = filled(noise.seed, noise._replace(seed=0), jnp.dtype(dtype))
        return array

    return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, Noise))


@functools.partial(jax.jit, static_argnums=(1, 2))
def filled(seed: jax.Array, noise: Noise, dtype: Any) -> jax.Array:
    """Noise as an array."""
    index = jnp.arange(math.prod(noise.shape), dtype=jnp.int32).reshape(noise.shape)
    numbers = noise._replace(seed=seed).integers(index).astype(jnp.float32)
    return (numbers * jnp.float32(noise.step) + jnp.float32(noise.mean)).astype(dtype)


def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy, in float32."""
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
