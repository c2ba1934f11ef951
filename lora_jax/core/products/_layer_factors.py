"""The factors of one layer, with those of fused kernels as the factors of one matrix."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lora_jax.core._adapter import Adapter
from lora_jax.core._axes import KernelAxes
from lora_jax.core._meshes import left_to_compiler, spec_of
from lora_jax.core._numerics import float32_or_more
from lora_jax.core.products._dequantized import computed_of
from lora_jax.core.products._normal_form import PLAIN, SCALED
from lora_jax.core.variants._apply_variant import of_matrices


class LayerFactors(NamedTuple):
    """``W' = a (W + s U V)`` of one layer, with any fused kernels as one matrix.

    Attributes:
      U: ``(*batch, d, r)``.
      V: ``(*batch, r, k)``; or ``None``, and then ``U`` is all of ``W' - W``, ``(*batch, d, k)``.
      a: ``(*batch, k)``, or ``None`` for LoRA.
      s: the scale.
      product: what the call says of the product.
      path: of the kernel, for messages.
    """

    U: chex.Array
    V: chex.Array | None
    a: chex.Array | None
    s: float
    product: str = "auto"
    path: str = ""


def layer_factors(
    kernel: chex.Array, adapter: Adapter, product: str = "auto", path: str = ""
) -> LayerFactors:
    """The factors of one layer.

    Those of fused kernels become those of one matrix, with a rank of ``r`` for each part. With the
    parts ``b`` and ``c`` of three fused kernels they are

        U = [U_b | U_c]    V = [[V_b, 0, 0], [0, 0, V_c]]

    Args:
      kernel: of the layer, as it is stored.
      adapter: in its normal form, see ``_normal_form.py``; or of a variant that has none.
      product: what the call says of the product.
      path: of the kernel, for messages.
    """
    axes, variant = adapter.axes, adapter.variant
    if variant not in (PLAIN, SCALED):
        *batch, d, k = dataclasses.replace(axes, fused=1, parts=()).matrix_spec(kernel)
        like = PartitionSpec(*batch, d, k if axes.fused == 1 else None)
        change = functools.partial(computed_of, _change)
        D = left_to_compiler(change, kernel, adapter, like=like)
        return LayerFactors(D, None, None, 1.0, product, path)
    U, V, a = adapter.U, adapter.V, adapter.m
    if axes.fused > 1:
        *lead, _, d, _ = spec_of(U)
        spec_of_a = None if a is None else PartitionSpec(*lead, None)
        specs = PartitionSpec(*lead, d, None), PartitionSpec(*lead, None, None), spec_of_a
        U, V, a = left_to_compiler(functools.partial(_as_one_matrix, axes), U, V, a, like=specs)
    return LayerFactors(U, V, a, adapter.scale, product, path)


@jax.jit
def _change(kernel: chex.Array, adapter: Adapter) -> chex.Array:
    """``W' - W`` of any variant, ``(*batch, d, k)`` with all fused outputs in ``k``."""
    axes, variant = adapter.axes, adapter.variant
    wide = kernel.astype(float32_or_more(kernel.dtype))
    W = axes.as_matrix(wide)
    D = of_matrices(variant, variant.kernel, W, adapter.scale, adapter.arrays) - W
    whole = axes.from_matrix(D, jnp.zeros_like(wide))
    return dataclasses.replace(axes, fused=1, parts=()).as_matrix(whole)


def _as_one_matrix(axes: KernelAxes, U: chex.Array, V: chex.Array, a: Any) -> tuple[Any, Any, Any]:
    *lead, count, r, k = V.shape
    parts = np.array(axes.parts)
    U = jnp.moveaxis(U, -3, -2)
    U = jnp.reshape(U, (*U.shape[:-2], count * r))
    blocks = jnp.zeros((count, *lead, r, axes.fused, k), V.dtype)
    blocks = blocks.at[np.arange(count), ..., parts, :].set(jnp.moveaxis(V, -3, 0))
    V = jnp.reshape(jnp.moveaxis(blocks, 0, -4), (*lead, count * r, axes.fused * k))
    if a is not None:
        ones = jnp.ones((*lead, axes.fused, k), a.dtype)
        a = jnp.reshape(ones.at[..., parts, :].set(a), (*lead, axes.fused * k))
    return U, V, a
