"""The factors of one layer, with those of fused kernels as the factors of one matrix."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lora_jax.core._adapter import Adapter
from lora_jax.core._axes import KernelAxes
from lora_jax.core._meshes import left_to_compiler, spec_of


class LayerFactors(NamedTuple):
    """``W' = a (W + s U V)`` of one layer, with any fused kernels as one matrix.

    Attributes:
      U: ``(*batch, d, r)``.
      V: ``(*batch, r, k)``.
      a: ``(*batch, k)``, or ``None`` for LoRA.
      s: the scale.
      product: what the rule says of the product.
      path: of the kernel, for messages.
    """

    U: chex.Array
    V: chex.Array
    a: chex.Array | None
    s: float
    product: str = "auto"
    path: str = ""


def layer_factors(adapter: Adapter, path: str = "") -> LayerFactors:
    """The factors of one layer.

    Those of fused kernels become those of one matrix, with a rank of ``r`` for each part. With the
    parts ``b`` and ``c`` of three fused kernels they are

        U = [U_b | U_c]    V = [[V_b, 0, 0], [0, 0, V_c]]

    Args:
      adapter: with ``a`` in the place of ``m``, see ``normalized`` in ``_norm.py``.
      path: of the kernel, for messages.
    """
    axes, U, V, a = adapter.axes, adapter.U, adapter.V, adapter.m
    if axes.fused > 1:
        *lead, _, d, _ = spec_of(U)
        spec_of_a = None if a is None else PartitionSpec(*lead, None)
        like = PartitionSpec(*lead, d, None), PartitionSpec(*lead, None, None), spec_of_a
        U, V, a = left_to_compiler(functools.partial(_as_one_matrix, axes), U, V, a, like=like)
    return LayerFactors(U, V, a, adapter.scale, adapter.product, path)


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
