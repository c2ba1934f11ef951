"""The structure and the shapes of a pool's adapters, and how an adapter is brought to them.

All that is static in the tree, and every shape, is decided once by examples. So a program that is
compiled for one adapter is compiled for all. What varies between adapters goes into the numbers:
the scale into ``U``, a smaller rank into zeros, DoRA's norm into ``a = m / ||W + s U V||_c``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import chex
import jax
import numpy as np
from flax.traverse_util import empty_node

from lora_jax.core._adapter import Adapter
from lora_jax.many._conform import common, conform
from lora_jax.many._stack import nodes_of_each
from lora_jax.trees._pair import base_of, check_pair, near, nodes_of
from lora_jax.trees._paths import Key, path_of, unflatten

_MAKE = "make the pool with an adapter like it in `like`"


class AdapterStructure:
    """What all adapters of a pool are brought to.

    Args:
      params: the model's parameters, all of them.
      like: adapters that together have the targets, the largest rank, the variants and the leaves
        fully trained.

    Attributes:
      nbytes: of one adapter.

    Raises:
      TypeError: if the trees are of another kind.
      ValueError: if examples do not fit the model, or each other; the message names the path.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((5, 4))}
      >>> def adapters(rank, alpha):
      ...     config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=rank, alpha=alpha)])
      ...     return lora_jax.lora_init(jax.random.key(0), params, config)[1]
      >>> structure = AdapterStructure(params, [adapters(4, 1.0)])
      >>> one = structure.fit("reviews", adapters(2, 16.0))
      >>> one["kernel"].U.shape, one["kernel"].scale, structure.nbytes
      ((5, 4), 1.0, 144)
    """

    def __init__(self, params: chex.ArrayTree, like: Any) -> None:
        if not isinstance(like, Mapping | list | tuple) or not like:
            raise TypeError(
                f"like must be adapters, or a list of them, where one has the largest rank; got "
                f"{like!r}."
            )
        like = [like] if isinstance(like, Mapping) else like
        self._params = params
        self._base = base_of(params, "params")
        for i, tree in enumerate(like):  # missing leaves have another message below
            for key in nodes_of(tree, f"like[{i}]", self._base):
                self._leaf(key)
        trees = nodes_of_each(like, self._base, "like")
        self._nodes: dict[Key, Any] = {}
        for key in dict.fromkeys(key for tree in trees for key in tree):
            path, nodes = path_of(key), [tree[key] for tree in trees if key in tree]
            leaf = self._leaf(key)
            like_all = common(path, list(map(_for_inference, nodes)))
            if like_all.in_base:
                product = "auto" if like_all.product == "dense" else like_all.product
                like_all = like_all.replace(
                    alpha=float(like_all.rank), rslora=False, product=product
                )
            nothing = conform(path, None, like_all, leaf)
            self._nodes[key] = jax.tree.map(np.asarray, nothing)
        if not self._nodes:
            raise ValueError("like has no adapters in it: there is nothing to hold in a pool.")
        for i, tree in enumerate(like):
            self.fit(f"like[{i}]", tree)
        self.nbytes: int = sum(array.nbytes for array in jax.tree.leaves(self.base_alone()))

    def base_alone(self) -> chex.ArrayTree:
        """An adapter that adds nothing, with this structure."""
        return unflatten({k: node.as_leaf() for k, node in self._nodes.items()}, self._params)

    def fit(self, name: str, adapters: chex.ArrayTree) -> chex.ArrayTree:
        """Adapters with this structure, as arrays of NumPy.

        Args:
          name: for messages.
          adapters: as from :func:`lora_jax.load`.

        Raises:
          TypeError: if it is not a tree of adapters.
          ValueError: if this structure has no room for the adapters, or if they are not finite. The
            message names the adapter and the path.
        """
        try:
            nodes = nodes_of(adapters, "it", self._base)
            for key, node in nodes.items():
                node.check_stacks(path_of(key), "it")
                if key not in self._nodes:
                    raise ValueError(
                        f"it has {path_of(key)!r}, which nothing in the pool has: {_MAKE}. Nearest "
                        f"paths: {near(key, self._nodes)}."
                    )
                check_pair(key, node, self._base, name="params")
            out = {key: self._conform(key, nodes.get(key)).as_leaf() for key in self._nodes}
        except TypeError as error:
            raise TypeError(f"Adapter {name!r} does not fit the pool: {error}") from error
        except ValueError as error:
            raise ValueError(f"Adapter {name!r} does not fit the pool: {error}") from error
        return unflatten(out, self._params)

    def _conform(self, key: Key, node: Any) -> Any:
        like, path = self._nodes[key], path_of(key)
        if node is None:
            return like
        leaf = self._leaf(key)
        if node.in_base and like.in_base:
            node = _of_rank(path, _for_inference(node, "dora"), like)
        common(path, [like, node])  # raises where they differ in what nothing can hide
        found = conform(path, node, like, leaf)
        return jax.tree.map(lambda x, like: _as(path, np.asarray(x), like.dtype), found, like)

    def _leaf(self, key: Key) -> Any:
        leaf = self._base.get(key, empty_node)
        if leaf is empty_node:
            raise ValueError(
                f"There is an adapter for {path_of(key)!r}, which the model's parameters lack: a "
                f"pool takes all of them, not the frozen base. Nearest paths: "
                f"{near(key, self._base)}."
            )
        return leaf


def _for_inference(node: Any, dora: str = "scaled") -> Any:
    """Without what matters in training only."""
    if not node.in_base:
        return node
    variant = dora if node.variant == "dora" else node.variant
    return node.replace(variant=variant, detach_norm=False, dropout=0.0)


def _of_rank(path: str, node: Adapter, like: Adapter) -> Adapter:
    """With the rank of ``like`` and the scale 1, so that nothing is compiled for another one.

    In NumPy, as JAX compiles its operations for every shape.
    """
    if node.rank > like.rank:
        raise ValueError(
            f"at {path!r} it has rank {node.rank}, and the pool has room for {like.rank}: {_MAKE}."
        )
    if node.m is not None and like.variant == "lora":
        raise ValueError(
            f"at {path!r} it is DoRA, and there is only LoRA there in the pool: {_MAKE}."
        )
    parts = set(node.axes.parts) - set(like.axes.parts)
    if parts and dataclasses.replace(node.axes, parts=like.axes.parts) == like.axes:
        raise ValueError(
            f"at {path!r} it adapts the parts {node.axes.parts} of {like.axes.fused}, and there "
            f"are only {like.axes.parts} in the pool: {_MAKE}."
        )
    U, V = np.asarray(node.U) * node.scale, np.asarray(node.V)
    pad = (0, like.rank - node.rank)
    none = (0, 0)
    padded: Adapter = node.replace(  # type: ignore[attr-defined]
        U=np.pad(U, [none] * (U.ndim - 1) + [pad]),
        V=np.pad(V, [none] * (V.ndim - 2) + [pad, none]),
        rank=like.rank,
        alpha=like.alpha,
        rslora=like.rslora,
    )
    return padded


def _as(path: str, array: np.ndarray, dtype: Any) -> np.ndarray:
    if not np.can_cast(array.dtype, dtype):
        raise ValueError(
            f"at {path!r} it has {array.dtype}, which the pool's {dtype} cannot hold: {_MAKE}."
        )
    # In a batch of mixed requests it could reach rows that have another adapter, as 0 * NaN = NaN.
    if not np.isfinite(array).all():
        raise ValueError(f"at {path!r} it has NaN or infinite values.")
    return np.array(array, dtype)  # a copy, as JAX on a CPU would use the caller's memory
