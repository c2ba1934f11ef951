"""The leaf of a quantized kernel, which dequantizes where the model reads it.

It is a box of Flax, as ``nn.Partitioned`` is: ``module.param`` takes what ``unbox()`` gives. So the
plain model takes it as it is, and ``nn.scan``, ``nn.vmap``, ``nn.remat`` slice and carry its codes
and scales as they do with a kernel: all of them have the kernel's axes in their places.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import chex
import flax.core.meta
import flax.struct
import jax
import jax.numpy as jnp

from lora_jax.core._meshes import left_to_compiler, spec_of
from lora_jax.core._numerics import float32_or_more
from lora_jax.core.quantized._blocks import spread
from lora_jax.core.quantized._kinds import decode
from lora_jax.core.quantized._packed import unpacked
from lora_jax.core.quantized._quantization import Quantization


@dataclasses.dataclass(frozen=True)
class Packing:
    """Along which axis of a kernel two codes are in one byte.

    Attributes:
      axis: of the kernel.
      odd: whether the last byte has one code only.
      ndim: of the kernel.
      batch: its axes that stack matrices, which transforms may slice off.
    """

    axis: int
    odd: bool
    ndim: int
    batch: tuple[int, ...]

    def without(self, axis: int) -> Packing:
        """What is left when an axis is sliced off."""
        kept = [i for i in range(self.ndim) if i != axis]
        batch = tuple(kept.index(i) for i in self.batch if i != axis)
        return Packing(kept.index(self.axis), self.odd, self.ndim - 1, batch)

    def with_axis(self, axis: int) -> Packing:
        """The inverse of :meth:`without`."""
        batch = sorted([axis, *(i + (i >= axis) for i in self.batch)])
        return Packing(self.axis + (self.axis >= axis), self.odd, self.ndim + 1, tuple(batch))

    def in_layer(self, ndim: int) -> int:
        """The axis in a kernel of which transforms of JAX have left so many axes.

        Raises:
          ValueError: if it could be one or another, or the kernel has more axes than it had.
        """
        found = set()
        for sliced in itertools.combinations(self.batch, max(self.ndim - ndim, 0)):
            found.add(sum(axis not in sliced for axis in range(self.axis)))
        if len(found) != 1 or ndim > self.ndim:
            raise ValueError(
                f"A quantized kernel of {self.ndim} axes, of which {self.batch} stack layers, has "
                f"{ndim} axes here, and it is not known which are left. Slice it by nn.scan or "
                f"nn.vmap, or along all of these axes."
            )
        return found.pop()


class QuantizedArray(flax.struct.PyTreeNode, flax.core.meta.AxisMetadata[Any]):
    """A quantized kernel, which dequantizes where the model reads it.

    It stands in a tree of parameters in the place of the kernel. ``shape``, ``ndim`` and ``dtype``
    are those of the kernel.

    Attributes:
      codes: integers, or floats of 8 bits, with the axes of the kernel; for 4 bits two in each
        byte.
      scale: one number for each block, with as many axes: what a code of 1 stands for. Where the
        scales are quantized too, codes of 8 bits: 0, or the logarithm of a scale to the base 2.
      scale_step: of the codes of scales, for each 256 of them; else ``None``.
      scale_min: the logarithm that a code of 0 would stand for.
      zero_point: the code that stands for 0, where it is another one.
      box: the box that the kernel was in, without it.
      quantization: how it is quantized.
      kernel_dtype: what it dequantizes to.
      packing: where two codes are in one byte.

    Example:
      >>> import lora_jax
      >>> leaf = lora_jax.quantize({"kernel": jnp.ones((64, 8))}, {"kernel": "nf4"})["kernel"]
      >>> leaf.codes.shape, leaf.shape, leaf.dtype.name, float(leaf.unbox()[0, 0])
      ((32, 8), (64, 8), 'float32', 1.0)
    """

    codes: Any
    scale: Any
    scale_step: Any = None
    scale_min: Any = None
    zero_point: Any = None
    box: Any = None
    quantization: Quantization = flax.struct.field(pytree_node=False, default=Quantization("int8"))
    kernel_dtype: Any = flax.struct.field(pytree_node=False, default=jnp.dtype("float32"))
    packing: Packing | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel."""
        shape = list(self.codes.shape)
        if self.packing is not None:
            axis = self.packing.in_layer(len(shape))
            shape[axis] = 2 * shape[axis] - self.packing.odd
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """How many axes the kernel has."""
        return len(self.codes.shape)

    @property
    def dtype(self) -> Any:
        """The dtype that it dequantizes to."""
        return jnp.dtype(self.kernel_dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and scales."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def dequantize(self) -> chex.Array:
        """The kernel, in its dtype."""
        if isinstance(self.codes, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(self.shape, self.dtype)
        plain = self.replace(box=None)
        W: chex.Array = left_to_compiler(_dequantized, plain, like=spec_of(self.codes))
        return W

    def __getitem__(self, index: Any) -> Any:
        """A part of the kernel; all of it, ``[...]``, stays quantized.

        So a variable of NNX is read, which hands on what this gives to what dequantizes it.
        """
        return self if index is Ellipsis else self.dequantize()[index]

    def __jax_array__(self) -> chex.Array:
        return self.dequantize()

    def __getattr__(self, name: str) -> Any:
        """What an array has, as ``.T``, of the kernel: so a model may read it as one."""
        if name.startswith("_") or not hasattr(jax.Array, name):
            raise AttributeError(f"a QuantizedArray has no attribute {name!r}")
        return getattr(self.dequantize(), name)

    # --- a box of Flax ---

    def unbox(self) -> Any:
        """The kernel; where it was in a box, as that gives it."""
        W = self.dequantize()
        return W if self.box is None else self.box.replace_boxed(W).unbox()

    def replace_boxed(self, val: Any) -> Any:
        """Another value in the place of the kernel: it is not quantized."""
        return val if self.box is None else self.box.replace_boxed(val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> QuantizedArray:
        """As transforms of Flax stack it."""
        index = index if index >= 0 else index + self.ndim
        packing = self.packing and self.packing.with_axis(index)
        box = None if self.box is None else self.box.add_axis(index, params)
        return self.replace(packing=packing, box=box)

    def remove_axis(self, index: int, params: dict[Any, Any]) -> QuantizedArray:
        """As transforms of Flax slice it."""
        packing, box = self.packing, self.box
        if packing is not None:
            packing = packing.without(index if index >= 0 else index + packing.ndim)
        if box is not None:
            box = box.remove_axis(index, params)
        return self.replace(packing=packing, box=box)

    def get_partition_spec(self) -> Any:
        """The names of the axes of the box, as ``nn.get_partition_spec`` asks for them."""
        return getattr(self.box, "get_partition_spec", jax.sharding.PartitionSpec)()


@jax.jit
def _dequantized(leaf: QuantizedArray) -> chex.Array:
    dtype = float32_or_more(leaf.dtype)
    codes, shape = leaf.codes, leaf.shape
    if leaf.packing is not None:
        codes = unpacked(codes, leaf.packing.in_layer(codes.ndim), leaf.packing.odd)
    values = decode(leaf.quantization.kind, codes, dtype)
    if leaf.zero_point is not None:
        values = values - spread(leaf.zero_point.astype(dtype), shape)
    return (values * spread(scale_of(leaf).astype(dtype), shape)).astype(leaf.dtype)


def scale_of(leaf: QuantizedArray) -> chex.Array:
    """The scale of each block, as a number."""
    if leaf.scale_step is None:
        scale: chex.Array = leaf.scale
        return scale
    shape = leaf.scale.shape
    steps = leaf.scale.astype(jnp.float32) * spread(leaf.scale_step, shape)
    scale = jnp.exp2(spread(leaf.scale_min, shape) + steps)
    return jnp.where(leaf.scale == 0, 0, scale)
