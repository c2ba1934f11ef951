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
from jax.sharding import AxisType

from lora_jax._compat import calls_anew
from lora_jax.core._axes import KernelAxes
from lora_jax.core._numerics import known_tangent
from lora_jax.core.quantized._array import QuantizedArray

Product = Callable[[chex.Array, chex.Array], chex.Array]


def product_with(leaf: QuantizedArray, product: Product, dtype: Any) -> Product:
    """A layer's product, with what a quantized kernel dequantizes to in the place of the kernel.

    Args:
      leaf: the kernel.
      product: of an input and the kernel, linear in the input.
      dtype: that the layer has the kernel in.
    """

    def dequantized(x: chex.Array, leaf: QuantizedArray) -> chex.Array:
        return product(x, leaf.dequantize().astype(dtype))

    def product_of(x: chex.Array, W: chex.Array) -> chex.Array:
        del W
        if not jnp.issubdtype(x.dtype, jnp.inexact):  # rows of a table, which nothing is kept for
            return dequantized(x, leaf)
        y: chex.Array = _linear(dequantized, x, leaf)
        return y

    return product_of


def computed_of(function: Callable[..., Any], kernel: Any, *args: Any) -> Any:
    """``function(W, *args)`` of a kernel that may be quantized.

    Args:
      function: of the kernel, and of what is differentiated.
      kernel: as it is stored.
      *args: more arguments.
    """
    if not isinstance(kernel, QuantizedArray):
        return function(kernel, *args)

    def dequantized(args: Any, leaf: QuantizedArray) -> Any:
        return function(leaf.dequantize(), *args)

    return _differentiable(dequantized, args, kernel)


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
        return computed_of(of_layer, leaf.replace(packing=packing), arrays)

    return jax.lax.map(one_layer, (layers, dict(arrays)))


def _linear(function: Callable[..., Any], linear: Any, leaf: Any) -> Any:
    """``function(linear, leaf)``, whose transpose computes what it needs of the second anew."""
    if calls_anew is None or _have_types_of_meshes(linear, leaf):
        return jax.checkpoint(function)(linear, leaf)
    return _called(function, linear, leaf)


def _differentiable(function: Callable[..., Any], args: Any, leaf: Any) -> Any:
    """``function(args, leaf)``, whose derivative computes what it needs of the second anew."""
    if calls_anew is None or _have_types_of_meshes(args, leaf):
        return jax.checkpoint(function)(args, leaf)

    everything, structure = _flattened((args, leaf))

    @jax.custom_jvp
    def computed(arrays: list[Any]) -> Any:
        return _called(function, *structure.unflatten(arrays))

    def jvp(primals: Any, tangents: Any) -> Any:
        (arrays,), (tangents,) = primals, tangents
        given = [known_tangent(tangent) for tangent in tangents]
        which = [i for i, tangent in enumerate(given) if tangent is not None]
        out = computed(arrays)
        if not which:
            return out, jax.tree.map(jnp.zeros_like, out)

        def derivative(some: list[Any], arrays: list[Any]) -> Any:
            def of_some(*some: Any) -> Any:
                changed = dict(zip(which, some, strict=True))
                new = [changed.get(i, array) for i, array in enumerate(arrays)]
                return function(*structure.unflatten(new))

            return jax.jvp(of_some, tuple(arrays[i] for i in which), tuple(some))[1]

        return out, _linear(derivative, [given[i] for i in which], arrays)

    computed.defjvp(jvp, symbolic_zeros=True)
    return computed(everything)


def _called(function: Callable[..., Any], linear: Any, leaf: Any) -> Any:
    """``function(linear, leaf)`` by what calls a jaxpr, whose structure it gives back."""
    assert calls_anew is not None
    # Traced now, and once: modules of Flax can be called while their own method runs.
    jaxpr, out = jax.make_jaxpr(function, return_shape=True)(linear, leaf)
    structure: Any = jax.tree.structure(out)
    return structure.unflatten(calls_anew(jaxpr, jax.tree.leaves(linear), jax.tree.leaves(leaf)))


def _flattened(tree: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(tree)


def _have_types_of_meshes(*trees: Any) -> bool:
    """Whether types of arrays say more than shapes and dtypes, as inside of ``jax.shard_map``."""
    meshes = [jax.typeof(array).sharding.mesh for array in jax.tree.leaves(trees)]
    kinds = {kind for mesh in meshes if not mesh.empty for kind in mesh.axis_types}
    kinds |= set(jax.sharding.get_abstract_mesh().axis_types)
    return AxisType.Manual in kinds or AxisType.Explicit in kinds
