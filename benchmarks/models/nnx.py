"""The models of `benchmarks.models.linen` in Flax NNX; if wanted with `nnx.LoRALinear` in them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.models.attention import attend
from benchmarks.models.cases import EPSILON, Case


class Layer(nnx.Module):
    """A layer of either model; the decoder's has a gate."""

    def __init__(self, case: Case, rngs: nnx.Rngs, with_lora: bool) -> None:
        self.causal = case.model == "decoder"
        dtype, width, ff = jnp.dtype(case.dtype), case.width, case.ff
        # Adapters are float32, as by default, and computed with in the dtype of the layer.
        lora = {"lora_rank": case.rank, "lora_dtype": dtype} if with_lora else {}
        dense = functools.partial(
            nnx.LoRALinear if with_lora else nnx.Linear,
            use_bias=not self.causal,
            dtype=dtype,
            param_dtype=dtype,
            rngs=rngs,
            **lora,
        )
        norm = functools.partial(
            nnx.RMSNorm if self.causal else nnx.LayerNorm,
            epsilon=EPSILON,
            dtype=dtype,
            param_dtype=dtype,
            rngs=rngs,
        )
        self.case = case
        self.q, self.o = dense(width, width), dense(width, width)
        self.k, self.v = dense(width, case.kv_width), dense(width, case.kv_width)
        self.up, self.down = dense(width, ff), dense(ff, width)
        if self.causal:
            self.gate = dense(width, ff)
        self.norm_1, self.norm_2 = norm(width), norm(width)

    def attend(self, x: jax.Array) -> jax.Array:
        """Attention with its projections."""
        return self.o(attend(self.case, self.q(x), self.k(x), self.v(x)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(batch, length, width)`` to the same."""
        if self.causal:
            x = x + self.attend(self.norm_1(x))
            y = self.norm_2(x)
            return x + self.down(nnx.silu(self.gate(y)) * self.up(y))
        x = self.norm_1(x + self.attend(x))
        return self.norm_2(x + self.down(nnx.gelu(self.up(x), approximate=False)))


class Model(nnx.Module):
    """Either model."""

    def __init__(self, case: Case, rngs: nnx.Rngs, with_lora: bool) -> None:
        self.causal = case.model == "decoder"
        dtype = jnp.dtype(case.dtype)
        options = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.embed = nnx.Embed(case.vocab, case.width, **options)
        self.layers = nnx.List([Layer(case, rngs, with_lora) for _ in range(case.layers)])
        norm = nnx.RMSNorm if self.causal else nnx.LayerNorm
        self.norm = norm(case.width, epsilon=EPSILON, **options)
        if not self.causal:
            self.positions = nnx.Embed(case.length, case.width, **options)
        outputs = case.vocab if self.causal else 2
        self.head = nnx.Linear(case.width, outputs, use_bias=not self.causal, **options)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """``(batch, length)`` to logits."""
        x = self.embed(ids)
        if not self.causal:
            x = self.norm(x + self.positions(jnp.arange(ids.shape[1])))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x) if self.causal else x.mean(1))


def make(case: Case, with_lora: bool = False) -> Model:
    """The model of a case."""
    return Model(case, nnx.Rngs(0), with_lora)


def linen_path(path: tuple[Any, ...]) -> str:
    """``("layers", 0, "q", "kernel")`` as ``"layers_0/q/kernel"``."""
    return "/".join(map(str, path)).replace("layers/", "layers_")
