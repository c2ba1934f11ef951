"""Dropout of the input of the factors."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from lora_jax.core._meshes import left_to_compiler


def dropped(x: chex.Array, rng: chex.PRNGKey, rate: float | chex.Array) -> chex.Array:
    """The input, of which each number is zero with a probability, and the others are larger.

    Args:
      x: the input of the factors.
      rng: the key of the mask.
      rate: the probability, or one for each row. The others are divided by ``1 - rate``, so that
        the mean stays.

    Example:
      >>> sorted(set(dropped(jnp.ones(9), jax.random.key(0), 0.5).tolist()))
      [0.0, 2.0]
    """

    def drop(x: chex.Array, rng: chex.PRNGKey) -> chex.Array:
        keep = jax.random.bernoulli(rng, 1.0 - rate, x.shape)
        return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros_like(x))

    rest: chex.Array = left_to_compiler(drop, x, rng, like=x)
    return rest
