"""The normal form of an adapter, ``W' = a (W + s L R)``, as its layer computes with it.

It depends on parameters only, so it is computed once for a call of the model, outside of its layers
and of what rematerialises them, from the arrays of the variant and the kernel. LoRA is its own
normal form. Of DoRA only ``a = m / ||W + s U V||_c`` is computed. In the layers there are no other
variants than these two: plain LoRA, and LoRA with an ``a``.

A variant that has no normal form stays as it is, and its layer forms ``W' - W``
(``_layer_factors.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import chex
import jax
from jax.sharding import PartitionSpec

from lora_jax.core._adapter import Adapter
from lora_jax.core._axes import KernelAxes
from lora_jax.core._meshes import left_to_compiler
from lora_jax.core.products._dequantized import computed_by_layer
from lora_jax.core.variants._apply_variant import Known, known, low_rank_form
from lora_jax.core.variants._cached_norm import CachedNorm
from lora_jax.core.variants._lora import LoRA
from lora_jax.core.variants._variant import Variant

# The two variants that layers compute with, and their numbers for the base alone.
PLAIN, SCALED = LoRA(), CachedNorm()
NOTHING = {"U": 0.0, "V": 0.0, "m": 1.0}


def normalized(kernel: chex.Array, adapter: Adapter) -> Adapter:
    """One adapter as its layer has it: a LoRA, with ``a`` in the place of ``m`` if there is one.

    Args:
      kernel: as it is stored.
      adapter: its adapter. A variant without a normal form stays as it is.
    """
    found = _known(adapter, kernel.shape, exact=False)
    return adapter if found is None else _computed(kernel, adapter, found, exact=False)


def low_rank(kernel: chex.Array, adapter: Adapter) -> Adapter:
    """The same, exactly and for every variant: ``W' - W`` in the factors where there are none.

    Args:
      kernel: as it is stored.
      adapter: its adapter.
    """
    found = _known(adapter, kernel.shape, exact=True) or dense(
        *adapter.axes.matrix_shape(kernel.shape)
    )
    return _computed(kernel, adapter, found, exact=True)


def _known(adapter: Adapter, shape: tuple[int, ...], exact: bool) -> Known | None:
    d, k = adapter.axes.matrix_shape(shape)
    return known(adapter.variant, d, k, adapter.rank, exact)


def dense(d: int, k: int) -> Known:
    """What is known where ``W' - W`` and a unit matrix are the factors."""
    return Known(has_a=False, left=None, right=None, width=min(d, k))


def _computed(kernel: chex.Array, adapter: Adapter, found: Known, exact: bool) -> Adapter:
    if adapter.variant in (PLAIN, SCALED):
        return adapter
    factors: dict[str, Any] = {}
    if found.left is not None and found.right is not None:
        factors = {"U": adapter.arrays[found.left], "V": adapter.arrays[found.right]}
    if factors and not found.has_a:
        return _as_lora(adapter, factors)
    form = functools.partial(
        _form, variant=adapter.variant, s=adapter.scale, found=found, exact=exact
    )
    compute = functools.partial(computed_by_layer, form, axes=adapter.axes)
    *stack, d, k = adapter.axes.matrix_spec(kernel)
    like = {"m": PartitionSpec(*stack, k)} if found.has_a else {}
    if not found.forwards:
        like |= {"U": PartitionSpec(*stack, d, None), "V": PartitionSpec(*stack, None, k)}
    arrays = left_to_compiler(compute, kernel, dict(adapter.arrays), like=like)
    return _as_lora(adapter, arrays | factors)


@functools.partial(jax.jit, static_argnames=("axes", "variant", "s", "found", "exact"))
def _form(
    kernel: chex.Array,
    arrays: Mapping[str, chex.Array],
    *,
    axes: KernelAxes,
    variant: Variant,
    s: float,
    found: Known,
    exact: bool,
) -> dict[str, chex.Array]:
    """``a``, and the factors where they are no arrays of the variant."""
    form = low_rank_form(variant, axes.as_matrix(kernel), s, arrays, exact)
    out = {} if form.a is None else {"m": form.a}
    return out if found.forwards else out | {"U": form.L, "V": form.R}


def _as_lora(adapter: Adapter, arrays: Mapping[str, chex.Array]) -> Adapter:
    """The adapter with the normal form in its place, and with the same scale."""
    rank = arrays["U"].shape[-1]
    fields: dict[str, Any] = {"variant": SCALED if "m" in arrays else PLAIN}
    if rank != adapter.rank:
        fields |= {"rank": rank, "alpha": adapter.scale * rank, "rslora": False}
    return adapter.replace(arrays=dict(arrays), **fields)
