"""The handlers of layers of well-known packages.

The packages are not imported: a layer is known by the name of its method. What stands here is
what a user would write with :func:`lora_jax.register` for their layers.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_jax import _compat as compat
from lora_jax.core._numerics import along
from lora_jax.core.products._adapted_kernel import AdaptedKernel
from lora_jax.layers._entry import Entry, MethodKey

Kernels = tuple[AdaptedKernel, ...]


def _gpt2_conv1d(layer: Any, kernels: Kernels, method: Any, inputs: chex.Array) -> chex.Array:
    """``FlaxConv1D`` of GPT-2: a dense layer that keeps its kernel as ``(k, d)``."""
    del method
    (kernel,) = kernels
    x = jnp.asarray(inputs, layer.dtype)
    W = kernel.value.astype(layer.dtype)

    def product(x: chex.Array, W: chex.Array) -> chex.Array:
        dims = (((x.ndim - 1,), (0,)), ((), ()))
        return jax.lax.dot_general(x, W.T, dims, precision=layer.precision)

    y = kernel.einsum("...d,kd->...k", x, W, base=product, precision=layer.precision)
    if layer.use_bias:
        bias = jnp.asarray(nn.unbox(layer.get_variable("params", "bias")), layer.dtype)
        y = y + along(bias, y)
    return y


def _gemma_einsum(layer: Any, kernels: Kernels, method: Any, eqn: str, x: chex.Array) -> chex.Array:
    """``Einsum`` of gemma: the name of its kernel is a field, the equation an argument."""
    del layer, method
    return kernels[0].einsum(eqn, x)


def _gemma_encode(layer: Any, kernels: Kernels, method: Any, x: chex.Array) -> chex.Array:
    """The input embeddings of gemma."""
    del method
    rows = kernels[0].linear(lambda ids, W: W[(ids,)], x, inputs=(0,))
    return rows * jnp.sqrt(layer.embed_dim).astype(rows.dtype)


def _gemma_decode(layer: Any, kernels: Kernels, method: Any, x: chex.Array) -> chex.Array:
    """The logits of gemma: the product with the transposed embeddings."""
    del layer, method
    if kernels[0].untied:
        return jnp.dot(x, kernels[0].value.T)
    return kernels[0].einsum("...k,dk->...d", x, base=lambda x, W: jnp.dot(x, W.T), transposed=True)


PACKAGES: Mapping[MethodKey, Entry] = types.MappingProxyType(
    {
        compat.GPT2_CONV1D: Entry("transformers' FlaxConv1D", ("kernel",), _gpt2_conv1d),
        compat.GEMMA_EINSUM: Entry(
            "gemma's Einsum", lambda layer: (layer.weight_name,), _gemma_einsum
        ),
        compat.GEMMA_ENCODE: Entry("gemma's Embedder", ("input_embedding",), _gemma_encode),
        compat.GEMMA_DECODE: Entry("gemma's Embedder", ("input_embedding",), _gemma_decode),
    }
)
