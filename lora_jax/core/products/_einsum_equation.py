"""The einsum of an input with a kernel, and which matrix product it is."""

from __future__ import annotations

import dataclasses
import functools
import math
import string
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from lora_jax.core._axes import KernelAxes


@dataclasses.dataclass(frozen=True)
class Equation:
    """``x,W->y`` with one letter for every axis.

    The letters of ``W`` are of three kinds: those that are also in ``x`` only are contracted, those
    that are also in ``y`` only are features of the output, and those in all three are batch axes.
    So the einsum is a (batched) matrix product of ``x`` as ``(*batch, *free, d)`` with ``W`` as a
    matrix, ``(*batch, d, k)``.

    Attributes:
      x: letters of the input.
      W: letters of the kernel.
      y: letters of the result.
      sizes: sizes of the axes of ``x`` and ``W``, in that order.

    Example:
      >>> eq = Equation.parse("...td,dhk->...htk", (2, 7, 6), (6, 3, 4))
      >>> eq.axes
      KernelAxes(inputs=(0,), outputs=(1, 2), batch=(), fused=1, parts=(0,))
      >>> eq.operand(jnp.zeros((2, 7, 6))).shape, eq.result(jnp.zeros((2, 7, 12))).shape
      ((2, 7, 6), (2, 3, 7, 4))
      >>> eq.rows
      14
    """

    x: str
    W: str
    y: str
    sizes: tuple[int, ...]

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def parse(cls, equation: str, x_shape: tuple[int, ...], W_shape: tuple[int, ...]) -> Equation:
        """Reads an einsum's equation; ``...`` may stand in ``x`` and ``y``.

        Layers that are alike share one object, with all that it has computed about itself.

        Raises:
          ValueError: if it is not a product of an input with a kernel, or does not fit the shapes.
        """
        text = equation.replace(" ", "")
        try:
            operands, y = text.split("->")
            x, W = operands.split(",")
        except ValueError:
            raise ValueError(f"The equation must be 'x,W->y', got {equation!r}") from None
        if "..." in W:
            raise ValueError(f"In {equation!r} the kernel has '...': write a letter for each axis")
        missing = len(x_shape) - len(x.replace("...", ""))
        unused = [c for c in string.ascii_letters if c not in text]
        if "..." in x and missing >= 0:
            x, y = (side.replace("...", "".join(unused[:missing])) for side in (x, y))
        if (len(x), len(W)) != (len(x_shape), len(W_shape)):
            raise ValueError(
                f"The equation {equation!r} does not fit an input {x_shape} and a kernel {W_shape}"
            )
        summed = [c for c in W if c not in x and c not in y]
        repeated = any(len(set(side)) < len(side) for side in (x, W, y))
        if summed or repeated or not set(y) <= set(x + W) or "." in x + W + y:
            raise ValueError(
                f"The equation {equation!r} is not a product with a matrix: every letter stands at "
                f"most once in each of 'x,W->y', and those of W also stand in x or in y"
            )
        size = dict(zip(x, x_shape, strict=True))
        unequal = [c for c, n in zip(W, W_shape, strict=True) if size.get(c, n) != n]
        if unequal:
            raise ValueError(
                f"The equation {equation!r} does not fit an input {x_shape} and a kernel "
                f"{W_shape}: they have other sizes for {unequal[0]!r}"
            )
        if not set(W) & set(x) - set(y) or not set(W) & set(y) - set(x):
            raise ValueError(
                f"The equation {equation!r} is not a product with a matrix: the kernel must share "
                f"letters with x that are not in y, and with y that are not in x"
            )
        return cls(x, W, y, (*x_shape, *W_shape))

    @functools.cached_property
    def axes(self) -> KernelAxes:
        """The kernel as a matrix, contracted with its inputs."""
        x, y = set(self.x), set(self.y)
        return KernelAxes(
            inputs=tuple(i for i, c in enumerate(self.W) if c in x and c not in y),
            outputs=tuple(i for i, c in enumerate(self.W) if c in y and c not in x),
            batch=tuple(i for i, c in enumerate(self.W) if c in x and c in y),
        )

    @functools.cached_property
    def transposed_axes(self) -> KernelAxes:
        """The kernel as a matrix, contracted with its outputs: ``x W^T``."""
        return dataclasses.replace(self.axes, inputs=self.axes.outputs, outputs=self.axes.inputs)

    @functools.cached_property
    def is_transposed(self) -> bool:
        """Whether the contracted axes of the kernel are behind its outputs."""
        return min(self.axes.inputs) > max(self.axes.outputs)

    def of_row(self, ndim: int) -> Equation:
        """The equation of one row: without the first axes of ``x``, which ``y`` has too."""
        y = "".join(c for c in self.y if c not in self.x[:ndim])
        return Equation(self.x[ndim:], self.W, y, self.sizes[ndim:])

    @property
    def rows(self) -> int:
        """Number of rows of one matrix product: the product of the free sizes."""
        return math.prod(self._shape(self._free))

    def product(
        self, x: chex.Array, W: chex.Array, precision: jax.lax.PrecisionLike = None
    ) -> chex.Array:
        """The einsum: bit for bit what Flax computes, by ``dot_general`` or ``jnp.einsum``."""
        dot_order = self._batch + "".join(c for c in self.x if c in self._free) + self._out
        if dot_order != self.y or set(self.x) - set(self.W + self.y):
            return jnp.einsum(f"{self.x},{self.W}->{self.y}", x, W, precision=precision)
        x_in, W_in, x_batch, W_batch = (
            [side.index(c) for c in letters]
            for letters in (self._in, self._batch)
            for side in (self.x, self.W)
        )
        dims = ((x_in, W_in), (x_batch, W_batch))
        return jax.lax.dot_general(x, W, dims, precision=precision)

    def operand(self, x: chex.Array) -> chex.Array:
        """The input as ``(*batch, *free, d)``."""
        summed = tuple(i for i, c in enumerate(self.x) if c not in self.W and c not in self.y)
        letters = "".join(c for i, c in enumerate(self.x) if i not in summed)
        x = jnp.sum(x, axis=summed) if summed else x
        order = self._batch + self._free + self._in
        x = _transposed(x, [letters.index(c) for c in order])
        return _reshaped(x, (*self._shape(self._batch + self._free), self._size(self._in)))

    def result(self, y: chex.Array) -> chex.Array:
        """The result from ``(*batch, *free, k)``."""
        order = self._batch + self._free + self._out
        return _transposed(_reshaped(y, self._shape(order)), [order.index(c) for c in self.y])

    def on_x(self, a: chex.Array) -> chex.Array:
        """One number for each contracted feature, ``(*batch, d)``, to multiply ``x`` with."""
        return self._broadcastable(a, self._batch + self._in, self.x)

    def on_y(self, a: chex.Array) -> chex.Array:
        """One number for each output feature, ``(*batch, k)``, to multiply the result with."""
        return self._broadcastable(a, self._batch + self._out, self.y)

    def _broadcastable(self, a: chex.Array, letters: str, onto: str) -> chex.Array:
        """``a``, which has these letters, with axes of size 1 for the others of ``onto``."""
        a = jnp.reshape(a, self._shape(letters))
        a = jnp.transpose(a, [letters.index(c) for c in onto if c in letters])
        return jnp.expand_dims(a, [i for i, c in enumerate(onto) if c not in letters])

    @functools.cached_property
    def _batch(self) -> str:
        return "".join(self.W[axis] for axis in self.axes.batch)

    @functools.cached_property
    def _in(self) -> str:
        return "".join(self.W[axis] for axis in self.axes.inputs)

    @functools.cached_property
    def _out(self) -> str:
        return "".join(self.W[axis] for axis in self.axes.outputs)

    @functools.cached_property
    def _free(self) -> str:
        return "".join(c for c in self.y if c not in self.W)

    def _shape(self, letters: str) -> tuple[int, ...]:
        sizes = dict(zip(self.x + self.W, self.sizes, strict=True))
        return tuple(sizes[c] for c in letters)

    def _size(self, letters: str) -> int:
        return math.prod(self._shape(letters))


def _transposed(array: chex.Array, order: Sequence[int]) -> chex.Array:
    return array if list(order) == list(range(array.ndim)) else jnp.transpose(array, order)


def _reshaped(array: chex.Array, shape: tuple[int, ...]) -> chex.Array:
    return array if array.shape == shape else jnp.reshape(array, shape)


def of_dot_general(x_ndim: int, W_ndim: int, dims: Any) -> str:
    """The einsum of a ``dot_general``.

    Example:
      >>> of_dot_general(3, 2, (((2,), (0,)), ((), ())))
      'abc,cd->abd'
    """
    (x_in, W_in), (x_batch, W_batch) = dims
    letters = iter("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    x = [next(letters) for _ in range(x_ndim)]
    shared = dict(zip((*W_in, *W_batch), (*x_in, *x_batch), strict=True))
    W = [x[shared[i]] if i in shared else next(letters) for i in range(W_ndim)]
    batch = [x[i] for i in x_batch]
    free = [c for c in x if c not in W]
    out = [c for c in W if c not in x]
    return f"{''.join(x)},{''.join(W)}->{''.join(batch + free + out)}"
