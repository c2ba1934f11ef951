"""Adapter nodes for one call of a model, each for the place next to the leaf that it is for.

There they go through every transform of Flax just as the kernels do, and all that decides what a
layer computes is in the structure of the variables, where caches of traces see it. What is done to
a node depends on its kind and on the call; each has one function here:

    fully trained           the leaf itself, of the adapter that the id is of
    not in the layer        W' in the place of the parameter
    in the layer            its normal form next to the kernel: U, V and m / ||W + s U V||_c,
      one id for all        that of one adapter of a stack,
      an id for each row    those of all adapters, and the row's id
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._compat import is_traced
from lora_jax.core._adapter import Adapter
from lora_jax.core._adapter_stack import AdapterStack, stack_of
from lora_jax.core._boxes import content, unbox
from lora_jax.core._fully_trained import FullyTrained
from lora_jax.core.products._normal_form import normalized
from lora_jax.core.products._row_ids import BASE, Ids, taken
from lora_jax.core.products._stack_normal_forms import normalized_member, normalized_stack
from lora_jax.layers._handlers import Handlers
from lora_jax.trees._merge import join, merged_leaf
from lora_jax.trees._paths import Key, path_of


@flax.struct.dataclass
class Placed:
    """An adapter next to its kernel.

    The path is that of the parameter in the tree of the model, also where the layer is applied by
    itself inside it. As a part of the structure it makes ``nn.jit`` trace each layer, and not use
    for one what it has traced for another; likewise the handlers.

    Attributes:
      adapter: in its normal form, and with as many axes as the kernel.
      path: of the parameter.
      handlers: of the call.
      product: what the call says of the product of its layer.
      ids: of one row of a mixed batch.
      rng: a key for dropout, with the axes of the kernel that stack it; ``None`` where the module
        has one.
      cut: whether the layer shall compute with zeros in the place of the kernel.
    """

    adapter: Adapter
    path: str = flax.struct.field(pytree_node=False)
    handlers: Handlers = flax.struct.field(pytree_node=False)
    product: str = flax.struct.field(pytree_node=False, default="auto")
    ids: Ids | None = None
    rng: Any = None
    cut: bool = flax.struct.field(pytree_node=False, default=False)


@dataclasses.dataclass(frozen=True)
class CallIds:
    """Which of several stacked adapters a call has.

    Attributes:
      ids: of one adapter, ``()``; or ``(1, tokens)``, of one for each token of the only row.
      count: how many adapters there are.
      base_is_complete: whether it is known that no row needs a leaf which the base lacks.
      of_row: whether the call is that of one row of many, over which it is mapped.
    """

    ids: chex.Array
    count: int
    base_is_complete: bool
    of_row: bool


def place(
    frozen: chex.ArrayTree,
    adapters: chex.ArrayTree,
    ids: CallIds | None,
    *,
    dropout: bool,
    handlers: Handlers,
    product: str,
) -> tuple[dict[Key, Any], dict[Key, Placed]]:
    """The parameters for a call of the adapted model, and the adapters for the places next to them.

    Args:
      frozen: the base.
      adapters: the adapters, stacked if there are ids.
      ids: which of them the call has.
      dropout: whether adapters have their dropout.
      handlers: of the call.
      product: how layers compute products of two matrices.

    Returns:
      The parameters by their keys, and the adapters that are next to a kernel, by the kernel's key.

    Raises:
      TypeError: if a tree is not a nested dict, or a node is not one of an adapter.
      ValueError: if an adapter does not fit the base or the call.
    """
    placed: dict[Key, Placed] = {}

    def place_node(key: Key, leaf: Any, node: Any) -> dict[Key, Any]:
        if not node.in_layer:
            return {key: _materialized(path_of(key), leaf, node, ids)}
        adapter, of_row = _in_layer(path_of(key), content(leaf), node, ids, dropout)
        placed[key] = Placed(adapter, path_of(key), handlers, product, of_row)
        return {key: leaf}

    if ids is None:
        return join(frozen, adapters, place_node), placed
    fully_trained = functools.partial(_fully_trained, ids)
    return join(frozen, adapters, place_node, ids.count, fully_trained), placed


def is_complete(base: Mapping[Key, Any], nodes: Mapping[Key, Any], ids: Any) -> bool:
    """Whether it is known that no row needs a leaf of the base that is not there.

    Raises:
      ValueError: if it is known that one does.
    """
    if is_traced(ids) or not ids.is_fully_addressable:
        return False
    for key, node in nodes.items():
        if not node.in_base and key not in base and bool((np.asarray(ids) == BASE).any()):
            raise ValueError(
                f"{path_of(key)!r} was fully trained, and the base lacks it, so no row can have "
                f"the base alone (id {BASE}): pass all of the model's parameters as "
                f"{{'params': params}}."
            )
    return True


def _fully_trained(ids: CallIds, key: Key, leaf: Any, node: FullyTrained) -> dict[Key, Any]:
    """A leaf that was fully trained, such as a head or a bias: that of the id.

    Args:
      ids: which of the adapters.
      key: of the parameter.
      leaf: that of the base, or ``None``.
      node: the leaves of all adapters, on an axis in front.

    Raises:
      ValueError: if ids are those of tokens, or if the stack is of another model.
    """
    path = path_of(key)
    if ids.ids.ndim > 0:
        raise ValueError(
            f"{path!r} was fully trained, so that adapter_ids must be one number for each example, "
            f"not for each token."
        )
    dtype, box, shape = node.merged_dtype(), node.value, jnp.shape(node.array)
    if leaf is not None and tuple(content(leaf).shape) != shape[1:]:
        raise ValueError(
            f"{path!r} was fully trained: its stack is {shape}, but the base has "
            f"{tuple(content(leaf).shape)} there. Was it made for another model?"
        )
    base = (0.0 if ids.base_is_complete else jnp.nan) if leaf is None else unbox(leaf)
    return {key: jax.tree.map(lambda array: taken(array, ids.ids, base).astype(dtype), box)}


def _materialized(path: str, leaf: Any, node: Any, ids: CallIds | None) -> Any:
    """The merged leaf, ``W'`` of a kernel, in the place of the parameter."""
    if ids is None:
        return merged_leaf(leaf, node)
    if ids.ids.ndim > 0:
        raise ValueError(
            f"The adapters of {path!r} have materialize=True, and W' cannot be another one for "
            f"every token: give one id for each row."
        )
    one = normalized_member(jnp.asarray(unbox(leaf)), _as_stack(node), ids.ids)
    W = unbox(leaf)
    return jax.tree.map(lambda W_: jnp.where(ids.ids == BASE, W, W_), merged_leaf(leaf, one))


