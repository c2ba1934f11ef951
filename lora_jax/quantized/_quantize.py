"""Kernels that match a pattern, quantized."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax.traverse_util import empty_node

from lora_jax._compat import is_traced
from lora_jax.core._axes import KernelAxes
from lora_jax.core._boxes import content, is_quantized
from lora_jax.core._model_axes import ModelAxes
from lora_jax.core._numerics import float32_or_more
from lora_jax.core.quantized._array import QuantizedArray
from lora_jax.core.quantized._encode import quantized
from lora_jax.core.quantized._quantization import KINDS, Quantization
from lora_jax.core.rules._match_paths import matches_nothing, matching
from lora_jax.core.rules._rule import ALL_LINEAR
from lora_jax.trees._leaves import check_floating, is_finite
from lora_jax.trees._pair import base_of
from lora_jax.trees._paths import Key, path_of, unflatten
from lora_jax.trees._quantized_leaf import quantized_leaf
from lora_jax.trees._states import parameters_in


def quantize(
    params: chex.ArrayTree,
    kinds: Mapping[str, str | Quantization],
    *,
    axes: Mapping[str, KernelAxes] | None = None,
) -> chex.ArrayTree:
    """Quantizes the kernels that match a pattern, for a frozen base of few bits (QLoRA).

    Each becomes a :class:`QuantizedArray`, which dequantizes where the model reads it: the plain
    model takes the tree as it is, and so do all functions of this library. Nothing is trained in
    it; adapters are for what it dequantizes to.

    Args:
      params: the parameters of a model, or its frozen base; the ``nnx.State`` of an NNX model.
      kinds: for each pattern, a regular expression that matches whole paths, how its kernels are
        quantized: ``"int8"``, ``"int4"``, ``"nf4"``, ``"fp8"``, or a :class:`Quantization`. The
        first pattern that matches a path counts. ``"all-linear"`` is all linear layers but output
        heads, as in a :class:`Rule`, and needs ``axes``.
      axes: of the kernels, from :func:`lora_jax.kernel_axes`. Without it each is a matrix
        ``(d, k)``. Scales are for numbers of one column, along ``d``.

    Returns:
      A tree like ``params``.

    Raises:
      TypeError: if ``params`` is not a nested dict or a state, or a kind is none.
      ValueError: if a pattern matches nothing or never counts, or a leaf that matches is not a
        floating-point kernel, has NaN, or is quantized. The message names it.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (256, 64), jnp.bfloat16)}
      >>> quantized = lora_jax.quantize(params, {"kernel": "nf4"})
      >>> round(quantized["kernel"].nbytes / params["kernel"].nbytes, 3)
      0.258
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=4, variant="dora")])
      >>> frozen, adapters = lora_jax.lora_init(jax.random.key(1), quantized, config)
    """
    flat = base_of(params, "params")
    leaves = {
        path_of(key): key for key, leaf in parameters_in(flat).items() if leaf is not empty_node
    }
    out: dict[Key, Any] = dict(flat)
    for path, quantization in assigned(kinds, list(leaves), axes).items():
        key = leaves[path]
        own = axes_to_quantize(path, flat[key], axes)
        out[key] = quantize_leaf(path, flat[key], quantization, own)
    return unflatten(out, params)


def quantize_leaf(path: str, leaf: Any, quantization: Quantization, axes: KernelAxes) -> Any:
    """One leaf, quantized, in its box.

    Args:
      path: of the leaf.
      leaf: a kernel.
      quantization: how.
      axes: of the kernel.

    Raises:
      ValueError: if it is quantized, or not finite.
    """
    kernel = content(leaf)
    if is_quantized(kernel):
        raise ValueError(
            f"{path!r} is quantized, {kernel.quantization}. Quantize the parameters as they were "
            f"before; to have it as a float, lora_jax.dequantize(params)."
        )
    if isinstance(kernel, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{path!r} is a jax.ShapeDtypeStruct, which has no numbers. To see what quantizing "
            f"gives: jax.eval_shape(lambda params: lora_jax.quantize(params, kinds), params)."
        )
    if not is_finite(kernel):
        raise ValueError(f"The kernel {path!r} has NaN or infinite values, which have no codes.")
    kernel = jnp.asarray(kernel)
    codes = quantized(kernel, quantization, axes)
    if not is_traced(kernel) and bool(_lost(kernel, codes)):
        raise ValueError(
            f"The kernel {path!r} has numbers that are too small or too large for scales in "
            f"float32: leave it out of what is quantized."
        )
    return quantized_leaf(leaf, codes)


@jax.jit
def _lost(kernel: chex.Array, codes: QuantizedArray) -> chex.Array:
    """Whether the numbers of a block are all beyond what its scale can say."""
    largest = jnp.max(jnp.abs(kernel.astype(float32_or_more(kernel.dtype))))
    W = codes.dequantize().astype(largest.dtype)
    return (jnp.max(jnp.abs(W)) < largest / 2) | ~jnp.isfinite(W).all()


def assigned(
    kinds: Mapping[str, str | Quantization], paths: list[str], axes: object
) -> dict[str, Quantization]:
    """The first kind whose pattern matches, for each path.

    Raises:
      TypeError: if it is no mapping of patterns to kinds.
      ValueError: if a pattern matches nothing, or never comes first.
    """
    if not isinstance(kinds, Mapping):
        raise TypeError(
            f"kinds must be a mapping of patterns to kinds, as {{'.*/kernel': 'nf4'}}, got "
            f"{kinds!r}."
        )
    found: dict[str, Quantization] = {}
    for pattern, kind in kinds.items():
        if not isinstance(kind, str | Quantization):
            raise TypeError(
                f"kinds[{pattern!r}] must be one of {', '.join(KINDS)}, or a Quantization, got "
                f"{kind!r}."
            )
        matched = _linear(axes, paths) if pattern == ALL_LINEAR else matching(pattern, paths)
        if not matched:
            raise ValueError(matches_nothing(f"The pattern {pattern!r}", pattern, paths))
        quantization = Quantization(kind) if isinstance(kind, str) else kind
        won = {path: quantization for path in matched if path not in found}
        if not won:
            raise ValueError(
                f"The pattern {pattern!r} never counts: patterns before it match all its paths. "
                f"Put the more special one first, or remove this one."
            )
        found |= won
    return found


def _linear(axes: object, paths: list[str]) -> list[str]:
    if not isinstance(axes, ModelAxes):
        raise ValueError(
            f"Which layers are linear, for {ALL_LINEAR!r}, is known from the model only: pass "
            f"axes=lora_jax.kernel_axes(model, variables, *args)."
        )
    return [path for path in paths if path in axes.linear and path not in axes.heads]


def axes_to_quantize(
    path: str,
    leaf: Any,
    axes: Mapping[str, KernelAxes] | None,
    of_adapter: KernelAxes | None = None,
) -> KernelAxes:
    """The axes of a leaf that is to be quantized.

    Args:
      path: of the leaf.
      leaf: the kernel.
      axes: of the kernels, where they are known.
      of_adapter: those that its adapter has, if there is one.

    Raises:
      ValueError: if it is no floating-point kernel, or its axes are not known.
    """
    kernel = content(leaf)
    if not is_quantized(kernel):
        check_floating(path, leaf, "params has")
    shape = tuple(kernel.shape)
    if 0 in shape:
        raise ValueError(f"{path!r} is of shape {shape}, in which there are no numbers.")
    known = axes.kernels if isinstance(axes, ModelAxes) else axes or {}
    found = of_adapter or known.get(path)
    if found is not None and found.ndim == len(shape):
        return dataclasses.replace(found, fused=1, parts=(), alone=None)
    batch = axes.batch.get(path, ()) if isinstance(axes, ModelAxes) else ()
    left = [axis for axis in range(len(shape)) if axis not in batch]
    if found is None and len(left) == 2:
        return KernelAxes(tuple(left[:1]), tuple(left[1:]), tuple(batch))
    there = "of no kernel that is known to axes" if axes is not None else "not a matrix (d, k)"
    raise ValueError(
        f"A pattern matches {path!r}, of shape {shape}, which is {there}. Pass "
        f"axes=lora_jax.kernel_axes(model, variables, *args), or a mapping of paths to "
        f"lora_jax.KernelAxes; and where it is not a kernel at all, such as a bias or a scale, "
        f"make the pattern narrower."
    )
