"""A batch in which every row has an adapter of its own: the model, mapped over its rows.

By definition it is ``jax.vmap`` over ``(id, row)`` of a call with one row, a batch of the size 1.
So a row has what it would have alone, whatever the model computes: caches, norms, heads that were
trained whole. What the rows share, first of all ``x W``, is computed once for all of them.

An array has its rows in its first axis, unless the caller says otherwise. Nothing is concluded from
its size. Where the model can be called either way, as with a memory beside the input that may be
one for all rows or one for each, the caller is asked.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec

from lora_jax.meshes import left_to_compiler, spec_of

# What to do where this is not possible.
MAP_ROWS = (
    "Map over the rows yourself: jax.vmap(lambda i, x: lora_apply(model, variables, stacked, "
    "x[None], adapter_ids=i)[0])(adapter_ids, x)."
)

# Calls the model: of ids, of its other collections, and of the arguments by position and by name.
Call = Callable[[Any, dict[str, Any], tuple[Any, ...], dict[str, Any]], Any]
# Flax's collections that have no rows: BatchNorm's statistics.
_COLLECTIONS = {"batch_stats": None}
# Arguments with keys of random numbers, of which each row gets its own.
_KEYS = ("rngs", "dropout_rng")


def over_rows(
    call: Call,
    ids: chex.Array,
    rest: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    in_axes: Any,
    out_axes: Any,
    variable_axes: Mapping[str, Any],
    spmd_axis_name: Any,
) -> Any:
    """``call`` for every row with its id, as by ``jax.vmap``.

    Args:
      call: of a batch with one row.
      ids: ``(batch, ...)``.
      rest: the collections of variables beside ``params``.
      args: of the model.
      kwargs: of the model and of ``apply``.
      in_axes: as for :func:`lora_jax.lora_apply`; alike the others.
      out_axes: as there.
      variable_axes: as there.
      spmd_axis_name: as there.
    """
    keys = {name: kwargs[name] for name in _KEYS if kwargs.get(name) is not None}
    plain = {name: value for name, value in kwargs.items() if name not in keys}
    inputs = _Inputs.of(ids.shape[0], rest, args, plain, in_axes, variable_axes)
    keys = jax.tree.map(lambda key: jax.random.split(key, ids.shape[0]), keys)
    results: list[_Result] = []

    def one(id_: Any, mapped: list[Any], keys: Any) -> list[Any]:
        rest, args, kwargs = inputs.of_row(mapped)
        out = call(id_, rest, args, {**kwargs, **keys})
        changes = kwargs.get("mutable", False) is not False
        grown = functools.partial(inputs.grown, call, id_, keys)
        arrays, result = _Result.of(out, changes, out_axes, variable_axes, grown)
        results[:] = [result]
        return arrays

    try:
        inputs.check_said(call, ids, keys)
        mapped, ids, keys = _sharded_alike(inputs.mapped, inputs.axes, ids, keys)
        rows = jax.vmap(one, (0, inputs.axes, 0), spmd_axis_name=spmd_axis_name)
        arrays = rows(ids, mapped, keys)
    except Exception as error:
        if inputs.unsaid:
            error.add_note(
                f"With adapter_ids each row is a call of its own. The {', '.join(inputs.unsaid)} "
                f"was taken to have the rows in the first axis, as in_axes or variable_axes do not "
                f"say otherwise."
            )
        raise
    out = results[0].joined(arrays)
    if ids.ndim > 1:
        inputs.check_tokens(call, ids, keys)
    return out


# --- what goes in ---


@dataclasses.dataclass
class _Inputs:
    """What the model is given, and which of it has rows.

    Attributes:
      rows: how many rows there are.
      leaves: all leaves of the inputs.
      treedef: their structure.
      names: what they are called in messages.
      at: the places of those that have rows, and ``axes`` theirs.
      unsaid: the places among them of which the caller has not said it, by what they are called;
        those of a collection of variables together.
    """

    rows: Any
    leaves: list[Any]
    treedef: Any
    names: list[str]
    at: list[int] = dataclasses.field(default_factory=list)
    axes: list[int] = dataclasses.field(default_factory=list)
    unsaid: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        rows: Any,
        rest: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        in_axes: Any,
        variable_axes: Mapping[str, Any],
    ) -> _Inputs:
        """Says of every array where it has its rows.

        Raises:
          ValueError: axes that do not fit, or that must be said.
        """
        given = dict(rest), args, dict(kwargs)
        paths, treedef = jax.tree_util.tree_flatten_with_path(given)
        said = _said_of(given, in_axes, variable_axes)
        one = cls(rows, [leaf for _, leaf in paths], treedef, [_name(path) for path, _ in paths])
        for i, (leaf, axis, (path, _)) in enumerate(zip(one.leaves, said, paths, strict=True)):
            if not isinstance(leaf, jax.Array | np.ndarray) or leaf.ndim == 0 or axis is None:
                continue
            is_variable = path[0].idx == 0
            if axis is Ellipsis:
                unit = f"collection {path[1].key!r}" if is_variable else one.names[i]
                one.unsaid.setdefault(unit, []).append(i)
                axis = 0
            if is_variable and axis >= leaf.ndim:
                continue  # a counter, of a collection whose arrays have rows further behind
            if not -leaf.ndim <= axis < leaf.ndim or leaf.shape[axis] != rows:
                how = "in_axes=..., as for jax.vmap"
                if is_variable:
                    how = f"variable_axes={{{path[1].key!r}: ...}}, as for nn.vmap"
                raise ValueError(
                    f"adapter_ids has {rows} rows, but {one.names[i]} is {leaf.shape}, of which "
                    f"axis {axis} is not of that size. Say where it has the rows, or None where it "
                    f"is one for all of them: {how}."
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

    def check_said(self, call: Call, ids: chex.Array, keys: Any) -> None:
        """Errors for an array that may have rows or not, by all that the model says.

        Of arrays that have rows, none can be given whole beside one row of the others, with a
        result as from one row.
        """
        if self.rows == 1 or not any(set(self.at) - set(i) for i in self.unsaid.values()):
            return
        row = _row_of(ids), _row_of(keys)
        expected = self._shapes(call, *row, self._of_rows(1))
        for name, places in self.unsaid.items():
            given = {i: leaf for i, leaf in self._of_rows(1).items() if i not in places}
            if not given:
                continue
            try:
                shapes = self._shapes(call, *row, given)
            except Exception:
                continue  # it cannot
            if shapes == expected:
                raise ValueError(
                    f"The model can be called with all of its {name} for each row, and with one "
                    f"row of it. Say which it shall be, as for jax.vmap: "
                    f"{self._how_to_say(places[0])}."
                )

    def check_tokens(self, call: Call, ids: chex.Array, keys: Any) -> None:
        """Errors where ids of tokens may be taken for those of something else.

        With another number of tokens every adapted layer must have another one as well.
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
        """The shapes of the result of a call with one id, and other arrays in some places."""

        def result(id_: Any, keys: Any, whole: list[Any], given: dict[int, Any]) -> list[Any]:
            leaves = [given.get(i, leaf) for i, leaf in enumerate(self.leaves)]
            for i, leaf in zip(others, whole, strict=True):
                leaves[i] = leaf
            rest, args, kwargs = jax.tree.unflatten(self.treedef, leaves)
            out = jax.tree.leaves(call(id_, rest, args, {**kwargs, **keys}))
            return [leaf if isinstance(leaf, jax.Array | np.ndarray) else 0 for leaf in out]

        others = [i for i in self.at if i not in given]
        whole = [jax.ShapeDtypeStruct(self.leaves[i].shape, self.leaves[i].dtype) for i in others]
        return [leaf.shape for leaf in jax.eval_shape(result, id_, keys, whole, given)]

    def _how_to_say(self, i: int) -> str:
        """How the caller says where an array has the rows."""
        rest, args, kwargs = jax.tree.unflatten(self.treedef, range(len(self.leaves)))
        for of, named in (("variable_axes", rest), ("in_axes", kwargs)):
            for name, value in named.items():
                if i in jax.tree.leaves(value):
                    return f"{of}={{{name!r}: 0}}, or {of}={{{name!r}: None}}"
        axes = tuple(None if i in jax.tree.leaves(value) else 0 for value in args)
        return f"in_axes=0, or in_axes={axes}"


