"""What is told how a handler uses a kernel, when nothing is computed."""

from __future__ import annotations

from typing import Protocol

import chex

from lora_jax.core._axes import KernelAxes


class Observer(Protocol):
    """Is told how a handler uses a kernel, as ``kernel_axes`` needs to know."""

    def use(self, layer: KernelAxes, contracted: bool) -> None:
        """The handler computes with the kernel.

        Args:
          layer: the axes of the kernel in the layer.
          contracted: whether it is multiplied by the input as in ``x W``: not looked up, not
            convolved, not used transposed.
        """

    def product(self, x: chex.Array, y: chex.Array) -> chex.Array:
        """What stands for the product with the kernel, of the input ``x`` and the result ``y``."""

    def refuse(self, reason: str) -> None:
        """The handler cannot adapt the kernel."""


class Unseen:
    """An observer that does nothing: with one the kernel is zeros."""

    def use(self, layer: KernelAxes, contracted: bool) -> None:
        """Does nothing."""

    def product(self, x: chex.Array, y: chex.Array) -> chex.Array:
        """The result as it is."""
        return y

    def refuse(self, reason: str) -> None:
        """Does nothing: the call itself refuses."""
