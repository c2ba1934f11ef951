"""Adapters of other variants as what PEFT has: LoRA, or DoRA."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from lora_jax.core._adapter import Adapter
from lora_jax.core._boxes import unbox
from lora_jax.core._numerics import column_norm, float32_or_more, product
from lora_jax.core.products._normal_form import low_rank
from lora_jax.core.variants._apply_variant import known
from lora_jax.core.variants._cached_norm import CachedNorm
from lora_jax.core.variants._dora import DoRA
from lora_jax.core.variants._lora import LoRA


def as_lora_or_dora(path: str, leaf: Any, adapter: Adapter) -> Adapter:
    """An adapter that computes the same: by its normal form ``W' = a (W + s L R)``.

    With ``a = 1`` that is the LoRA of ``L`` and ``R``, and else their DoRA, whose magnitude is
    ``m = a ||W + s L R||_c``.

    Args:
      path: of the kernel, for messages.
      leaf: the kernel.
      adapter: the adapter.

    Raises:
      ValueError: if its variant has no normal form, or is for a base that it has changed.
    """
    variant = adapter.variant
    if adapter.changes_base:
        raise ValueError(
            f"{path!r} has an adapter of variant {adapter.kind!r}, which changed the base at the "
            f"start, and PEFT's adapters are for the base itself. Merge it: lora_jax.export."
        )
    if type(variant) in (LoRA, DoRA, CachedNorm):
        return adapter
    kernel = jnp.asarray(unbox(leaf))
    if known(variant, *adapter.axes.matrix_shape(kernel.shape), adapter.rank) is None:
        raise ValueError(
            f"{path!r} has an adapter of variant {adapter.kind!r}, which is not a product of two "
            f"factors, so that PEFT's LoRA cannot hold it. Merge it: lora_jax.export; or let "
            f"lora_jax.compress(..., rank=r) find the nearest LoRA."
        )
    plain = low_rank(kernel, adapter)
    if plain.m is None:
        return plain
    W = plain.axes.as_matrix(kernel.astype(float32_or_more(kernel.dtype)))
    norm = column_norm(W + plain.scale * product(plain.U, plain.V))
    return plain.replace(m=plain.m * norm, variant=DoRA(detach_norm=True))
