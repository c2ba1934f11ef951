"""A quantized base as the floats that it stands for."""

from __future__ import annotations

import chex

from lora_jax.core._boxes import content, is_quantized, rebox, unbox
from lora_jax.trees._pair import base_of
from lora_jax.trees._paths import unflatten


def dequantize(params: chex.ArrayTree) -> chex.ArrayTree:
    """The parameters with floats in place of codes: what the model computes with.

    Args:
      params: the parameters, some of them quantized.

    Returns:
      A tree like ``params``, in which nothing is quantized.

    Example:
      >>> import jax.numpy as jnp, lora_jax
      >>> quantized = lora_jax.quantize({"kernel": jnp.eye(4)}, {"kernel": "int8"})
      >>> bool((lora_jax.dequantize(quantized)["kernel"] == jnp.eye(4)).all())
      True
    """
    flat = base_of(params, "params")
    for key, leaf in flat.items():
        if is_quantized(content(leaf)):
            flat[key] = rebox(leaf, unbox(leaf))
    return unflatten(flat, params)
