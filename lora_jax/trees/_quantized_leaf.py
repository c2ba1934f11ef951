"""A quantized kernel as a leaf of a tree: in the box, or the variable, that the kernel was in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import flax.core.meta
import jax
from flax import nnx

from lora_jax.core._axes import KernelAxes
from lora_jax.core._boxes import content, is_quantized
from lora_jax.core.quantized._array import QuantizedArray
from lora_jax.core.quantized._encode import quantized


def quantized_leaf(leaf: Any, codes: QuantizedArray) -> Any:
    """The leaf, with a quantized kernel in place of the kernel.

    A box of Linen goes into the quantized one, as what it says is said of the kernel. A variable of
    NNX gets a hook, by which it dequantizes when a layer reads it.

    Args:
      leaf: the kernel, in its box.
      codes: the kernel, quantized.
    """
    if isinstance(leaf, flax.core.meta.AxisMetadata):
        return codes.replace(box=jax.tree.map(lambda _: None, leaf))
    if isinstance(leaf, nnx.Variable):
        return _variable(leaf, codes)
    return codes


def requantized_leaf(leaf: Any, kernel: chex.Array, axes: KernelAxes) -> Any:
    """A quantized leaf with another kernel, quantized as it was.

    Args:
      leaf: the leaf, in its box.
      kernel: the kernel, in float32 or more.
      axes: of the kernel.
    """
    had = content(leaf)
    axes = dataclasses.replace(axes, fused=1, parts=(), alone=None)
    new = quantized(kernel, had.quantization, axes).replace(kernel_dtype=had.dtype, box=had.box)
    return jax.tree.map(lambda _: new, leaf, is_leaf=is_quantized)


def is_quantized_variable(variable: Any) -> bool:
    """Whether a layer sees what the value of a variable dequantizes to, and nothing else."""
    hook = variable.get_metadata().get("on_get_value")
    return is_quantized(content(variable)) and hook == _WHEN_READ


@dataclasses.dataclass(frozen=True)
class _WhenRead:
    """The hook of a variable: what a layer sees of its value.

    Attributes:
      then: the hooks that it had, which see what it dequantizes to.
    """

    then: tuple[Callable[..., Any], ...] = ()

    def __call__(self, variable: Any, value: Any) -> Any:
        value = value.dequantize() if isinstance(value, QuantizedArray) else value
        for hook in self.then:
            value = hook(variable, value)
        return value


_WHEN_READ = _WhenRead()


def _variable(leaf: Any, codes: QuantizedArray) -> Any:
    metadata = leaf.get_metadata()
    hook = metadata.get("on_get_value", ())
    if not isinstance(hook, _WhenRead):
        hook = _WhenRead(tuple(hook) if isinstance(hook, tuple | list) else (hook,))
    return type(leaf).from_metadata(codes, {**metadata, "on_get_value": hook})