def _said_of(given: Any, in_axes: Any, variable_axes: Mapping[str, Any]) -> list[Any]:
    """What the caller says of each leaf: an axis, ``None``, or ``...`` where nothing."""
    rest, args, kwargs = given
    of_args: Any
    if isinstance(in_axes, Mapping):
        if unknown := in_axes.keys() - kwargs.keys():
            raise ValueError(
                f"in_axes names {min(unknown)!r}, but the keyword arguments of the model are "
                f"{', '.join(kwargs) or 'none'}."
            )
        of_args, of_kwargs = 0, {name: in_axes.get(name, 0) for name in kwargs}
    else:
        of_args = tuple(in_axes) if isinstance(in_axes, list) else in_axes
        of_kwargs = dict.fromkeys(kwargs, Ellipsis if in_axes is Ellipsis else 0)
    of_rest = {name: variable_axes.get(name, _COLLECTIONS.get(name, Ellipsis)) for name in rest}
    try:
        return [
            *_prefix(of_rest, rest),
            *_prefix(of_args, args),
            *_prefix(of_kwargs, kwargs),
        ]
    except ValueError as error:
        raise ValueError(
            f"in_axes or variable_axes has not the structure of what it is for, which is as for "
            f"jax.vmap: {error}"
        ) from error


def _prefix(axes: Any, tree: Any) -> list[Any]:
    """The axes of the leaves of a tree, from those of a prefix of it."""
    spread: list[Any] = []

    def is_axis(axis: Any) -> bool:
        return axis is None or axis is Ellipsis

    def one(axis: Any, below: Any) -> None:
        if not (is_axis(axis) or isinstance(axis, int)):
            raise ValueError(f"an axis is an integer or None, not {axis!r}.")
        spread.extend([axis] * len(jax.tree.leaves(below)))

    jax.tree.map(one, axes, tree, is_leaf=is_axis)
    return spread


