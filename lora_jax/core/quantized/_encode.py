"""A kernel as a quantized leaf."""

from __future__ import annotations

import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._compat import is_traced
from lora_jax.core._axes import KernelAxes
from lora_jax.core._meshes import left_to_compiler
from lora_jax.core._numerics import float32_or_more
from lora_jax.core.quantized._array import Packing, QuantizedArray, scale_of
from lora_jax.core.quantized._blocks import block_counts, block_max, spread
from lora_jax.core.quantized._kinds import LARGEST, encode, is_packed
from lora_jax.core.quantized._packed import packed
from lora_jax.core.quantized._quantization import Quantization

# How many scales share what they are quantized by (QLoRA, section 3).
_SCALES = 256


def quantized(kernel: chex.Array, quantization: Quantization, axes: KernelAxes) -> QuantizedArray:
    """The leaf of a kernel, whose numbers are rounded to the nearest that there are codes for.

    On a mesh it is where the kernel is.

    Args:
      kernel: floating-point.
      quantization: how.
      axes: of the kernel: a block is in one column, along its inputs.

    Example:
      >>> leaf = quantized(jnp.eye(64), Quantization("int8"), KernelAxes())
      >>> bool((leaf.dequantize() == jnp.eye(64)).all())
      True
    """
    encoded = functools.partial(_encoded, quantization=quantization, axes=axes)
    sharding = jax.typeof(kernel).sharding if is_traced(kernel) else kernel.sharding
    leaf: QuantizedArray
    if not isinstance(sharding, NamedSharding):
        leaf = encoded(kernel)
        return leaf
    nowhere = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)
    like = specs_like(jax.eval_shape(encoded, nowhere), sharding)
    leaf = left_to_compiler(encoded, kernel, like=like)
    if is_traced(kernel):
        return leaf

    def placed(array: chex.Array, spec: PartitionSpec) -> chex.Array:
        return jax.device_put(array, NamedSharding(sharding.mesh, spec))

    leaf = jax.tree.map(placed, leaf, like)
    return leaf


def specs_like(leaf: Any, sharding: NamedSharding) -> Any:
    """How codes and scales are sharded: as their kernel, along the axes that can be cut so.

    Args:
      leaf: a quantized kernel.
      sharding: of the kernel.
    """

    def spec(array: Any) -> PartitionSpec:
        names = [*sharding.spec, *(None,) * (len(array.shape) - len(sharding.spec))]
        cuts = [
            math.prod(sharding.mesh.shape[n] for n in ((one,) if isinstance(one, str) else one))
            if isinstance(one, str | tuple)
            else 1
            for one in names
        ]
        return PartitionSpec(
            *(
                one if size % cut == 0 else None
                for one, size, cut in zip(names, array.shape, cuts, strict=True)
            )
        )

    return jax.tree.map(spec, leaf)


@functools.partial(jax.jit, static_argnames=("quantization", "axes"))
def _encoded(kernel: chex.Array, *, quantization: Quantization, axes: KernelAxes) -> QuantizedArray:
    kind, size = quantization.kind, quantization.block_size
    assert size is not None
    W = kernel.astype(float32_or_more(kernel.dtype))
    inputs = axes.inputs[::-1]
    scale = block_max(jnp.abs(W), block_counts(W.shape, inputs, size)) / LARGEST[kind]
    scales = {"scale": scale.astype(jnp.float32)}
    if quantization.double_quant:
        counts = block_counts(scale.shape, (*inputs, *axes.outputs[::-1]), _SCALES)
        scales = _of_8_bits(scales["scale"], counts)
    packing = None
    if is_packed(kind):
        packing = _packing(kernel.shape, axes)
    leaf = QuantizedArray(
        codes=None,
        **scales,
        quantization=quantization,
        kernel_dtype=jnp.dtype(kernel.dtype),
        packing=packing,
    )
    # In units of the scale as it is stored, so that its own rounding is made up for.
    divisor = spread(scale_of(leaf).astype(W.dtype), W.shape)
    codes = encode(kind, W / jnp.where(divisor > 0, divisor, 1))
    return leaf.replace(codes=codes if packing is None else packed(codes, packing.axis))


def _of_8_bits(scale: chex.Array, counts: tuple[int, ...]) -> dict[str, chex.Array]:
    """Scales as codes of 8 bits: their logarithms, from the least of a group to the greatest.

    So each has the same relative error, also where one column is far smaller than another one.
    """
    log = jnp.log2(jnp.where(scale > 0, scale, 1))
    high = block_max(jnp.where(scale > 0, log, -jnp.inf), counts)
    low = -block_max(jnp.where(scale > 0, -log, -jnp.inf), counts)
    high, low = jnp.where(high >= low, high, 0), jnp.where(high >= low, low, 0)  # all are zeros
    step = (high - low) / 254
    divisor = spread(jnp.where(step > 0, step, 1), scale.shape)
    codes = jnp.where(scale > 0, jnp.round((log - spread(low, scale.shape)) / divisor) + 1, 0)
    return {"scale": codes.astype(jnp.uint8), "scale_step": step, "scale_min": low - step}


def _packing(shape: tuple[int, ...], axes: KernelAxes) -> Packing:
    """Along an axis of an even size where there is one, of the inputs if possible."""
    order = (*axes.inputs[::-1], *axes.outputs)
    axis = next((axis for axis in order if shape[axis] % 2 == 0), order[0])
    return Packing(axis, bool(shape[axis] % 2), len(shape), axes.batch)
