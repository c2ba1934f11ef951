"""How each kind of node is written: its entry in ``adapter.json`` and the names of its tensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lora_jax.core._adapter import Adapter
from lora_jax.core._axes import KernelAxes
from lora_jax.core._fully_trained import FullyTrained
from lora_jax.core._node import Node
from lora_jax.core.rules._rule import Rule
from lora_jax.core.variants._check_variant import check_variant
from lora_jax.core.variants._registry import is_registered, trained_variants, variant_of
from lora_jax.core.variants._variant import Variant
from lora_jax.files._tensors import is_ints
from lora_jax.trees._base_hash import UNKNOWN


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
      ValueError: if it is not one node, as it was trained.
    """
    node.check_alone(path)
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
_FIELDS = {
    "variant": str,
    "settings": dict,
    "rank": int,
    "alpha": float,
    "rslora": bool,
    "dropout": float,
    "substitute": bool,
    "untied": bool,
    "changes_base": bool,
    "axes": dict,
}
# Version 1 of the format had DoRA's setting among them, and how the product is computed.
_FIELDS_1 = {n: t for n, t in _FIELDS.items() if n not in ("settings", "changes_base")} | {
    "detach_norm": bool,
    "product": str,
}
_PRODUCTS_1 = ("auto", "factored", "outer", "merged")
_AXES = tuple(
    _NAMES_IN_FILES.get(field.name, field.name)
    for field in dataclasses.fields(KernelAxes)
    if field.compare
)
_OF_A_NODE = ("rank", "alpha", "rslora", "dropout", "substitute", "untied")


def _adapter_entry(path: str, adapter: Adapter) -> dict[str, Any]:
    """The fields of an adapter, as JSON has them."""
    _check_registered(path, adapter.variant)
    adapter.check(path)
    adapter.check_arrays(f"adapters: {path!r}")
    entry = {name: getattr(adapter, _name_here(name)) for name in _OF_A_NODE}
    entry["alpha"], entry["dropout"] = float(adapter.alpha), float(adapter.dropout or 0.0)
    entry |= {"variant": adapter.variant.name, "settings": adapter.variant.settings()}
    entry["changes_base"] = adapter.changes_base
    return entry | {"axes": {name: getattr(adapter.axes, _name_here(name)) for name in _AXES}}


def _check_registered(path: str, variant: Variant) -> None:
    """Raises ValueError if the name and the settings of a variant would not give it again."""
    check_variant(variant)
    found = variant_of(variant.name, variant.settings()) if is_registered(variant) else None
    if found != variant:
        name = type(variant).__name__
        raise ValueError(
            f"{path!r} has an adapter of variant {variant.name!r}, and no one could load it, as "
            f"its class is not registered: lora_jax.register_variant({name})."
        )


def _adapter_tensors(path: str, entry: Any, where: str) -> dict[str, str]:
    is_old = isinstance(entry, dict) and "settings" not in entry
    check_types(entry, _FIELDS_1 if is_old else _FIELDS, where)
    return {name: f"{path}.{name}" for name in _variant_of(entry, where).names()}


def _variant_of(entry: Any, where: str) -> Variant:
    """The variant that an entry names, with its settings."""
    settings = entry.get("settings", {})
    if entry.get("detach_norm"):
        settings = {"detach_norm": True}
    try:
        return variant_of(entry["variant"], settings)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


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
    if entry.get("product", "auto") not in _PRODUCTS_1:
        raise ValueError(
            f"{where}: product must be one of {_PRODUCTS_1}, got {entry['product']!r}."
        )
    fields = {_name_here(name): entry[name] for name in _OF_A_NODE}
    variant = _variant_of(entry, where)
    options = {name: fields[name] for name in ("alpha", "rslora", "dropout", "materialize")}
    try:
        if entry["variant"] not in trained_variants():
            raise ValueError(f"there is no variant {entry['variant']!r} to train.")
        Rule(re.escape(path), entry["rank"], variant=variant, **options)
        kernel_axes = KernelAxes(**{_name_here(name): value for name, value in axes.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    if entry["untied"] and entry["substitute"]:
        raise ValueError(f"{where} is both untied and materialized.")
    adapter = Adapter(arrays=arrays, variant=variant, axes=kernel_axes, **fields)
    if entry.get("changes_base"):  # of which base, the index says elsewhere
        adapter = adapter.replace(base_hash=UNKNOWN)
    adapter.check_arrays(where)
    return adapter


def _name_here(name: str) -> str:
    """The field that has a name in files."""
    return next((here for here, there in _NAMES_IN_FILES.items() if there == name), name)


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
