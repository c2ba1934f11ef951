"""How each kind of node is written: its entry in ``adapter.json`` and the names of its tensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.core._adapter import Adapter
from lora_jax.core._axes import KernelAxes
from lora_jax.core._fully_trained import FullyTrained
from lora_jax.core._node import Node
from lora_jax.core._variants import VARIANTS
from lora_jax.core.rules._rule import Rule
from lora_jax.files._tensors import is_ints


@dataclasses.dataclass(frozen=True)
class NodeKind:
    """How the nodes of one class are written.

    Attributes:
      section: the object of ``adapter.json`` with an entry for each of them.
      node: their class.
      always: whether the object is there where there are no such nodes.
      entry: gives the entry of a node, from its path and the node.
      tensors: gives the names of its tensors by the fields of the node, from its path, the entry
        and where that is, for messages.
      read: gives the node, from the entry, its arrays by their fields, its path and where the entry
        is.
    """

    section: str
    node: type[Node]
    always: bool
    entry: Callable[[str, Any], Any]
    tensors: Callable[[str, Any, str], dict[str, str]]
    read: Callable[[Any, Mapping[str, np.ndarray], str, str], Node]


KINDS: list[NodeKind] = []
"""The kinds of nodes, in the order of ``adapter.json``."""


def add_kind(kind: NodeKind) -> None:
    """Adds a kind of node, for the module that defines the node."""
    if any(kind.section == other.section or kind.node is other.node for other in KINDS):
        raise ValueError(f"There is a kind of node for {kind.section!r} already.")
    KINDS.append(kind)


def kind_of(path: str, node: Node) -> NodeKind:
    """The kind of a node.

    Raises:
      TypeError: if there is none for its class.
    """
    for kind in KINDS:
        if type(node) is kind.node:
            return kind
    raise TypeError(f"{path!r} has a {type(node).__name__}, which cannot be saved.")


def check_types(value: object, types: Mapping[str, type], where: str) -> None:
    """Raises ValueError if a JSON object has other keys, or values of other types."""
    if not isinstance(value, dict) or set(value) != set(types):
        keys = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{where} must have {sorted(types)}, but has {keys}.")
    for name, kind in types.items():
        if type(value[name]) is not kind:
            raise ValueError(f"{where}: {name!r} must be {kind.__name__}, got {value[name]!r}.")


# --- adapters ---

# The static fields of an Adapter, and those of its axes, with their types in JSON. What
# has another name here than in files, where names stay:
_NAMES_IN_FILES = {"materialize": "substitute", "batch": "stacks"}
_PRODUCTS_IN_FILES = {"dense": "merged"}
_FIELDS = {
    "variant": str,
    "rank": int,
    "alpha": float,
    "rslora": bool,
    "dropout": float,
    "detach_norm": bool,
    "substitute": bool,
    "untied": bool,
    "product": str,
    "axes": dict,
}
_AXES = tuple(
    _NAMES_IN_FILES.get(field.name, field.name)
    for field in dataclasses.fields(KernelAxes)
    if field.compare
)


def _adapter_entry(path: str, adapter: Adapter) -> dict[str, Any]:
    """The fields of an adapter, as JSON has them."""
    check_alone(path, adapter)
    _check_arrays(adapter, f"adapters: {path!r}")
    entry = {name: getattr(adapter, _name_here(name)) for name in _FIELDS if name != "axes"}
    entry["alpha"], entry["dropout"] = float(adapter.alpha), float(adapter.dropout or 0.0)
    entry["product"] = _PRODUCTS_IN_FILES.get(adapter.product, adapter.product)
    return entry | {"axes": {name: getattr(adapter.axes, _name_here(name)) for name in _AXES}}


def _adapter_tensors(path: str, entry: Any, where: str) -> dict[str, str]:
    check_types(entry, _FIELDS, where)
    if entry["variant"] not in VARIANTS:
        raise ValueError(f"{where}: there is no variant {entry['variant']!r}.")
    return {name: f"{path}.{name}" for name in _names(entry["variant"])}


def _read_adapter(entry: Any, arrays: Mapping[str, np.ndarray], path: str, where: str) -> Adapter:
    """An adapter, if its entry makes sense and its arrays fit it."""
    axes = entry["axes"]
    if set(axes) != set(_AXES) or type(axes.get("fused")) is not int:
        raise ValueError(f"{where}: axes must have {list(_AXES)}, got {axes}.")
    for name in _AXES:
        if name != "fused" and not is_ints(axes[name]):
            raise ValueError(f"{where}: axes: {name!r} must be integers, got {axes[name]!r}.")
    if not axes["parts"]:  # by default all are, but who says that there are not 10**12?
        raise ValueError(f"{where}: axes: of fused={axes['fused']} kernels no parts are named.")
    products = {there: here for here, there in _PRODUCTS_IN_FILES.items()}
    fields = {_name_here(name): entry[name] for name in _FIELDS if name != "axes"}
    fields["product"] = products.get(entry["product"], entry["product"])
    options = {name: fields[name] for name in fields if name not in ("rank", "untied")}
    try:
        Rule(re.escape(path), entry["rank"], **options)
        kernel_axes = KernelAxes(**{_name_here(name): value for name, value in axes.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    if entry["untied"] and entry["substitute"]:
        raise ValueError(f"{where} is both untied and materialized.")
    adapter = Adapter(**(fields | dict(arrays)), axes=kernel_axes)
    _check_arrays(adapter, where)
    return adapter


def check_alone(path: str, adapter: Adapter) -> None:
    """Checks that an adapter is one alone, with all that a file says of it.

    Raises:
      ValueError: if it is a stack, or was one, or is of :func:`lora_jax.cache_norm`.
    """
    if adapter.count is not None:
        raise ValueError(
            f"The adapter of {path!r} is a stack of {adapter.count}: save each one alone, "
            f"jax.tree.map(lambda x: x[i], stacked)."
        )
    if adapter.dropout is None:
        raise ValueError(
            f"The adapter of {path!r} is out of a stack of adapters with several rates of dropout, "
            f"and does not say its own: save it as it was before it was stacked."
        )
    if not VARIANTS[adapter.variant].trained:
        raise ValueError(
            f"The adapter of {path!r} is of cache_norm: save the adapter as it was before, from "
            f"which cache_norm makes it again."
        )


def _names(variant: str) -> tuple[str, ...]:
    return ("U", "V") if VARIANTS[variant].magnitude is None else ("U", "V", "m")


def _name_here(name: str) -> str:
    """The field that has a name in files."""
    return next((here for here, there in _NAMES_IN_FILES.items() if there == name), name)


def _check_arrays(adapter: Adapter, where: str) -> None:
    """Raises ValueError if U, V and m are not those of one rank and one stack of matrices."""
    axes, U, V = adapter.axes, adapter.U, adapter.V
    batch = len(axes.batch) + (axes.fused > 1)
    shapes = {name: getattr(adapter, name).shape for name in _names(adapter.variant)}
    fits = (
        U.ndim == V.ndim == batch + 2
        and U.shape[:batch] == V.shape[:batch]
        and U.shape[-1] == V.shape[-2] == adapter.rank
        and (axes.fused == 1 or U.shape[batch - 1] == len(axes.parts))
        and (adapter.m is None or adapter.m.shape == (*V.shape[:batch], V.shape[-1]))
    )
    if not fits:
        raise ValueError(
            f"{where}: the shapes {shapes} are not those of an adapter of rank {adapter.rank} for "
            f"{axes}."
        )
    for name, shape in shapes.items():
        if 0 in shape:
            raise ValueError(f"{where}: {name} is {shape}, in which there are no numbers.")
        if not jnp.issubdtype(getattr(adapter, name).dtype, jnp.floating):
            raise ValueError(f"{where}: {name} is of dtype {getattr(adapter, name).dtype}.")


# --- leaves that are fully trained ---


def _fully_trained_tensors(path: str, entry: Any, where: str) -> dict[str, str]:
    if not isinstance(entry, str):
        raise ValueError(f"{where}: 'whole' has {entry!r}, which is not a string.")
    return {"value": path}


def _read_fully_trained(
    entry: Any, arrays: Mapping[str, np.ndarray], path: str, where: str
) -> FullyTrained:
    value = arrays["value"]
    return FullyTrained(value, None if value.dtype.name == entry else entry)


add_kind(NodeKind("adapters", Adapter, True, _adapter_entry, _adapter_tensors, _read_adapter))
add_kind(
    NodeKind(
        "whole",
        FullyTrained,
        True,
        lambda path, node: node.merged_dtype().name,
        _fully_trained_tensors,
        _read_fully_trained,
    )
)
