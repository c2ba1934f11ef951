"""The arrays in what a model gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax

from lora_jax._compat import is_module


def arrays_in(out: Any, inside: tuple[int, ...] = ()) -> Iterator[jax.Array]:
    """The arrays in a result, also in objects of classes that jax does not know.

    Example:
      >>> import jax.numpy as jnp, types
      >>> out = {"a": jnp.ones(2), "b": types.SimpleNamespace(c=jnp.ones(3))}
      >>> [array.shape for array in arrays_in(out)]
      [(2,), (3,)]
    """
    for leaf in jax.tree.leaves(out):
        if isinstance(leaf, jax.Array):
            yield leaf
        elif isinstance(leaf, type) or is_module(leaf) or id(leaf) in inside:
            continue
        elif hasattr(leaf, "__dict__"):
            yield from arrays_in(vars(leaf), (*inside, id(leaf)))
