"""The structure and the shapes of a pool's adapters, and how an adapter is brought to them.

All that is static in the tree, and every shape, is decided once by examples. So a program that is
compiled for one adapter is compiled for all. What varies between adapters goes into the numbers
of their normal form ``W' = a (W + L R)``: the scale into ``L``, a smaller rank into zeros, DoRA's
norm into ``a = m / ||W + s U V||_c``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import empty_node

from lora_jax.core._adapter import Adapter
from lora_jax.core._boxes import content, unbox
from lora_jax.core._numerics import float32_or_more
from lora_jax.core.products._normal_form import low_rank
from lora_jax.core.variants._apply_variant import known
from lora_jax.core.variants._cached_norm import CachedNorm
from lora_jax.core.variants._dora import DoRA
from lora_jax.core.variants._lora import LoRA
from lora_jax.core.variants._variant import Variant
from lora_jax.many._stack import nodes_of_each
from lora_jax.many._stack_adapters import check_alike
from lora_jax.many._stack_fully_trained import check_kinds, fully_trained
from lora_jax.trees._pair import base_of, check_pair, near, nodes_of
from lora_jax.trees._paths import Key, path_of, unflatten_adapters

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
            path = path_of(key)
            nodes: list[Any] = [tree[key] for tree in trees if key in tree]
            check_kinds(path, nodes)
            leaf = self._leaf(key)
            if nodes[0].in_base:
                check_alike(path, nodes)
                nothing = _nothing(nodes, content(leaf))
            else:
                nothing = fully_trained(path, None, nodes, leaf)
            self._nodes[key] = jax.tree.map(np.asarray, nothing)
        if not self._nodes:
            raise ValueError("like has no adapters in it: there is nothing to hold in a pool.")
        for i, tree in enumerate(like):
            self.fit(f"like[{i}]", tree)
        self.nbytes: int = sum(array.nbytes for array in jax.tree.leaves(self.base_alone()))

    def base_alone(self) -> chex.ArrayTree:
        """An adapter that adds nothing, with this structure."""
        nodes = {key: node.as_leaf() for key, node in self._nodes.items()}
        return unflatten_adapters(nodes, self._params)

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
        return unflatten_adapters(out, self._params)

    def _conform(self, key: Key, node: Any) -> Any:
        like, path = self._nodes[key], path_of(key)
        if node is None:
            return like
        leaf = self._leaf(key)
        check_kinds(path, [like, node])
        if node.in_base:
            check_alike(path, [like, node])
            found = _normal_form(path, node, like, unbox(leaf))
        else:
            found = fully_trained(path, node, [like], leaf)
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


def _nothing(nodes: Sequence[Adapter], kernel: Any) -> Adapter:
    """An adapter that adds nothing, in a normal form that all of these can be brought to."""
    first = nodes[0]
    d, k = first.axes.matrix_shape(kernel.shape)
    parts = tuple(sorted({part for node in nodes for part in node.axes.parts}))
    axes = dataclasses.replace(first.axes, parts=parts)
    forms = [known(node.variant, d, k, node.rank, exact=True) for node in nodes]
    rank = max(min(d, k) if form is None else form.width or 1 for form in forms)
    stack = axes.batch_shape(kernel.shape)
    arrays = {
        "U": np.zeros((*stack, d, rank), np.float32),
        "V": np.zeros((*stack, rank, k), np.float32),
    }
    variant: Variant = LoRA()
    if any(form is not None and form.has_a for form in forms):
        variant, dtype = CachedNorm(), float32_or_more(kernel.dtype)
        arrays["m"] = np.ones((*stack, k), dtype)
    return Adapter(
        arrays=arrays,
        variant=variant,
        rank=rank,
        alpha=float(rank),
        axes=axes,
        materialize=first.materialize,
        untied=first.untied,
        base_hash=first.base_hash,
    )


def _normal_form(path: str, node: Adapter, like: Adapter, kernel: Any) -> Adapter:
    """The normal form of an adapter, with the rank of ``like`` and the scale 1.

    As far as it goes in NumPy, as JAX compiles its operations for every shape.
    """
    parts = set(node.axes.parts) - set(like.axes.parts)
    if parts:
        raise ValueError(
            f"at {path!r} it adapts the parts {node.axes.parts} of {like.axes.fused}, and there "
            f"are only {like.axes.parts} in the pool: {_MAKE}."
        )
    d, k = node.axes.matrix_shape(kernel.shape)
    form = known(node.variant, d, k, node.rank, exact=True)
    width = min(d, k) if form is None else form.width
    if width > like.rank:
        raise ValueError(
            f"at {path!r} it has rank {width}, and the pool has room for {like.rank}: {_MAKE}."
        )
    if form is not None and form.has_a and like.m is None:
        raise ValueError(
            f"at {path!r} it is {'DoRA' if isinstance(node.variant, DoRA) else node.kind}, and "
            f"there is only LoRA there in the pool: {_MAKE}."
        )
    s, rank = node.scale, like.rank
    if type(node.variant) is DoRA:
        # With the pool's rank at once, so that it is compiled once.
        arrays = {**node.arrays, "U": _padded(node.U, -1, rank), "V": _padded(node.V, -2, rank)}
        alpha = s * rank
        node = node.replace(arrays=arrays, rank=rank, alpha=alpha, rslora=False)
    if node.variant != LoRA():
        node = low_rank(jnp.asarray(kernel), node)
        if form is None or not form.forwards:  # computed in the precision of the kernel
            factors = {name: node.arrays[name].astype(jnp.float32) for name in ("U", "V")}
            node = node.replace(**factors)
    out = {
        "U": _at_parts(_padded(node.U, -1, rank) * s, node, like, like.U),
        "V": _at_parts(_padded(node.V, -2, rank), node, like, like.V),
    }
    if like.m is not None:
        out["m"] = like.m if node.m is None else _at_parts(np.asarray(node.m), node, like, like.m)
    return like.replace(arrays=out)


def _at_parts(array: np.ndarray, node: Adapter, like: Adapter, nothing: Any) -> np.ndarray:
    """The parts that an adapter has, among all that the pool has."""
    if node.axes.parts == like.axes.parts:
        return array
    parts, axis = [like.axes.parts.index(part) for part in node.axes.parts], like.stack_ndim - 1
    whole = np.moveaxis(np.array(nothing, array.dtype), axis, 0)
    whole[parts] = np.moveaxis(array, axis, 0)
    return np.moveaxis(whole, 0, axis)


def _padded(array: Any, axis: int, size: int) -> np.ndarray:
    array = np.asarray(array)
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return np.pad(array, widths)


def _as(path: str, array: np.ndarray, dtype: Any) -> np.ndarray:
    if not np.can_cast(array.dtype, dtype):
        raise ValueError(
            f"at {path!r} it has {array.dtype}, which the pool's {dtype} cannot hold: {_MAKE}."
        )
    # In a batch of mixed requests it could reach rows that have another adapter, as 0 * NaN = NaN.
    if not np.isfinite(array).all():
        raise ValueError(f"at {path!r} it has NaN or infinite values.")
    return np.array(array, dtype)  # a copy, as JAX on a CPU would use the caller's memory
