"""A quantized kernel as a leaf of a tree: in the box, or the variable, that the kernel was in."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from lora_jax.core._boxes import content, is_quantized
from lora_jax.core.quantized._array import QuantizedArray


def quantized_leaf(leaf: Any, quantized: QuantizedArray) -> Any:
    """The leaf, with a quantized kernel in place of the kernel.

    A box of Linen goes into the quantized one, as what it says is said of the kernel. A variable of
    NNX gets a hook, by which it dequantizes when a layer reads it.

    Args:
      leaf: the kernel, in its box.
      quantized: the kernel, quantized.
    """
    if isinstance(leaf, nn.meta.AxisMetadata):
        return quantized.replace(box=jax.tree.map(lambda _: None, leaf))
    if isinstance(leaf, nnx.Variable):
        return _variable(leaf, quantized)
    return quantized


def dequantized_when_read(variable: Any, value: Any) -> Any:
    """The hook of a variable of NNX: what a layer sees of its value."""
    del variable
    return value.dequantize() if isinstance(value, QuantizedArray) else value


def is_quantized_variable(variable: Any) -> bool:
    """Whether a layer sees what the value of a variable dequantizes to, and nothing else."""
    hooks = variable.get_metadata().get("on_get_value", ())
    return is_quantized(content(variable)) and hooks in ((dequantized_when_read,), dequantized_when_read)


def _variable(leaf: Any, quantized: QuantizedArray) -> Any:
    metadata = leaf.get_metadata()
    hooks = metadata.get("on_get_value", ())
    hooks = tuple(hooks) if isinstance(hooks, tuple | list) else (hooks,)
    if dequantized_when_read not in hooks:
        metadata = {**metadata, "on_get_value": (dequantized_when_read, *hooks)}
    return type(leaf).from_metadata(quantized, metadata)
