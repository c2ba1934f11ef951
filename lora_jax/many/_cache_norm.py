"""DoRA's norm computed once, for inference."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from lora_jax.core._adapter import Adapter
from lora_jax.core._adapter_stack import AdapterStack
from lora_jax.core._boxes import unbox
from lora_jax.core.products._normal_form import low_rank
from lora_jax.many._stack_adapters import stack_adapters
from lora_jax.trees._pair import base_of, check_pair, nodes_of
from lora_jax.trees._paths import flatten, path_of, unflatten


def cache_norm(frozen: chex.ArrayTree, adapters: chex.ArrayTree) -> chex.ArrayTree:
    """Computes DoRA's norm once, for inference: ``m`` becomes ``a = m / ||W + s U V||_c``.

    Outputs stay the same, and a call of the model no longer computes a norm of every kernel, for
    each adapter that there is. (They may come nearer to the formula: the norm is computed with
    ``U V`` formed, which loses no digits where an adapter removes most of a column.) What is left
    is ``W' = a (W + s U V)``, which trains otherwise than DoRA, and which PEFT does not have: keep
    the adapters themselves. Of other variants what is left is their normal form, or ``W' - W``
    where they have none.

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
    counts = [getattr(node, "count", None) for node in nodes.values()]
    count = next((count for count in counts if count is not None), None)
    for key, node in nodes.items():
        check_pair(key, node, base, count)
        if isinstance(node, Adapter | AdapterStack):
            out[key] = _cached(path_of(key), jnp.asarray(unbox(base[key])), node)
    return unflatten(out, adapters)


def _cached(path: str, kernel: chex.Array, node: Adapter | AdapterStack) -> Any:
    """The normal form in the place of an adapter, or of each of a stack."""
    if isinstance(node, AdapterStack):
        members = [node.member(i) for i in range(len(node.members))]
        if all(one is None or low_rank(kernel, one) is one for one in members):
            return node
        return stack_adapters(path, [one and low_rank(kernel, one) for one in members])
    if node.count is None:
        return low_rank(kernel, node)
    # One at a time, so that no more than one U V is in memory.
    arrays = jax.lax.map(
        lambda arrays: dict(low_rank(kernel, node.replace(arrays=arrays)).arrays), dict(node.arrays)
    )
    one = jax.eval_shape(lambda node: low_rank(kernel, jax.tree.map(lambda x: x[0], node)), node)
    cached: Adapter = one.replace(arrays=arrays)
    return cached
