"""A quantized kernel as a leaf of a tree: in the box, or the variable, that the kernel was in."""

from __future__ import annotations

import dataclasses
import functools
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
    NNX dequantizes when a layer reads it.

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
    if not is_quantized(content(variable)):
        return False
    if _HAS_GET_VALUE:
        plain = getattr(type(variable), "plain_type", None)
        as_stored = plain is not None and plain.get_value is nnx.Variable.get_value
        return as_stored and not variable.get_metadata().get("on_get_value")
    return bool(variable.get_metadata().get("on_get_value") == _WhenRead())


# Older variables say by hooks what a layer sees; of newer ones it is a method of their type.
_HAS_GET_VALUE = hasattr(nnx.Variable, "get_value")


def _variable(leaf: Any, codes: QuantizedArray) -> Any:
    """The variable with codes, which dequantizes when a layer reads it."""
    metadata = leaf.get_metadata()
    if _HAS_GET_VALUE:
        cls: Any = type(leaf)
        return _quantized_type(cls).from_metadata(codes, metadata)
    hooks = metadata.get("on_get_value", ())
    if not isinstance(hooks, _WhenRead):
        hooks = _WhenRead(tuple(hooks) if isinstance(hooks, tuple | list) else (hooks,))
    return type(leaf).from_metadata(codes, {**metadata, "on_get_value": hooks})


@functools.cache
def _quantized_type(cls: Any) -> Any:
    """A type of variables that dequantizes what is read, and then does what ``cls`` does."""
    if hasattr(cls, "without_codes"):
        return cls

    class Quantized(cls):  # type: ignore[misc]
        """A variable that dequantizes when a layer reads it."""

        plain_type = cls

        def get_value(self, **kwargs: Any) -> Any:
            if not is_quantized(codes := self.get_raw_value()):
                return super().get_value(**kwargs)
            return self.without_codes(codes.dequantize()).get_value(**kwargs)

        def without_codes(self, kernel: chex.Array) -> Any:
            """The variable as it was, with another kernel."""
            return cls.from_metadata(kernel, self.get_metadata())

        def __reduce__(self) -> Any:
            return _unpickled, (cls, self.get_raw_value(), self.get_metadata())

    Quantized.__name__ = Quantized.__qualname__ = f"Quantized{cls.__name__}"
    return Quantized


def _unpickled(cls: Any, codes: Any, metadata: dict[str, Any]) -> Any:
    return _quantized_type(cls).from_metadata(codes, metadata)


@dataclasses.dataclass(frozen=True)
class _WhenRead:
    """The hook of an older variable: what a layer sees of its value.

    Attributes:
      then: the hooks that it had, which see what it dequantizes to.
    """

    then: tuple[Callable[..., Any], ...] = ()

    def __call__(self, variable: Any, value: Any) -> Any:
        value = value.dequantize() if is_quantized(value) else value
        for hook in self.then:
            value = hook(variable, value)
        return value