def _name(path: tuple[Any, ...]) -> str:
    """What a leaf is called in messages, of ``(collections, args, kwargs)``."""
    first, *where = path
    name, *inside = where
    if first.idx == 1:
        return f"argument {name.idx}{jax.tree_util.keystr(tuple(inside))}"
    if first.idx == 2:
        return f"argument {name.key!r}{jax.tree_util.keystr(tuple(inside))}"
    return f"variable {'/'.join(str(getattr(key, 'key', key)) for key in where)!r}"


def _row_of(tree: Any) -> Any:
    """One row of ids or keys, without its values."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree)


def _sharded_alike(mapped: list[Any], axes: list[int], *others: Any) -> tuple[Any, ...]:
    """All with the rows where the first array has them in a mesh, as ``jax.vmap`` needs it."""
    over = next((spec_of(x)[axis] for x, axis in zip(mapped, axes, strict=True)), None)
    if over is None and not any(
        s is not None for x in jax.tree.leaves((mapped, others)) for s in spec_of(x)
    ):
        return mapped, *others

    def like(array: Any, axis: int = 0) -> PartitionSpec:
        spec = [None if s == over else s for s in spec_of(array)]
        spec[axis] = over
        return PartitionSpec(*spec)

    @jax.jit  # as outside of it an array that is in no mesh yet cannot come into one
    def alike(*trees: Any) -> Any:
        specs = list(map(like, trees[0], axes)), *jax.tree.map(like, trees[1:])
        return left_to_compiler(lambda *same: same, *trees, like=specs)

    same: tuple[Any, ...] = alike(mapped, *others)
    return same


# --- what comes out ---

_ARRAY = object()
_FIRST = jax.tree_util.SequenceKey(0)


@dataclasses.dataclass
class _Result:
    """What a call gives, beside its arrays.

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
        out: Any,
        changes: bool,
        out_axes: Any,
        variable_axes: Mapping[str, Any],
        grown: Callable[[], list[int | None]],
    ) -> tuple[list[chex.Array], _Result]:
        """The arrays of one row without the axes of the rows, and the rest.

        Args:
          out: of ``apply``.
          changes: whether it is a result and collections of variables.
          out_axes: of the result.
          variable_axes: of the collections.
          grown: says of each leaf which axis grows with the batch.

        Raises:
          ValueError: an array whose axis is not that of the batch.
        """
        y, variables = out if changes else (out, {})
        paths, _ = jax.tree_util.tree_flatten_with_path((y, variables))
        said = _prefix(out_axes, y)
        for name, collection in sorted(variables.items()):
            axis = variable_axes.get(name, _COLLECTIONS.get(name, Ellipsis))
            said += _prefix(axis, collection)
        arrays, axes, leaves = [], [], []
        for i, ((path, leaf), axis) in enumerate(zip(paths, said, strict=True)):
            if not isinstance(leaf, jax.Array | np.ndarray):
                leaves.append(leaf)
                continue
            leaves.append(_ARRAY)
            if axis is Ellipsis:
                ones = [axis for axis, size in enumerate(leaf.shape) if size == 1]
                is_plain = ones == [0] and leaf.ndim > 1 and path[0].idx == 0
                axis = 0 if is_plain else grown()[i] if ones else None
            axis = _axis_of_rows(path, leaf, axis)
            arrays.append(jnp.asarray(leaf) if axis is None else jnp.squeeze(leaf, axis))
            axes.append(axis)
        return arrays, cls(axes, leaves, jax.tree.structure(out))

    def joined(self, arrays: list[Any]) -> Any:
        """The result for all rows, from arrays with these in front."""
        joined = iter(
            array[0] if axis is None else jnp.moveaxis(array, 0, axis)
            for array, axis in zip(arrays, self.axes, strict=True)
        )
        leaves = [next(joined) if leaf is _ARRAY else leaf for leaf in self.leaves]
        return jax.tree.unflatten(self.treedef, leaves)


