"""Where arrays have their rows, as a caller says it: trees of axes, as for ``jax.vmap``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax

# Flax's collections that have no rows; and the types of variables in NNX.
_WITHOUT_ROWS = ("params", "batch_stats", "Param", "BatchStat", "RngCount")

# What to do where a model cannot be mapped over its rows.
MAP_ROWS = (
    "Map over the rows yourself: jax.vmap(lambda i, x: lora_apply(model, variables, stacked, "
    "x[None], adapter_ids=i))(adapter_ids, x)."
)


def axes_of_collection(name: str, variable_axes: Mapping[str, Any]) -> Any:
    """Where a collection has its rows: what the caller says; ``...`` where nothing.

    Example:
      >>> [axes_of_collection(name, {"cache": 1}) for name in ("cache", "batch_stats", "losses")]
      [1, None, Ellipsis]
    """
    return variable_axes.get(name, None if name in _WITHOUT_ROWS else Ellipsis)


def axes_of_leaves(axes: Any, tree: Any) -> list[Any]:
    """The axes of the leaves of a tree, from those of a prefix of it.

    Raises:
      ValueError: if it is not a prefix, or if an axis is not an integer, ``None`` or ``...``.

    Example:
      >>> axes_of_leaves({"a": 0, "b": None}, {"a": {"x": 1.0, "y": 2.0}, "b": 3.0})
      [0, 0, None]
    """
    spread: list[Any] = []

    def is_axis(axis: Any) -> bool:
        return axis is None or axis is Ellipsis

    def one(axis: Any, below: Any) -> None:
        if not (is_axis(axis) or isinstance(axis, int)):
            raise ValueError(f"an axis is an integer or None, not {axis!r}.")
        spread.extend([axis] * len(jax.tree.leaves(below)))

    jax.tree.map(one, axes, tree, is_leaf=is_axis)
    return spread


def axes_of_inputs(tree: Any, in_axes: Any, variable_axes: Mapping[str, Any]) -> list[Any]:
    """What the caller says of each leaf of the inputs: an axis, ``None``, or ``...`` where nothing.

    Args:
      tree: ``(collections, args, kwargs)``.
      in_axes: as for :func:`lora_jax.lora_apply`.
      variable_axes: as there.

    Raises:
      ValueError: if axes do not have the structure of what they are for.
    """
    rest, args, kwargs = tree
    of_args: Any = in_axes
    of_kwargs: Any = {}
    if isinstance(in_axes, Mapping):
        of_args, of_kwargs = Ellipsis, in_axes
    elif isinstance(in_axes, list | tuple):
        of_args = tuple(in_axes)
        if len(of_args) == len(args) + 1 and isinstance(of_args[-1], Mapping):
            of_args, of_kwargs = of_args[:-1], of_args[-1]
    else:
        of_kwargs = dict.fromkeys(kwargs, in_axes)
    if unknown := of_kwargs.keys() - kwargs.keys():
        raise ValueError(
            f"in_axes names {min(unknown)!r}, but the keyword arguments of the model are "
            f"{', '.join(kwargs) or 'none'}."
        )
    of_kwargs = {name: of_kwargs.get(name, Ellipsis) for name in kwargs}
    of_rest = {name: axes_of_collection(name, variable_axes) for name in rest}
    try:
        return [
            *axes_of_leaves(of_rest, rest),
            *axes_of_leaves(of_args, args),
            *axes_of_leaves(of_kwargs, kwargs),
        ]
    except ValueError as error:
        raise ValueError(
            f"in_axes or variable_axes does not have the structure of what it is for, which is as "
            f"for jax.vmap: {error}"
        ) from error


def name_of_leaf(path: tuple[Any, ...]) -> str:
    """What a leaf is called in messages, of ``(collections, args, kwargs)``."""
    first, *where = path
    name, *inside = where
    if first.idx == 1:
        return f"argument {name.idx}{jax.tree_util.keystr(tuple(inside))}"
    if first.idx == 2:
        return f"argument {name.key!r}{jax.tree_util.keystr(tuple(inside))}"
    return name_of_variable(where)


def name_of_variable(path: Iterable[Any]) -> str:
    """What a variable is called in messages, of the collections."""
    return f"variable {'/'.join(str(getattr(key, 'key', key)) for key in path)!r}"
