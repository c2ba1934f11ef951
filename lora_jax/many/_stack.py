"""Several adapters of one base as one tree, on an axis in front."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lora_jax.core._meshes import left_to_compiler, spec_of
from lora_jax.core._node import Node
from lora_jax.many._conform import common, conform
from lora_jax.trees._pair import base_of, check_pair, nodes_of
from lora_jax.trees._paths import Key, path_of, unflatten


def stack(
    adapters: Sequence[chex.ArrayTree], params: chex.ArrayTree | None = None
) -> chex.ArrayTree:
    """Stacks adapters of one base on a new axis in front.

    So one program serves them all, by ``lora_apply(..., adapter_ids=ids)``, or trains them all, by
    ``jax.vmap``. Each computes what it computed alone. Ranks are padded with zeros, which stay zero
    in training. An adapter that lacks a kernel that another one adapts gets a zero adapter there,
    and one that lacks a leaf that another one fully trained gets the base's. Next to DoRA, LoRA
    gets the magnitude ``m = ||W + s U V||_c``, with which DoRA's ``W'`` is ``W + s U V``.

    That is for what they compute. They all train alike: next to DoRA, LoRA trains its
    ``m`` too; where some have ``detach_norm``, all have the exact gradient; where scales differ,
    ``s`` is multiplied into ``U``, and an optimizer's steps are others. (So to train several ranks
    side by side give them one scale, ``alpha = c * rank``.) Where rates of dropout differ, that it
    is active is an error.

    Adapters of equal structure, as from ``jax.vmap(lora_init, ...)`` over keys or a tree map of
    ``jnp.stack``, need no more than that.

    Args:
      adapters: the adapters, each as from :func:`lora_init` or :func:`load`.
      params: the model's parameters, all of them; needed only where one adapter lacks what another
        one has, or where LoRA is next to DoRA.

    Returns:
      One tree: every array has the number of adapters as its first size. ``jax.tree.map(lambda x:
      x[i], stacked)`` is adapter ``i`` alone.

    Raises:
      TypeError: if the trees are of another kind.
      ValueError: if there are no adapters, if they are of different models or differ in what no
        padding can hide, or if ``params`` is needed and missing. The message names the path.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lora_jax
      >>> model, x = nn.Dense(3), jnp.ones((4, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> a, b = (
      ...     lora_jax.lora_init(jax.random.key(r), params, lora_jax.LoraConfig([rule]))[1]
      ...     for r, rule in enumerate([
      ...         lora_jax.Rule("kernel", rank=1), lora_jax.Rule("kernel", rank=2, variant="dora")
      ...     ])
      ... )
      >>> stacked = lora_jax.stack([a, b], params)
      >>> stacked["kernel"].U.shape, stacked["kernel"].m.shape
      ((2, 5, 2), (2, 3))
      >>> ids = jnp.array([1, 0, -1, 1])  # -1 is the base alone
      >>> lora_jax.lora_apply(model, {"params": params}, stacked, x, adapter_ids=ids).shape
      (4, 3)
    """
    base = None if params is None else base_of(params, "params")
    trees = nodes_of_each(adapters, base)
    base = base or {}
    out: dict[Key, Any] = {}
    for key in dict.fromkeys(key for tree in trees for key in tree):
        nodes, leaf = [tree.get(key) for tree in trees], base.get(key)
        like = common(path_of(key), [node for node in nodes if node is not None])
        same = [conform(path_of(key), node, like, leaf) for node in nodes]
        out[key] = jax.tree.map(_stacked, *same).as_leaf()
    return unflatten(out, adapters[0])


def _stacked(first: chex.Array, *others: chex.Array) -> chex.Array:
    """The arrays on a new axis in front, in a mesh sharded as the first."""

    def stacked(*arrays: chex.Array) -> chex.Array:
        widest = max((array.dtype for array in arrays), key=lambda dtype: dtype.itemsize)
        return jnp.stack([array.astype(widest) for array in arrays])

    like = PartitionSpec(None, *spec_of(first))
    out: chex.Array = left_to_compiler(stacked, first, *others, like=like)
    return out


def nodes_of_each(
    adapters: Sequence[chex.ArrayTree], base: Mapping[Key, Any] | None, what: str = "adapters"
) -> list[dict[Key, Node]]:
    """The nodes of each tree by their keys, when they can be stacked.

    Args:
      adapters: the trees.
      base: the leaves of the model, where they are known.
      what: the name of the trees, for messages.
    """
    if isinstance(adapters, Mapping) or not isinstance(adapters, Iterable):
        raise TypeError(f"stack takes a list of adapters, got {type(adapters).__name__}.")
    trees = [nodes_of(tree, f"{what}[{i}]", base) for i, tree in enumerate(adapters)]
    if not trees:
        raise ValueError("There is nothing to stack: the list of adapters is empty.")
    for i, tree in enumerate(trees):
        for key, node in tree.items():
            node.check_stacks(path_of(key), f"{what}[{i}]")
            if base is not None:
                check_pair(key, node, base, name="params")
    return trees
