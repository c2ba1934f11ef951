"""A kernel as a stack of matrices: which axes are inputs, outputs, and batch axes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Iterator, Sequence

import chex
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lora_jax._deprecated import renamed_fields
from lora_jax.core._meshes import left_to_compiler, spec_of


@renamed_fields(stacks="batch", stack_shape="batch_shape")
@dataclasses.dataclass(frozen=True)
class KernelAxes:
    """How a kernel of any number of axes is a stack of ``(d, k)`` matrices.

    Every axis of the kernel is in one of the three fields, counted from 0 and in ascending order.

    Attributes:
      inputs: axes that are contracted with the layer's input; ``d`` is the product of their sizes.
      outputs: axes that are features of the layer's output; ``k`` is the product of their sizes.
      batch: axes along which matrices are stacked: the layers of an ``nn.scan``, the experts
        of a mixture; the ``batch_axis`` of ``jax.nn.initializers``. The arrays of an adapter have
        them in front: ``stack``, in the shapes below.
      fused: number of kernels that lie side by side in the outputs, such as 3 where one kernel
        computes queries, keys and values. Each is then its own matrix, ``(d, k / fused)``.
      parts: which of the fused kernels are adapted; all by default.
      alone: the call of the model, by a name for it, in which only the kernel's layer reads the
        kernel, or a rule says what the other readers see. It has no part in equality, and is in no
        file.

    Raises:
      TypeError: if a field is not an int, or not a tuple of ints.
      ValueError: if an axis is in none of the fields or in two, there are no inputs or no outputs,
        ``fused`` is below 1, or parts are not among the fused kernels or named twice.

    Example:
      >>> axes = KernelAxes(inputs=(0,), outputs=(2, 3), batch=(1,))
      >>> axes.batch_shape((768, 12, 8, 64)), axes.matrix_shape((768, 12, 8, 64))
      ((12,), (768, 512))
      >>> axes.as_matrix(jnp.zeros((768, 12, 8, 64))).shape
      (12, 768, 512)
    """

    inputs: tuple[int, ...] = (0,)
    outputs: tuple[int, ...] = (1,)
    batch: tuple[int, ...] = ()
    fused: int = 1
    parts: tuple[int, ...] = ()
    alone: str | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("inputs", "outputs", "batch", "parts"):
            try:
                value = tuple(map(_index, getattr(self, name)))
            except TypeError:
                raise TypeError(
                    f"KernelAxes({name}=...) must be a tuple of ints, got {getattr(self, name)!r}."
                ) from None
            object.__setattr__(self, name, value if name == "parts" else tuple(sorted(value)))
        try:
            object.__setattr__(self, "fused", _index(self.fused))
        except TypeError:
            raise TypeError(f"KernelAxes(fused=...) must be an int, got {self.fused!r}.") from None
        if self.fused < 1:
            raise ValueError(f"KernelAxes(fused={self.fused}): fused must be at least 1.")
        axes = sorted((*self.inputs, *self.outputs, *self.batch))
        if axes != list(range(len(axes))) or not self.inputs or not self.outputs:
            raise ValueError(
                f"KernelAxes(inputs={self.inputs}, outputs={self.outputs}, batch={self.batch}) "
                f"must name every axis of the kernel once, counted from 0, some as inputs and some "
                f"as outputs."
            )
        parts = self.parts or tuple(range(self.fused))
        if len(set(parts)) < len(parts) or not all(0 <= part < self.fused for part in parts):
            raise ValueError(
                f"KernelAxes(fused={self.fused}, parts={self.parts}): parts must be some of 0 to "
                f"{self.fused - 1}, each once."
            )
        object.__setattr__(self, "parts", parts)

    @property
    def ndim(self) -> int:
        """Number of axes of the kernel."""
        return len(self.inputs) + len(self.outputs) + len(self.batch)

    def batch_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """``stack``, the sizes in front of ``U``, ``V``, ``m``: the batch axes, and any parts."""
        batch = tuple(shape[axis] for axis in self.batch)
        return batch if self.fused == 1 else (*batch, len(self.parts))

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """``(d, k)`` of one matrix.

        Raises:
          ValueError: if the outputs are not ``fused`` kernels side by side.
        """
        d, k = (math.prod(shape[i] for i in axes) for axes in (self.inputs, self.outputs))
        if k % self.fused:
            raise ValueError(
                f"A kernel of shape {tuple(shape)} has {k} outputs, which are not {self.fused} "
                f"kernels side by side."
            )
        return d, k // self.fused

    def as_matrix(self, kernel: chex.Array) -> chex.Array:
        """The adapted matrices of a kernel, ``(*stack, d, k)``."""

        def matrices(kernel: chex.Array) -> chex.Array:
            matrix = self._fused_matrix(kernel)
            return matrix if self.fused == 1 else self._split(matrix)[..., self.parts, :, :]

        like = self.matrix_spec(kernel)
        adapted: chex.Array = left_to_compiler(matrices, kernel, like=like)
        return adapted

    def matrix_spec(self, kernel: chex.Array) -> PartitionSpec:
        """By which axes of a mesh the adapted matrices ``(*stack, d, k)`` are sharded."""
        # Axes that are merged are sharded as the first of them, fused ones not at all.
        spec = spec_of(kernel)
        like = [spec[axis] for axis in (*self.batch, self.inputs[0], self.outputs[0])]
        if self.fused > 1:
            like[-2:] = None, like[-2], None
        return PartitionSpec(*like)

    def from_matrix(self, matrix: chex.Array, kernel: chex.Array) -> chex.Array:
        """The kernel, with other adapted matrices: ``as_matrix`` of it is ``matrix``."""
        if self.fused > 1:
            parts = self._split(self._fused_matrix(kernel)).astype(matrix.dtype)
            parts = jnp.moveaxis(parts.at[..., self.parts, :, :].set(matrix), -3, -2)
            matrix = jnp.reshape(parts, (*parts.shape[:-2], -1))
        return self.as_kernel(matrix, kernel.shape)

    def as_kernel(self, matrix: chex.Array, shape: Sequence[int]) -> chex.Array:
        """A matrix ``(*batch, d, k)``, all fused outputs in ``k``, as a kernel of that shape."""
        order = (*self.batch, *self.inputs, *self.outputs)
        array = jnp.reshape(matrix, [shape[axis] for axis in order])
        return jnp.moveaxis(array, range(len(order)), order)

    def place(self, array: chex.Array, matrix_ndim: int) -> chex.Array:
        """``U``, ``V`` or ``m`` with as many axes as the kernel, the batch axes where it has them.

        So whatever slices the kernel, at an axis counted from either end, slices it alike. Without
        batch axes nothing is sliced, and the array stays as it is.

        Args:
          array: ``(*stack, ...)``.
          matrix_ndim: number of its axes without ``stack``: 2 for ``U`` and ``V``, 1 for ``m``.
            More are merged into one, so that there are no more than the kernel has.
        """
        if not self.batch:
            return array
        matrix_ndim = matrix_ndim if matrix_ndim < 3 else 1
        flat = self._flat(array.shape, matrix_ndim)
        ones = self.ndim - len(flat)
        spec, batch, merged = list(spec_of(array)), len(self.batch), array.ndim - len(flat)
        if merged:  # no axis of the merged ones stays sharded
            spec[batch : batch + merged + 1] = [None]

        def reshaped(array: chex.Array) -> chex.Array:
            return jnp.reshape(array, flat + (1,) * ones)

        like = PartitionSpec(*spec, *(None,) * ones)
        array = left_to_compiler(reshaped, array, like=like)
        return jnp.moveaxis(array, range(batch), self.batch)

    def take(
        self, array: chex.Array, matrix_ndim: int, shape: tuple[int, ...]
    ) -> chex.Array | None:
        """The inverse of :meth:`place`, if the result has this shape; else ``None``."""
        if not self.batch and array.shape == shape:
            return array
        if array.ndim < self.ndim:
            return None
        matrix_ndim = matrix_ndim if matrix_ndim < 3 else 1
        array = jnp.moveaxis(array, self.batch, range(len(self.batch)))
        flat = self._flat(shape, matrix_ndim)
        placed = flat + (1,) * (array.ndim - len(flat))
        if array.shape != placed:
            return None
        # In two steps, as in a mesh with explicit axes a reshape does one thing at a time.
        return jnp.reshape(jnp.reshape(array, flat), shape)

    def _flat(self, shape: tuple[int, ...], matrix_ndim: int) -> tuple[int, ...]:
        """``(*batch, ...)`` with the parts in the first axis of the matrix."""
        batch, first = len(self.batch), len(shape) - matrix_ndim + 1
        return (*shape[:batch], math.prod(shape[batch:first]), *shape[first:])

    def of_layers(self, ndim: int) -> Iterator[KernelAxes]:
        """The axes in a layer that sees ``ndim`` of them, for each choice of those sliced off."""
        for sliced in itertools.combinations(self.batch, max(self.ndim - ndim, 0)):
            yield self.without(*sliced)

    def without(self, *sliced: int) -> KernelAxes:
        """The axes where some of those that stack matrices are sliced off."""
        kept = [axis for axis in range(self.ndim) if axis not in sliced]
        return dataclasses.replace(
            self,
            inputs=tuple(map(kept.index, self.inputs)),
            outputs=tuple(map(kept.index, self.outputs)),
            batch=tuple(kept.index(axis) for axis in self.batch if axis in kept),
        )

    def in_layer(self, layer: KernelAxes) -> KernelAxes | None:
        """The axes in a layer that contracts these; ``None`` where it does not fit."""
        return _in_layer(self, layer)

    def _fused_matrix(self, kernel: chex.Array) -> chex.Array:
        """``(*batch, d, k)`` with all fused outputs in ``k``."""
        order = (*self.batch, *self.inputs, *self.outputs)
        d, k = self.matrix_shape(kernel.shape)
        batch = [kernel.shape[axis] for axis in self.batch]
        return jnp.reshape(jnp.transpose(kernel, order), (*batch, d, k * self.fused))

    def _split(self, matrix: chex.Array) -> chex.Array:
        """``(*batch, d, fused * k) -> (*batch, fused, d, k)``."""
        *lead, width = matrix.shape
        return jnp.moveaxis(jnp.reshape(matrix, (*lead, self.fused, width // self.fused)), -2, -3)


def _index(value: object) -> int:
    """An int of any kind, but not a bool."""
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=1024)
def _in_layer(stored: KernelAxes, layer: KernelAxes) -> KernelAxes | None:
    for axes in stored.of_layers(layer.ndim):
        if dataclasses.replace(axes, fused=1, parts=()) == layer:
            return axes
    return None
