"""Leaves out of their boxes, ``nn.Partitioned`` and the like, and back into them."""

from __future__ import annotations

from typing import Any

import chex
import jax

from lora_jax.core.quantized._array import QuantizedArray


def content(leaf: Any) -> Any:
    """What is in a box (``nn.Partitioned``, an ``nnx.Variable``): an array, or a quantized one.

    Its shape and dtype are known without dequantizing it.
    """
    arrays = jax.tree.leaves(leaf, is_leaf=is_quantized)
    return arrays[0] if len(arrays) == 1 else leaf


def unbox(leaf: Any) -> Any:
    """The array of a leaf, out of the box where it has one, and dequantized where it is not one."""
    inside = content(leaf)
    return inside.dequantize() if is_quantized(inside) else inside


def rebox(leaf: Any, array: chex.Array) -> Any:
    """The array, in the same box as the leaf, as it is."""
    inside = content(leaf)
    if is_quantized(inside) and inside.box is not None:
        array = inside.box.replace_boxed(array)
    if hasattr(type(leaf), "without_codes"):  # a variable whose type says that it has codes
        return leaf.without_codes(array)
    return jax.tree.map(lambda _: array, leaf, is_leaf=is_quantized)


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf is quantized, and in no box."""
    return isinstance(leaf, QuantizedArray)