def _in_layer(
    path: str, W: Any, node: Any, ids: CallIds | None, dropout: bool
) -> tuple[Adapter, Ids | None]:
    """An adapter as it is placed next to its kernel, and the ids of its row."""
    if ids is None:
        adapter, of_row = _on_axes_of_kernel(normalized(W, node)), None
    elif not ids.of_row:
        one = normalized_member(W, _as_stack(node), ids.ids)
        adapter, of_row = _on_axes_of_kernel(one), None
    else:
        adapter, of_row = _for_one_row(W, normalized_stack(W, _as_stack(node)), ids)
    return _with_dropout(path, adapter, dropout), of_row


def _as_stack(node: Any) -> AdapterStack:
    """Several adapters as a stack, also those that only have an axis in front."""
    return stack_of(node) if isinstance(node, Adapter) else node


def _with_dropout(path: str, adapter: Adapter, active: bool) -> Adapter:
    """The adapter with its rate of dropout, or with 0 where dropout is not active.

    It is a part of the structure, so that ``nn.jit`` traces again.
    """
    if active and adapter.dropout is None:
        raise ValueError(
            f"The adapters of {path!r} have several rates of dropout, and the one id for the whole "
            f"batch is traced, so that it does not say which rate it is: give one id for each row, "
            f"or call without the 'dropout' rng."
        )
    return adapter.replace(dropout=adapter.dropout if active else 0.0)


def _for_one_row(W: Any, adapter: Adapter, ids: CallIds) -> tuple[Adapter, Ids]:
    """All adapters of a stack, from which each layer takes those of the row; and the row's ids.

    The axis of the adapters is behind those that stack the kernel, so that transforms slice the
    arrays as they slice the kernel.
    """
    behind = len(adapter.axes.batch_shape(W.shape))
    arrays = {name: jnp.moveaxis(x, 0, behind) for name, x in adapter.arrays.items()}
    adapter = adapter.replace(arrays=arrays)
    of_row = Ids.placed(ids.ids, ids.count, adapter.axes, W.shape)
    return _on_axes_of_kernel(adapter), of_row


def _on_axes_of_kernel(adapter: Adapter) -> Adapter:
    """The arrays with as many axes as the kernel, those that stack it in their places."""
    place, ndims = adapter.axes.place, adapter.matrix_ndims()
    arrays = {name: place(array, ndims[name]) for name, array in adapter.arrays.items()}
    return adapter.replace(arrays=arrays)
