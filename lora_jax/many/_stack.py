"""Several adapters of one base as one tree, on an axis in front, and apart again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import chex
import jax

from lora_jax.core._adapter_stack import AdapterStack
from lora_jax.core._node import Node
from lora_jax.many._stack_adapters import stack_adapters, stack_arrays
from lora_jax.many._stack_fully_trained import check_kinds, fully_trained
from lora_jax.trees._pair import base_of, check_pair, nodes_of
from lora_jax.trees._paths import Key, path_of, unflatten
from lora_jax.trees._stack_size import stack_size


def stack(
    adapters: Sequence[chex.ArrayTree], params: chex.ArrayTree | None = None
) -> chex.ArrayTree:
    """Stacks adapters of one base on a new axis in front.

    So one program serves them all, or trains them all, by ``lora_apply(..., adapter_ids=ids)``.
    Each computes and trains as it would alone, with its own variant, rank, scale and dropout. Ranks
    are padded with zeros, which stay zero in training by an optimizer that works entry by entry.
    Arrays that one variant has and another one has not are zeros that are not read. An adapter that
    lacks a kernel that another one adapts changes nothing there, and one that lacks a leaf that
    another one fully trained gets the base's.

    ``jax.vmap`` over a stack is for adapters that differ in no more than their ranks, as then a row
    of it need not say which adapter it is. The order of the rows is that of the members: for
    another order, stack anew what :func:`unstack` gives. Adapters of equal structure may also be
    stacked by ``jax.vmap(lora_init, ...)`` over keys, or by a tree map of ``jnp.stack``.

    Args:
      adapters: the adapters, each as from :func:`lora_init` or :func:`load`.
      params: the model's parameters, all of them; needed only where one adapter lacks a leaf that
        another one has fully trained.

    Returns:
      One tree: every array has the number of adapters as its first size. :func:`unstack` takes it
      apart again.

    Raises:
      TypeError: if the trees are of another kind.
      ValueError: if there are no adapters, if they are of different models or differ in what no
        zeros make up for, or if ``params`` is needed and missing. The message names the path.

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
        path = path_of(key)
        nodes: list[Any] = [tree.get(key) for tree in trees]
        check_kinds(path, nodes)
        if next(node for node in nodes if node is not None).in_base:
            out[key] = stack_adapters(path, nodes)
        else:
            same = [fully_trained(path, node, nodes, base.get(key)) for node in nodes]
            out[key] = jax.tree.map(stack_arrays, *same).as_leaf()
    return unflatten(out, adapters[0])


def unstack(stacked: chex.ArrayTree) -> list[chex.ArrayTree]:
    """The adapters of a stack, each as it is alone: with its own rank, scale, variant and dropout.

    The inverse of :func:`stack`, but that leaves which an adapter got from the base stay in it.

    Args:
      stacked: as from :func:`stack`, trained since or not.

    Raises:
      TypeError: if it is not a tree of adapters.
      ValueError: if it is not stacked.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((5, 4))}
      >>> a, b = (
      ...     lora_jax.lora_init(jax.random.key(r), params, lora_jax.LoraConfig([rule]))[1]
      ...     for r, rule in enumerate([
      ...         lora_jax.Rule("kernel", rank=1), lora_jax.Rule("kernel", rank=2, alpha=1.0)
      ...     ])
      ... )
      >>> [one["kernel"].U.shape for one in lora_jax.unstack(lora_jax.stack([a, b]))]
      [(5, 1), (5, 2)]
    """
    nodes = nodes_of(stacked, "stacked")
    count = stack_size(list(nodes.values()), "unstack is")

    def one(i: int) -> chex.ArrayTree:
        out: dict[Key, Any] = {}
        for key, node in nodes.items():
            found = (
                node.member(i)
                if isinstance(node, AdapterStack)
                else jax.tree.map(lambda x: x[i], node)
            )
            if found is not None:
                out[key] = found.as_leaf()
        return unflatten(out, stacked)

    return [one(i) for i in range(count)]


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
