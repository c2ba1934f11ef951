"""Small models built like those that people use.

`Qwen3`, `Vit` and `Gemma3` are built like those of https://github.com/jax-ml/bonsai: the same
layers and names, the same way to call them. `Scanned` is built like the decoders that scan stacked
layers and name the axes of their kernels.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from nnx_zoo import List, Scan

WIDTH, HEADS, KV_HEADS, HEAD, HIDDEN, VOCABULARY = 16, 4, 2, 4, 24, 32


def named(sharded, *kernels):
    """The metadata that give kernels their shardings, where the model is sharded."""
    return [{"kernel_metadata": {"out_sharding": P(*k)}} if sharded else {} for k in kernels]


class Cache(nnx.Module):
    """Keys and values of one layer; it is an argument of the model's, which writes into it."""

    def __init__(self, batch, length, spec=None):
        zeros = partial(jnp.zeros, (batch, length, KV_HEADS, HEAD))
        self.k, self.v = (nnx.Cache(zeros(**kept(spec))) for _ in range(2))
        self.now = nnx.Variable(jnp.zeros((), jnp.int32))


def caches(batch, length, spec=None):
    return [Cache(batch, length, spec)]


def kept(spec):
    """`out_sharding`, which older JAX and Flax do not know, where it is said."""
    return {} if spec is None else {"out_sharding": spec}


def attend(q, k, v, cache):
    """Grouped attention to what the cache has, with the new keys and values written into it."""
    first, length = cache.now[...], q.shape[1]
    for variable, new in ((cache.k, k), (cache.v, v)):
        value = jax.lax.dynamic_update_slice(variable[...], new, (0, first, 0, 0))
        variable[...] = value
    cache.now[...] = first + length
    grouped = q.reshape(*q.shape[:2], KV_HEADS, -1, HEAD)
    logits = jnp.einsum("btkgh,bskh->btskg", grouped, cache.k[...]) * HEAD**-0.5
    past = jnp.arange(cache.k.shape[1]) <= first + jnp.arange(length)[:, None]
    weights = jax.nn.softmax(jnp.where(past[None, :, :, None, None], logits, -1e9), axis=2)
    return jnp.einsum("btskg,bskh->btkgh", weights, cache.v[...]).reshape(q.shape)


class Qwen3Attention(nnx.Module):
    def __init__(self, rngs, sharded):
        inner, outer = named(sharded, ("model", "data"), ("model", None, "data"))
        project = partial(nnx.Einsum, "btd,dnh->btnh", rngs=rngs, **inner)
        self.q_proj = project((WIDTH, HEADS, HEAD))
        self.k_proj = project((WIDTH, KV_HEADS, HEAD))
        self.v_proj = project((WIDTH, KV_HEADS, HEAD))
        self.o_proj = nnx.Einsum("btnh,nhd->btd", (HEADS, HEAD, WIDTH), rngs=rngs, **outer)
        self.q_norm, self.k_norm = (nnx.RMSNorm(HEAD, rngs=rngs) for _ in range(2))
        self.heads = P("data", None, "model", None) if sharded else None
        self.out = P("data") if sharded else None

    def __call__(self, x, cache):
        q, k, v = (f(x, **kept(self.heads)) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(self.q_norm(q), self.k_norm(k), v, cache), **kept(self.out))


class GatedMlp(nnx.Module):
    def __init__(self, rngs, sharded=False):
        wide, narrow = named(sharded, ("data", "model"), ("model", "data"))
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.gate_proj, self.up_proj = (linear(WIDTH, HIDDEN, **wide) for _ in range(2))
        self.down_proj = linear(HIDDEN, WIDTH, **narrow)
        self.hidden = P("data", None, "model") if sharded else None
        self.out = P("data") if sharded else None

    def __call__(self, x):
        gate, up = (f(x, **kept(self.hidden)) for f in (self.gate_proj, self.up_proj))
        return self.down_proj(nnx.silu(gate) * up, **kept(self.out))


