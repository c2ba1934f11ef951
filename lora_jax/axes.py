"""A kernel as a matrix: which of its axes are inputs, which are outputs, which only stack."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import chex
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class KernelAxes:
    """How a kernel of any number of axes is a stack of ``(d, k)`` matrices.

    Without its stack axes the kernel is what one layer sees; there the first ``inputs`` axes are
    contracted with the layer's input, and the others are the layer's output.

    Attributes:
      inputs: number of input axes of one layer's kernel.
      stacks: axes of the whole kernel that stack layers, as ``nn.scan`` has them. ``U``, ``V``
        and ``m`` have them at the same index, so that ``nn.scan`` slices them alike.

    Example:
      >>> axes = KernelAxes(stacks=(1,))
      >>> axes.layer_shape((768, 12, 3072)), axes.stack_shape((768, 12, 3072))
      ((768, 3072), (12,))
      >>> axes.add_stacks(jnp.zeros((12, 768, 8))).shape
      (768, 12, 8)
    """

    inputs: int = 1
    stacks: tuple[int, ...] = ()

    def layer_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that one layer sees."""
        stacks = {axis % len(shape) for axis in self.stacks}
        return tuple(n for axis, n in enumerate(shape) if axis not in stacks)

    def stack_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The sizes of the stack axes, in the order of ``stacks``."""
        return tuple(shape[axis] for axis in self.stacks)

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """``(d, k)`` of one layer."""
        layer = self.layer_shape(shape)
        return math.prod(layer[: self.inputs]), math.prod(layer[self.inputs :])

    def as_matrix(self, kernel: chex.Array) -> chex.Array:
        """The kernel as an array ``(*stack, d, k)``."""
        matrix = self.matrix_shape(kernel.shape)
        kernel = self.front_stacks(kernel)
        return jnp.reshape(kernel, (*kernel.shape[: len(self.stacks)], *matrix))

    def from_matrix(self, matrix: chex.Array, shape: Sequence[int]) -> chex.Array:
        """The inverse of :meth:`as_matrix`, for a kernel of the given shape."""
        stacked = (*self.stack_shape(shape), *self.layer_shape(shape))
        return self.add_stacks(jnp.reshape(matrix, stacked))

    def front_stacks(self, array: chex.Array) -> chex.Array:
        """Brings the stack axes of a kernel, ``U``, ``V`` or ``m`` to the front."""
        return jnp.moveaxis(array, self.stacks, range(len(self.stacks)))

    def add_stacks(self, array: chex.Array) -> chex.Array:
        """Brings stack axes that are at the front to where the kernel has them."""
        return jnp.moveaxis(array, range(len(self.stacks)), self.stacks)
