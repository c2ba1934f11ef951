"""Arrays out of JAX, to be written."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._compat import is_traced


def host(array: Any, path: str) -> np.ndarray:
    """An array on the host.

    Raises:
      TypeError: if it is not an array.
      ValueError: if this process does not have it in full, or if it is only traced.
    """
    if is_traced(array):
        raise ValueError(f"{path!r} is traced: files are written and checked outside of jax.jit.")
    if isinstance(array, jax.ShapeDtypeStruct) or not hasattr(array, "dtype"):
        raise TypeError(f"{path!r} is {array!r}, which is not an array.")
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{path!r} is a random key, not an array: save jax.random.key_data of it.")
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        raise ValueError(
            f"{path!r} is spread over processes: gather it first, as with "
            f"jax.experimental.multihost_utils.process_allgather(adapters, tiled=True)."
        )
    return np.asarray(array)
