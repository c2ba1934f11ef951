"""What is computed of a quantized kernel: it is dequantized inside, and not kept.

The gradient of a product with a kernel needs the kernel once more. JAX would keep it from the
forward pass to the backward one, in full, for every layer: as many bytes as a base that is not
quantized has. Here the backward pass dequantizes anew, as it is done by QLoRA.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from lora_jax._compat import barrier
from lora_jax.core._axes import KernelAxes
from lora_jax.core.quantized._array import QuantizedArray

Product = Callable[[chex.Array, chex.Array], chex.Array]


def product_with(leaf: QuantizedArray, product: Product, dtype: Any) -> Product:
    """A layer's product, with what a quantized kernel dequantizes to in the place of the kernel.

    Args:
      leaf: the kernel.
      product: of an input and the kernel.
      dtype: that the layer has the kernel in.
    """

    def dequantized(x: chex.Array, leaf: QuantizedArray) -> chex.Array:
        return product(x, leaf.dequantize().astype(dtype))

    return lambda x, W: jax.checkpoint(dequantized)(x, leaf)


def computed_of(function: Callable[..., Any], kernel: Any, *args: Any) -> Any:
    """``function(W, *args)`` of a kernel that may be quantized.

    Args:
      function: of the kernel, and of what is differentiated.
      kernel: as it is stored.
      *args: more arguments.
    """
    if not isinstance(kernel, QuantizedArray):
        return function(kernel, *args)

    # Without it XLA finds that a layer dequantizes the same codes, and keeps what is found here
    # until the layer comes.
    return _recomputed(function, kernel.replace(codes=barrier(kernel.codes)), *args)


def _recomputed(function: Callable[..., Any], kernel: QuantizedArray, *args: Any) -> Any:
    def dequantized(leaf: QuantizedArray, *args: Any) -> Any:
        return function(leaf.dequantize(), *args)

    return jax.checkpoint(dequantized)(kernel, *args)


def computed_by_layer(
    function: Callable[..., Any], kernel: Any, arrays: Mapping[str, chex.Array], axes: KernelAxes
) -> Any:
    """``function(W, arrays, axes=axes)``; of a quantized stack of layers, one after the other.

    Args:
      function: gives arrays ``(*stack, ...)``.
      kernel: as it is stored.
      arrays: of an adapter, ``(*stack, ...)``.
      axes: of the kernel.
    """
    if not (isinstance(kernel, QuantizedArray) and axes.batch):
        return computed_of(functools.partial(function, axes=axes), kernel, arrays)
    axis = axes.batch[0]
    of_layer = functools.partial(function, axes=axes.without(axis))
    packing = kernel.packing and kernel.packing.without(axis)
    layers = jax.tree.map(lambda array: jnp.moveaxis(array, axis, 0), kernel)

    def one_layer(layer: tuple[QuantizedArray, dict[str, chex.Array]]) -> Any:
        leaf, arrays = layer
        return _recomputed(of_layer, leaf.replace(packing=packing), arrays)

    return jax.lax.map(one_layer, (layers, dict(arrays)))
