"""DoRA's norm computed once, for inference."""

from __future__ import annotations

import chex
import jax.numpy as jnp

from lora_jax.core._adapter import Adapter
from lora_jax.core._boxes import unbox
from lora_jax.core._variants import magnitude_ratio
from lora_jax.core.products._norm import dense_norm
from lora_jax.trees._pair import base_of, check_pair, nodes_of
from lora_jax.trees._paths import flatten, unflatten


def cache_norm(frozen: chex.ArrayTree, adapters: chex.ArrayTree) -> chex.ArrayTree:
    """Computes DoRA's norm once, for inference: ``m`` becomes ``a = m / ||W + s U V||_c``.

    Outputs stay the same, and a call of the model no longer computes a norm of every kernel, for
    each adapter that there is. (They may come nearer to the formula: the norm is computed with
    ``U V`` formed, which loses no digits where an adapter removes most of a column.) What is left
    is ``W' = a (W + s U V)``, which trains otherwise than DoRA, and which PEFT does not have: keep
    the adapters themselves.

    Args:
      frozen: the base, or all parameters of the model.
      adapters: one adapter, or several from :func:`stack`. LoRA stays as it is.

    Raises:
      TypeError: if a tree is not a nested dict, or if adapters are as a file has them, of arrays
        only.
      ValueError: if the adapters, which may be stacked, do not fit the base.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((4, 2))}
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=1, variant="dora")])
      >>> frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config)
      >>> lora_jax.cache_norm(frozen, adapters)["kernel"].m
      Array([1., 1.], dtype=float32)
    """
    base = base_of(frozen)
    out = flatten(adapters, "adapters")
    nodes = nodes_of(adapters, base=base)
    counts = [node.count for node in nodes.values() if isinstance(node, Adapter)]
    count = next((count for count in counts if count is not None), None)
    for key, node in nodes.items():
        check_pair(key, node, base, count)
        if isinstance(node, Adapter) and node.variant == "dora":
            out[key] = with_cached_norm(jnp.asarray(unbox(base[key])), node)
    return unflatten(out, adapters)


def with_cached_norm(kernel: chex.Array, adapter: Adapter) -> Adapter:
    """The adapter with ``a = m / ||W + s U V||_c`` for ``m``."""
    norm = dense_norm(kernel, adapter)
    a = magnitude_ratio(jnp.asarray(adapter.m).astype(norm.dtype), norm)
    return adapter.replace(m=a, variant="scaled", detach_norm=False)  # type: ignore[attr-defined, no-any-return]
