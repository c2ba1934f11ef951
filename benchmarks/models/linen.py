"""Two models in Flax Linen, written with no thought of adapters: BERT's layers and Llama's."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import lora_jax
from benchmarks.models.attention import Cache, attend, attend_cached
from benchmarks.models.cases import EPSILON, Case


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


def rematerialised(case: Case, layer: Any, **options: Any) -> Any:
    """A layer that is computed again for its gradient."""
    return nn.remat(layer, policy=lora_jax.save_only_xU if case.save_xU else None, **options)


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
        layer = rematerialised(case, EncoderLayer) if case.remat else EncoderLayer
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
        layer = rematerialised(case, DecoderLayer) if case.remat else DecoderLayer
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
