"""What a model mapped over its rows is given: which of its arrays have rows, and in which axis."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.tracing._row_axes import axes_of_inputs, name_of_leaf

# Calls the model: of ids, of its other collections, and of the arguments by position and by name.
Call = Callable[[Any, dict[str, Any], tuple[Any, ...], dict[str, Any]], Any]


@dataclasses.dataclass
class RowInputs:
    """What the model is given, and which of it has rows.

    Attributes:
      rows: how many rows there are.
      leaves: all leaves of the inputs.
      treedef: their structure.
      names: what they are called in messages.
      at: the places of those that have rows, and ``axes`` theirs.
    """

    rows: Any
    leaves: list[Any]
    treedef: Any
    names: list[str]
    at: list[int] = dataclasses.field(default_factory=list)
    axes: list[int] = dataclasses.field(default_factory=list)

    @classmethod
    def of(
        cls,
        rows: Any,
        rest: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        in_axes: Any,
        variable_axes: Mapping[str, Any],
    ) -> RowInputs:
        """Says of every array where it has its rows.

        Raises:
          ValueError: if axes do not fit, or must be given.
        """
        tree = dict(rest), args, dict(kwargs)
        paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
        given = axes_of_inputs(tree, in_axes, variable_axes)
        one = cls(
            rows, [leaf for _, leaf in paths], treedef, [name_of_leaf(path) for path, _ in paths]
        )
        may = [
            i
            for i, (leaf, axis) in enumerate(zip(one.leaves, given, strict=True))
            if isinstance(leaf, jax.Array | np.ndarray) and leaf.ndim and axis is not None
        ]
        of_args = [i for i in may if paths[i][0][0].idx > 0]
        if len(of_args) == 1 and given[of_args[0]] is Ellipsis:
            given[of_args[0]] = 0
        one._check_given([i for i in may if given[i] is Ellipsis], may)
        for i in may:
            leaf, axis, path = one.leaves[i], given[i], paths[i][0]
            is_variable = path[0].idx == 0
            if is_variable and axis >= leaf.ndim:
                continue  # a counter, of a collection whose arrays have rows further behind
            if not -leaf.ndim <= axis < leaf.ndim or leaf.shape[axis] != rows:
                how = "in_axes=..., as for jax.vmap"
                if is_variable:
                    how = f"variable_axes={{{path[1].key!r}: ...}}, as for nn.vmap"
                raise ValueError(
                    f"adapter_ids has {rows} rows, but {one.names[i]} is {leaf.shape}, whose axis "
                    f"{axis} is not of that size. Say where it has the rows, or None where it is "
                    f"one for all of them: {how}."
                )
            one.at.append(i)
            one.axes.append(axis % leaf.ndim)
        return one

    @property
    def mapped(self) -> list[Any]:
        """The arrays that have rows."""
        return [self.leaves[i] for i in self.at]

    def of_row(self, mapped: list[Any]) -> Any:
        """Collections, arguments and keyword arguments of a batch with one row."""
        leaves = list(self.leaves)
        for i, axis, leaf in zip(self.at, self.axes, mapped, strict=True):
            leaves[i] = jnp.expand_dims(leaf, axis)
        return jax.tree.unflatten(self.treedef, leaves)

    def _check_given(self, missing: list[int], may: list[int]) -> None:
        """Checks that the caller says of every array whether it has rows, and where.

        Args:
          missing: the places of arrays for which the caller gives no axis.
          may: the places of all that may have rows, for the message.

        Raises:
          ValueError: if any is missing.
        """
        if not missing:
            return
        rest, args, kwargs = jax.tree.unflatten(self.treedef, range(len(self.leaves)))
        names = ", ".join(f"{self.names[i]} {self.leaves[i].shape}" for i in missing)

        def has(places: list[int], tree: Any) -> bool:
            return any(i in places for i in jax.tree.leaves(tree))

        collections = {name: 0 for name, tree in rest.items() if has(may, tree)}
        axes = [0 if has(may, tree) else None for tree in args]
        of_kwargs = {name: 0 for name, tree in kwargs.items() if has(may, tree)}
        arguments = []
        if has(missing, (args, kwargs)):
            each = repr((*axes, of_kwargs) if of_kwargs else tuple(axes))
            arguments.append(f"in_axes=0, or for each argument in_axes={each}")
        if has(missing, rest):
            arguments.append(f"variable_axes={collections}")
        raise ValueError(
            f"With adapter_ids say which arrays have the rows, and in which axis: {names}. As for "
            f"jax.vmap: {' and '.join(arguments)}, with None in the place of 0 for what is one "
            f"for all rows, or a tree of axes for a tree of arrays."
        )

    def check_tokens(self, call: Call, ids: chex.Array, keys: Any) -> None:
        """Checks that ids of tokens cannot be taken for those of something else.

        With another number of tokens every adapted layer must have another one as well.

        Raises:
          ValueError: if the model cannot be traced with another number of tokens.
        """
        tokens = ids.shape[1:]
        for more, everywhere in itertools.product((1, -1), (False, True)):
            other = {n: max(n + more, 1) for n in tokens}
            given = {}
            for axis, (i, leaf) in zip(self.axes, self._of_rows(1).items(), strict=True):
                behind = list(leaf.shape[:axis] + leaf.shape[axis + 1 :])
                if everywhere:
                    behind = [other.get(n, n) for n in behind]
                elif tuple(behind[: len(tokens)]) == tokens:
                    behind[: len(tokens)] = [other[n] for n in tokens]
                shape = (*behind[:axis], 1, *behind[axis:])
                given[i] = jax.ShapeDtypeStruct(shape, leaf.dtype)
            id_ = jax.ShapeDtypeStruct([other[n] for n in tokens], ids.dtype)
            try:
                self._shapes(call, id_, _row_of(keys), given)
                return
            except Exception as error:
                why = str(error).splitlines()[0]
        raise ValueError(
            f"adapter_ids is {ids.shape}, one for each token, but the model cannot be traced with "
            f"another number of tokens, so that it cannot be told which axis of the input of each "
            f"layer is that of the tokens ({why}). Give one id for each row."
        )

    def grown(self, call: Call, id_: Any, keys: Any) -> list[int | None]:
        """Which axis of each leaf of the result is longer for two rows than for one, if one is."""
        found: list[int | None] = []
        each = (self._shapes(call, id_, keys, self._of_rows(rows)) for rows in (1, 2))
        for one, two in zip(*each, strict=True):
            axes = [i for i, sizes in enumerate(zip(one, two, strict=True)) if sizes == (1, 2)]
            found.append(axes[0] if len(axes) == 1 else None)
        return found

    def _of_rows(self, rows: int) -> dict[int, jax.ShapeDtypeStruct]:
        """The arrays that have rows, for so many of them, by their places."""
        given = {}
        for i, axis in zip(self.at, self.axes, strict=True):
            leaf = self.leaves[i]
            shape = [rows if j == axis else n for j, n in enumerate(leaf.shape)]
            given[i] = jax.ShapeDtypeStruct(shape, leaf.dtype)
        return given

    def _shapes(
        self, call: Call, id_: Any, keys: Any, given: dict[int, jax.ShapeDtypeStruct]
    ) -> list[tuple[int, ...]]:
        """The shapes of the result of a call with one id, and with these in place of the arrays."""

        def result(id_: Any, keys: Any, given: dict[int, Any]) -> list[Any]:
            leaves = [given.get(i, leaf) for i, leaf in enumerate(self.leaves)]
            rest, args, kwargs = jax.tree.unflatten(self.treedef, leaves)
            out = jax.tree.leaves(call(id_, rest, args, {**kwargs, **keys}))
            return [leaf if isinstance(leaf, jax.Array | np.ndarray) else 0 for leaf in out]

        return [leaf.shape for leaf in jax.eval_shape(result, id_, keys, given)]


def _row_of(tree: Any) -> Any:
    """One row of ids or keys, without its values."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree)
