"""The handlers of layers of well-known packages of NNX models.

The packages are not imported: a layer is known by the name of its method. What stands here is
what a user would write with :func:`lora_jax.register` for their layers.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import chex
import jax.numpy as jnp

from lora_jax import _compat as compat
from lora_jax.core.products._adapted_kernel import AdaptedKernel
from lora_jax.layers._entry import Entry, MethodKey


def _tunix_einsum(
    layer: Any, kernels: tuple[AdaptedKernel, ...], method: Any, x: chex.Array
) -> chex.Array:
    """``Einsum`` of tunix's models: in newer ones in the dtype of the layer."""
    del method
    (kernel,) = kernels
    dtype = getattr(layer, "dtype", None)
    if dtype is None:
        return kernel.einsum(layer.einsum_str, x)
    return kernel.einsum(layer.einsum_str, jnp.asarray(x, dtype), kernel.value.astype(dtype))


_EINSUM = Entry("tunix's Einsum", ("w",), _tunix_einsum)
PACKAGES: Mapping[MethodKey, Entry] = types.MappingProxyType(
    dict.fromkeys(compat.TUNIX_EINSUM, _EINSUM)
)