def _axis_of_rows(path: tuple[Any, ...], array: Any, axis: int | None) -> int | None:
    """Which axis of an array in the result of one row is that of the batch."""
    of, *where = path
    is_variable = of.idx == 1
    name = _name((_FIRST, *where)) if is_variable else f"result{jax.tree_util.keystr(tuple(where))}"
    if axis is None or array.ndim == 0 or (is_variable and axis >= array.ndim):
        _check_same(name, array)
        return None
    if not -array.ndim <= axis < array.ndim or array.shape[axis] != 1:
        how = f"variable_axes={{{where[0].key!r}: ...}}" if is_variable else "out_axes=..."
        raise ValueError(
            f"Of one row the {name} is {array.shape}, and axis {axis} of it is not the batch. Say "
            f"which is, or None where it is one for all rows, as for jax.vmap: {how}. {MAP_ROWS}"
        )
    return int(axis % array.ndim)


def _check_same(name: str, array: chex.Array) -> None:
    """Errors for what has no axis for rows, where it is another one for each."""

    @custom_vmap
    def same(array: chex.Array) -> chex.Array:
        return array

    @same.def_vmap
    def differs(*_: Any) -> Any:
        raise ValueError(
            f"The {name} {array.shape} has no axis for the batch, and is another one for each row. "
            f"{MAP_ROWS}"
        )

    same(jax.lax.stop_gradient(array))
