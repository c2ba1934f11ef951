"""The numbers of `benchmarks.models.data` as arrays of JAX, for the models in Linen and in NNX."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from benchmarks.models import data
from benchmarks.models.cases import Case
from benchmarks.models.data import Noise


def params(case: Case) -> dict[str, Any]:
    """The weights of a case, for `make(case)`."""
    return unflatten_dict(array_of(data.weights(case), jnp.dtype(case.dtype)), sep="/")


def factors(
    case: Case, dtype: Any = jnp.float32, stack: tuple[int, ...] = ()
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """``U`` and ``V`` for the path of each kernel."""
    return array_of(data.factors(case, stack), dtype)


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
