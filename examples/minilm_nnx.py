"""The classifier of `examples.minilm` in Flax NNX, with the same paths of parameters.

Nothing in here knows of adapters: it stands for a model that somebody else has written.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from examples.minilm import Config, mean_pool


class Attention(nnx.Module):
    """Self-attention, with a Linear layer each for query, key, value and output."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.config = config
        dense = lambda: nnx.Linear(config.width, config.width, dtype=config.dtype, rngs=rngs)  # noqa: E731
        self.query, self.key, self.value, self.output = dense(), dense(), dense(), dense()

    def __call__(self, x: jax.Array, mask: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        config = self.config
        split = (*x.shape[:-1], config.heads, config.width // config.heads)
        y = nnx.dot_product_attention(
            *(layer(x).reshape(split) for layer in (self.query, self.key, self.value)),
            mask=mask[:, None, None, :],
            dropout_rng=None if rngs is None else rngs.dropout(),
            dropout_rate=config.dropout,
            deterministic=rngs is None,
        )
        return self.output(y.reshape(x.shape))


class Layer(nnx.Module):
    """Attention and a feed-forward network, each normalized after its residual."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        width, options = config.width, {"dtype": config.dtype, "rngs": rngs}
        self.attention = Attention(config, rngs)
        self.attention_norm = nnx.LayerNorm(width, epsilon=config.epsilon, **options)
        self.intermediate = nnx.Linear(width, config.hidden, **options)
        self.output = nnx.Linear(config.hidden, width, **options)
        self.output_norm = nnx.LayerNorm(width, epsilon=config.epsilon, **options)
        self.drop = nnx.Dropout(config.dropout)

    def __call__(self, x: jax.Array, mask: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        drop = lambda y: self.drop(y, deterministic=rngs is None, rngs=rngs)  # noqa: E731
        x = self.attention_norm(x + drop(self.attention(x, mask, rngs)))
        y = self.output(nnx.gelu(self.intermediate(x), approximate=False))
        return self.output_norm(x + drop(y))


class Encoder(nnx.Module):
    """Token ids and their mask, ``(batch, length)``, to states, ``(batch, length, width)``."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        width, options = config.width, {"dtype": config.dtype, "rngs": rngs}
        self.layers = config.layers
        self.word_embeddings = nnx.Embed(config.vocabulary, width, **options)
        self.token_type_embeddings = nnx.Embed(config.token_types, width, **options)
        self.position_embeddings = nnx.Embed(config.positions, width, **options)
        self.norm = nnx.LayerNorm(width, epsilon=config.epsilon, **options)
        self.drop = nnx.Dropout(config.dropout)
        for i in range(config.layers):
            setattr(self, f"layer_{i}", Layer(config, rngs))

    def __call__(self, tokens: jax.Array, mask: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        x = self.word_embeddings(tokens) + self.token_type_embeddings(jnp.zeros_like(tokens))
        x += self.position_embeddings(jnp.arange(tokens.shape[-1]))
        x = self.drop(self.norm(x), deterministic=rngs is None, rngs=rngs)
        for i in range(self.layers):
            x = getattr(self, f"layer_{i}")(x, mask > 0, rngs)
        return x


class Classifier(nnx.Module):
    """Logits from the mean over a text's tokens; with `rngs` there is dropout."""

    def __init__(self, config: Config, classes: int, rngs: nnx.Rngs) -> None:
        self.encoder = Encoder(config, rngs)
        self.drop = nnx.Dropout(config.dropout)
        self.classifier = nnx.Linear(config.width, classes, rngs=rngs)

    def __call__(
        self, tokens: jax.Array, mask: jax.Array, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        x = mean_pool(self.encoder(tokens, mask, rngs), mask)
        x = self.drop(x, deterministic=rngs is None, rngs=rngs)
        return self.classifier(x.astype(jnp.float32))
