"""What a model mapped over its rows gives: which axis of each array is that of the rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from lora_jax.tracing._arrays_in import arrays_in
from lora_jax.tracing._row_axes import (
    MAP_ROWS,
    axes_of_collection,
    axes_of_leaves,
    name_of_variable,
)

# Stands for an array among the leaves.
_ARRAY = object()


@dataclasses.dataclass
class RowResult:
    """What a call of one row gives, apart from its arrays.

    Attributes:
      axes: where the arrays have the rows; ``None`` for one that is the same for all of them.
      leaves: all leaves of the result, with a mark for each array.
      treedef: their structure.
    """

    axes: list[int | None]
    leaves: list[Any]
    treedef: Any

    @classmethod
    def of(
        cls,
        y: Any,
        variables: Mapping[str, Any],
        out_axes: Any,
        variable_axes: Mapping[str, Any],
        grown: Callable[[], list[int | None]],
        id_: Any,
    ) -> tuple[list[chex.Array], RowResult]:
        """The arrays of one row without the axes of the rows, and the rest.

        Args:
          y: the result.
          variables: collections that ``apply`` gives along with it.
          out_axes: of the result.
          variable_axes: of the collections.
          grown: says of each leaf which axis grows with the batch.
          id_: of the row.

        Raises:
          ValueError: if the axis of an array is not that of the batch.
        """
        paths, _ = jax.tree_util.tree_flatten_with_path((y, variables))
        given = axes_of_leaves(out_axes, y)
        for name, collection in sorted(variables.items()):
            given += axes_of_leaves(axes_of_collection(name, variable_axes), collection)
        arrays, axes, leaves = [], [], []
        for i, ((path, leaf), axis) in enumerate(zip(paths, given, strict=True)):
            if not isinstance(leaf, jax.Array | np.ndarray):
                if next(arrays_in(leaf), None) is not None:
                    raise ValueError(
                        f"The result has a {type(leaf).__name__} with arrays in it, which JAX does "
                        f"not know as a pytree, so that it cannot be of many rows. {MAP_ROWS}"
                    )
                leaves.append(leaf)
                continue
            leaves.append(_ARRAY)
            if axis is Ellipsis:
                ones = [axis for axis, size in enumerate(leaf.shape) if size == 1]
                is_plain = ones == [0] and leaf.ndim > 1 and path[0].idx == 0
                axis = 0 if is_plain else grown()[i] if ones else None
            axis = _axis_of_rows(path, leaf, axis, id_)
            arrays.append(jnp.asarray(leaf) if axis is None else jnp.squeeze(leaf, axis))
            axes.append(axis)
        return arrays, cls(axes, leaves, None)

    def joined(self, arrays: list[Any]) -> Any:
        """The result for all rows, from arrays with these in front."""
        if None in self.axes and any(array.shape[0] == 0 for array in arrays):
            raise ValueError("A batch without rows has nothing that is one for all of them.")
        joined = iter(
            array[0] if axis is None else jnp.moveaxis(array, 0, axis)
            for array, axis in zip(arrays, self.axes, strict=True)
        )
        leaves = [next(joined) if leaf is _ARRAY else leaf for leaf in self.leaves]
        return jax.tree.unflatten(self.treedef, leaves)


def _axis_of_rows(path: tuple[Any, ...], array: Any, axis: int | None, id_: Any) -> int | None:
    """Which axis of an array in the result of one row is that of the batch."""
    of, *where = path
    is_variable = of.idx == 1
    name = f"result{jax.tree_util.keystr(tuple(where))}"
    if is_variable:
        name = name_of_variable(where)
    if axis is None or array.ndim == 0 or (is_variable and axis >= array.ndim):
        _check_same(name, array, id_)
        return None
    if not -array.ndim <= axis < array.ndim or array.shape[axis] != 1:
        how = f"variable_axes={{{where[0].key!r}: ...}}" if is_variable else "out_axes=..."
        raise ValueError(
            f"Of one row the {name} is {array.shape}, and axis {axis} of it is not the batch. Say "
            f"which is, or None where it is one for all rows, as for jax.vmap: {how}. {MAP_ROWS}"
        )
    return int(axis % array.ndim)


def _check_same(name: str, array: chex.Array, id_: Any) -> None:
    """Refuses what has no axis for rows, where it is another one for each."""

    @custom_vmap
    def same(array: chex.Array, id_: Any) -> chex.Array:
        return array

    @same.def_vmap
    def look(_: int, mapped: list[bool], array: chex.Array, id_: Any) -> tuple[chex.Array, bool]:
        # The first jax.vmap that gets here is that over the rows, as the id is mapped by it.
        if mapped[0]:
            raise ValueError(
                f"The {name} {array.shape[1:]} has no axis for the batch, and is another one for "
                f"each row. {MAP_ROWS}"
            )
        return array, False

    same(jax.lax.stop_gradient(array), id_)
