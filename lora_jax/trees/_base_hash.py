"""The hash of a kernel that a variant has changed, by which its adapter knows its base."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np

from lora_jax._compat import is_traced

# In the place of the hash of a kernel that is not known.
UNKNOWN = "unknown"


def hash_of(array: np.ndarray[Any, Any]) -> str:
    """A hash of an array: of its dtype, shape and values."""
    digest = hashlib.blake2b(f"{array.dtype.name} {array.shape} ".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def base_hash(kernel: Any) -> str | None:
    """The hash of a kernel, or ``None`` where its values are not here, as inside of ``jax.jit``."""
    if is_traced(kernel) or isinstance(kernel, jax.ShapeDtypeStruct):
        return None
    if isinstance(kernel, jax.Array) and not kernel.is_fully_addressable:
        return None
    return hash_of(np.asarray(kernel))
