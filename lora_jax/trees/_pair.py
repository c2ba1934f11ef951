"""The base and the adapters leaf by leaf: whatever takes both looks here before it computes.

A base is nested dicts of arrays. A tree of adapters has a :class:`Node` for every leaf of the model
that is trained. It changes the leaf of the base with its path, or, where the leaf is fully trained,
it takes the place of a leaf that the base lacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chex
from flax.traverse_util import empty_node

from lora_jax._compat import is_module
from lora_jax.core._adapter_stack import AdapterStack
from lora_jax.core._boxes import content, unbox
from lora_jax.core._fully_trained import as_node
from lora_jax.core._node import Node
from lora_jax.core.rules._match_paths import nearest_paths
from lora_jax.trees._base_hash import UNKNOWN, base_hash
from lora_jax.trees._leaves import check_floating, dtype_of
from lora_jax.trees._paths import Key, flatten, path_of
from lora_jax.trees._refuse_plain_arrays import check_has_nodes
from lora_jax.trees._states import has_adapter, is_state

# Names that Flax gives to collections other than "params".
_COLLECTIONS = ("batch_stats", "cache", "intermediates", "losses", "params_axes", "perturbations")


def pair(
    frozen: chex.ArrayTree,
    adapters: chex.ArrayTree,
    count: int | None = None,
    *,
    either: bool = False,
) -> tuple[dict[Key, Any], dict[Key, Node]]:
    """The leaves of a base and the nodes of the adapters that are for it, by their keys.

    Args:
      frozen: the base, as :func:`lora_jax.lora_init` returns it.
      adapters: the adapters.
      count: how many adapters there are, where they are stacked.
      either: whether the base may be all parameters too, leaves that are fully trained among them.

    Raises:
      TypeError: if a tree is not what :func:`base_of` and :func:`nodes_of` take.
      ValueError: if it is not, if the adapters do not fit this base, or if a leaf is in both.
    """
    base = base_of(frozen)
    nodes = nodes_of(adapters, base=base)
    for key, node in nodes.items():
        check_pair(key, node, base, count)
        if not (either or node.in_base) and base.get(key, empty_node) is not empty_node:
            raise ValueError(
                f"{path_of(key)!r} is in the base and, fully trained, in the adapters. Pass the "
                f"frozen tree that lora_init returned, not the full parameters."
            )
    return base, nodes


def base_of(params: chex.ArrayTree, name: str = "frozen") -> dict[Key, Any]:
    """The leaves of a base, or of all parameters, by their keys; empty dicts among them.

    Raises:
      TypeError: if it is not a nested dict, or has adapters in it.
      ValueError: if it is all of a model's variables.
    """
    flat = flatten(params, name)
    if "params" in params and set(params) <= {"params", *_COLLECTIONS}:
        raise ValueError(
            f"{name} must be the 'params' collection alone: pass variables['params'], not the "
            f"whole dict of variables. Of other collections lora_jax.save takes those that "
            f"training changed, by collections=."
        )
    for key, leaf in flat.items():
        if isinstance(leaf, Node):
            raise TypeError(
                f"The base has adapters in it, as at {path_of(key)!r}: {name} must be parameters "
                f"alone. It comes first, then the adapters: were they swapped?"
            )
        if has_adapter(leaf):
            raise TypeError(
                f"{name} has {path_of(key)!r} of a model of lora_model, which has its adapters in "
                f"it: pass the frozen state that the model was made of."
            )
    return flat


def nodes_of(
    adapters: chex.ArrayTree,
    name: str = "adapters",
    base: Mapping[Key, Any] | None = None,
) -> dict[Key, Node]:
    """The nodes of a tree of adapters by their keys; plain arrays are leaves fully trained.

    Args:
      adapters: the tree.
      name: for messages.
      base: the leaves of the base, where it is known.

    Raises:
      TypeError: if it is not a nested dict, has something else than nodes and arrays, or is a tree
        as files have it, of arrays only.
      ValueError: if a node is not floating-point, or its fields do not fit each other.
    """
    if is_module(adapters):
        raise TypeError(
            f"{name} got the model itself, {type(adapters).__name__}. The adapters of a model of "
            f"lora_model are lora_jax.lora_state(model)."
        )
    if is_state(adapters):
        raise TypeError(
            f"{name} got an nnx.State, but adapters are nested dicts, also those of an NNX model: "
            f"the frozen state comes first. Those of a model of lora_model are "
            f"lora_jax.lora_state(model)."
        )
    leaves = {key: leaf for key, leaf in flatten(adapters, name).items() if leaf is not empty_node}
    check_has_nodes(leaves, name, base)
    nodes: dict[Key, Node] = {}
    for key, leaf in leaves.items():
        path, node = path_of(key), as_node(leaf)
        if isinstance(node, AdapterStack) and node.count is None:
            node = node.one(path)
        if node.in_base:
            for field, array in node.arrays.items():
                check_floating(f"{path}.{field}", array, f"{name} has")
        elif dtype_of(leaf) is None:
            raise TypeError(
                f"{name} has {leaf!r} at {path!r}, which is neither an adapter nor an array."
            )
        node.check(path)
        nodes[key] = node
    return nodes


def check_pair(
    key: Key,
    node: Node,
    base: Mapping[Key, Any],
    count: int | None = None,
    name: str = "frozen",
    *,
    needed: bool = False,
) -> None:
    """Checks that a node is for this base.

    Args:
      key: of the leaf.
      node: the node, which may be a stack.
      base: the leaves of the frozen tree, or of all of a model's parameters.
      count: how many nodes are stacked in this one; ``None`` for one alone.
      name: of the base, for messages.
      needed: whether the base must have a leaf that is fully trained too.

    Raises:
      TypeError: if the leaf is not an array.
      ValueError: if the base lacks the leaf that the node changes, or has it in another shape, or
        if it is not floating-point.
    """
    path, leaf = path_of(key), base.get(key, empty_node)
    if leaf is not empty_node:
        check_floating(path, leaf, "the base has" if name == "frozen" else f"{name} has")
        node.check_fits(path, tuple(content(leaf).shape), count, name)
        if node.base_hash not in (None, UNKNOWN) and (
            base_hash(unbox(leaf)) not in (None, node.base_hash)
        ):
            raise ValueError(
                f"The variant {node.kind!r} of {path!r} has changed the base at the start, and "
                f"{name} has another kernel there. Pass the frozen tree that lora_init returned."
            )
    elif node.in_base or needed:
        raise ValueError(
            f"There is an adapter for {path!r}, which {name} lacks. Were the adapters made for "
            f"another model? Nearest paths: {near(key, base)}."
        )


def near(key: Key, leaves: Mapping[Key, Any]) -> str:
    """The paths that are most like one, in words."""
    paths = [path_of(other) for other, leaf in leaves.items() if leaf is not empty_node]
    return ", ".join(nearest_paths(path_of(key), paths)) or "none"