class Qwen3Layer(nnx.Module):
    def __init__(self, rngs, sharded):
        self.input_layernorm, self.post_attention_layernorm = (
            nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2)
        )
        self.attn, self.mlp = Qwen3Attention(rngs, sharded), GatedMlp(rngs, sharded)

    def __call__(self, x, cache):
        x = x + self.attn(self.input_layernorm(x), cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3(nnx.Module):
    """Attention by `nnx.Einsum`; the embedding is read as an array, and the cache is an argument.

    With `sharded` it is for a mesh with explicit axes, and says the sharding of what it computes.
    """

    def __init__(self, rngs, sharded=False, layers=1):
        self.embedder = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.layers = List([Qwen3Layer(rngs, sharded) for _ in range(layers)])
        self.final_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.lm_head = nnx.Einsum("btd,dv->btv", (WIDTH, VOCABULARY), rngs=rngs)
        self.out = P("data") if sharded else None

    def __call__(self, tokens, *, cache):
        x = self.embedder.embedding[...].at[(tokens,)].get(**kept(self.out))
        for layer, own in zip(self.layers, cache, strict=True):
            x = layer(x, own)
        return self.lm_head(self.final_norm(x), **kept(self.out))


class VitLayer(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.linear1 = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.linear2 = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)
        self.before, self.after = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.dropout = nnx.Dropout(0.1, deterministic=False)

    def __call__(self, x, rngs):
        x = x + self.attention(self.before(x), rngs=rngs)
        y = self.linear2(jax.nn.gelu(self.linear1(self.after(x))))
        return x + self.dropout(y, deterministic=rngs is None, rngs=rngs)


class Vit(nnx.Module):
    """Patches by a convolution, a token of its own for the class, and keys as an argument."""

    def __init__(self, rngs, size=8, patch=4):
        self.projection = nnx.Conv(3, WIDTH, (patch, patch), strides=(patch, patch), rngs=rngs)
        count = (size // patch) ** 2 + 1
        self.cls_token = nnx.Param(jax.random.normal(rngs.params(), (1, 1, WIDTH)))
        self.pos_embeddings = nnx.Param(jax.random.normal(rngs.params(), (1, count, WIDTH)))
        self.layers = List([VitLayer(rngs)])
        self.ln = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.classifier = nnx.Linear(WIDTH, 5, rngs=rngs)

    def __call__(self, images, *, rngs=None):
        x = self.projection(images)
        x = x.reshape(len(x), -1, WIDTH)
        x = jnp.concatenate([jnp.tile(self.cls_token[...], (len(x), 1, 1)), x], axis=1)
        x += self.pos_embeddings[...]
        for layer in self.layers:
            x = layer(x, rngs)
        return self.classifier(self.ln(x)[:, 0])


class SiglipLayer(nnx.Module):
    def __init__(self, rngs):
        linear = partial(nnx.Linear, rngs=rngs)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            linear(WIDTH, WIDTH) for _ in range(4)
        )
        self.fc1, self.fc2 = linear(WIDTH, HIDDEN), linear(HIDDEN, WIDTH)
        self.layer_norm1, self.layer_norm2 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        y, heads = self.layer_norm1(x), (*x.shape[:-1], HEADS, HEAD)
        q, k, v = (f(y).reshape(heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.out_proj(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))
        return x + self.fc2(nnx.gelu(self.fc1(self.layer_norm2(x))))


class Gemma3Layer(nnx.Module):
    def __init__(self, rngs, sliding):
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.q_proj = linear(WIDTH, HEADS * HEAD)
        self.k_proj, self.v_proj = (linear(WIDTH, KV_HEADS * HEAD) for _ in range(2))
        self.o_proj = linear(HEADS * HEAD, WIDTH)
        self.mlp, self.sliding = GatedMlp(rngs), sliding
        self.before, self.between, self.after = (nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(3))

    def __call__(self, x, mask):
        y, heads = self.before(x), (*x.shape[:-1], -1, HEAD)
        q, k, v = (f(y).reshape(heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (jnp.repeat(array, HEADS // KV_HEADS, axis=2) for array in (k, v))
        near = jnp.abs(jnp.subtract.outer(*(jnp.arange(x.shape[1]),) * 2)) < 3
        y = jax.nn.dot_product_attention(q, k, v, mask=mask & near if self.sliding else mask)
        x = x + self.o_proj(y.reshape(*x.shape[:-1], -1))
        return x + self.after(self.mlp(self.between(x)))


class ScaledEmbedding(nnx.Module):
    def __init__(self, rngs):
        self.weight = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)

    def __call__(self, tokens):
        return WIDTH**0.5 * self.weight(tokens)


class Gemma3(nnx.Module):
    """Text with images in it: a tower of its own for them, layers of two kinds, tied logits."""

    def __init__(self, rngs):
        self.embed_tokens = ScaledEmbedding(rngs)
        self.patch_embedding = nnx.Conv(3, WIDTH, (4, 4), strides=4, padding="VALID", rngs=rngs)
        self.position_embedding = nnx.Embed(4, WIDTH, rngs=rngs)
        self.tower = SiglipLayer(rngs)
        self.mm_input_projection_weight = nnx.Param(jnp.eye(WIDTH))
        self.layers = List([Gemma3Layer(rngs, sliding) for sliding in (True, False)])

    def __call__(self, tokens, images, is_image):
        x = self.embed_tokens(tokens)
        patches = self.patch_embedding(images).reshape(len(tokens), -1, WIDTH)
        patches = self.tower(patches + self.position_embedding(jnp.arange(patches.shape[1])))
        patches = patches @ self.mm_input_projection_weight[...]
        place = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0)[..., None]
        x = jnp.where(is_image[..., None], jnp.take_along_axis(patches, place, axis=1), x)
        causal = jnp.tril(jnp.ones((x.shape[1],) * 2, bool)) | is_image[:, None, None, :]
        for layer in self.layers:
            x = layer(x, causal)
        return 3.0 * jnp.tanh(self.embed_tokens.weight.attend(x) / 3.0)


class Block(nnx.Module):
    """A layer whose kernels name the axes of a mesh."""

    def __init__(self, rngs, eager_sharding):
        def linear(layer, *args, names, **options):
            init = nnx.with_partitioning(
                nnx.initializers.lecun_normal(), names, eager_sharding=eager_sharding
            )
            return layer(*args, kernel_init=init, rngs=rngs, **options)

        general, heads = nnx.LinearGeneral, (HEADS, HEAD)
        self.query = linear(general, WIDTH, heads, names=("data", "model", None))
        self.out = linear(general, heads, WIDTH, names=("model", None, "data"), axis=(-2, -1))
        self.up = linear(nnx.Linear, WIDTH, HIDDEN, names=("data", "model"))
        self.down = linear(nnx.Linear, HIDDEN, WIDTH, names=("model", "data"))
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.out(nnx.tanh(self.query(self.norm(x))))
        return x + self.down(nnx.gelu(self.up(x)))


class Scanned(nnx.Module):
    """Layers stacked on axis 1 and scanned, each of them a checkpoint, with names of axes."""

    def __init__(self, rngs, eager_sharding=False):
        block = partial(Block, eager_sharding=eager_sharding)
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.blocks = Scan(rngs, axis=1, block=block, remat=True, names=(None,))

    def __call__(self, tokens):
        return self.blocks(self.embed(tokens))
