"""A batch in which every row has an adapter of its own: the model, mapped over its rows.

By definition it is ``jax.vmap`` over ``(id, row)`` of a call with one row, a batch of the size 1.
So a row has what it would have alone, whatever the model computes: caches, norms, heads that were
fully trained. What the rows share, first of all ``x W``, is computed once for all of them.

Nothing is concluded from the size of an axis. The caller says which arrays have rows, and where, as
for ``jax.vmap``, and is asked where that is not plain.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec

from lora_jax.core._meshes import left_to_compiler, spec_of
from lora_jax.tracing._liveness import arrays_in

# What to do where this is not possible.
MAP_ROWS = (
    "Map over the rows yourself: jax.vmap(lambda i, x: lora_apply(model, variables, stacked, "
    "x[None], adapter_ids=i))(adapter_ids, x)."
)

# Calls the model: of ids, of its other collections, and of the arguments by position and by name.
Call = Callable[[Any, dict[str, Any], tuple[Any, ...], dict[str, Any]], Any]
# Flax's collections that have no rows.
_COLLECTIONS = {"params": None, "batch_stats": None}
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
    rest = {name: flax.core.unfreeze(tree) for name, tree in rest.items()}
    inputs = _Inputs.of(ids.shape[0], rest, args, plain, in_axes, variable_axes)
    keys = jax.tree.map(lambda key: jax.random.split(key, ids.shape[0]), keys)
    results: list[_Result] = []

    def one(id_: Any, mapped: list[Any], keys: Any) -> list[Any]:
        rest, args, kwargs = inputs.of_row(mapped)
        out = call(id_, rest, args, {**kwargs, **keys})
        y, variables = out if gives_variables(kwargs) else (out, {})
        if unknown := variable_axes.keys() - rest.keys() - variables.keys():
            raise ValueError(
                f"variable_axes names the collection {min(unknown)!r}, which is neither given nor "
                f"in the result."
            )
        grown = functools.partial(inputs.grown, call, id_, keys)
        arrays, result = _Result.of(y, variables, out_axes, variable_axes, grown, id_)
        results[:] = [dataclasses.replace(result, treedef=jax.tree.structure(out))]
        return arrays

    mapped, ids, keys = _sharded_alike(inputs.mapped, inputs.axes, ids, keys)
    arrays = jax.vmap(one, (0, inputs.axes, 0), spmd_axis_name=spmd_axis_name)(ids, mapped, keys)
    out = results[0].joined(arrays)
    if ids.ndim > 1:
        inputs.check_tokens(call, ids, keys)
    return out


def gives_variables(kwargs: Mapping[str, Any]) -> bool:
    """Whether ``apply`` gives a result and variables, by its arguments."""
    return kwargs.get("mutable", False) is not False or bool(kwargs.get("capture_intermediates"))


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
    ) -> _Inputs:
        """Says of every array where it has its rows.

        Raises:
          ValueError: axes that do not fit, or that must be said.
        """
        given = dict(rest), args, dict(kwargs)
        paths, treedef = jax.tree_util.tree_flatten_with_path(given)
        said = _said_of(given, in_axes, variable_axes)
        one = cls(rows, [leaf for _, leaf in paths], treedef, [_name(path) for path, _ in paths])
        may = [
            i
            for i, (leaf, axis) in enumerate(zip(one.leaves, said, strict=True))
            if isinstance(leaf, jax.Array | np.ndarray) and leaf.ndim and axis is not None
        ]
        of_args = [i for i in may if paths[i][0][0].idx > 0]
        if len(of_args) == 1 and said[of_args[0]] is Ellipsis:
            said[of_args[0]] = 0
        one._check_said([i for i in may if said[i] is Ellipsis], may)
        for i in may:
            leaf, axis, path = one.leaves[i], said[i], paths[i][0]
            is_variable = path[0].idx == 0
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

    def _check_said(self, unsaid: list[int], may: list[int]) -> None:
        """Errors for arrays of which it is not said whether they have rows."""
        if not unsaid:
            return
        rest, args, kwargs = jax.tree.unflatten(self.treedef, range(len(self.leaves)))
        names = ", ".join(f"{self.names[i]} {self.leaves[i].shape}" for i in unsaid)

        def has(places: list[int], tree: Any) -> bool:
            return any(i in places for i in jax.tree.leaves(tree))

        collections = {name: 0 for name, tree in rest.items() if has(may, tree)}
        axes = [0 if has(may, tree) else None for tree in args]
        of_kwargs = {name: 0 for name, tree in kwargs.items() if has(may, tree)}
        ways = []
        if has(unsaid, (args, kwargs)):
            each = repr((*axes, of_kwargs) if of_kwargs else tuple(axes))
            ways.append(f"in_axes=0, or for each argument in_axes={each}")
        if has(unsaid, rest):
            ways.append(f"variable_axes={collections}")
        raise ValueError(
            f"With adapter_ids say which arrays have the rows, and in which axis: {names}. As for "
            f"jax.vmap: {' and '.join(ways)}, with None in the place of 0 for what is one for all "
            f"rows, or a tree of axes for a tree of arrays."
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
        """The shapes of the result of a call with one id, and with these in place of the arrays."""

        def result(id_: Any, keys: Any, given: dict[int, Any]) -> list[Any]:
            leaves = [given.get(i, leaf) for i, leaf in enumerate(self.leaves)]
            rest, args, kwargs = jax.tree.unflatten(self.treedef, leaves)
            out = jax.tree.leaves(call(id_, rest, args, {**kwargs, **keys}))
            return [leaf if isinstance(leaf, jax.Array | np.ndarray) else 0 for leaf in out]

        return [leaf.shape for leaf in jax.eval_shape(result, id_, keys, given)]


def _said_of(given: Any, in_axes: Any, variable_axes: Mapping[str, Any]) -> list[Any]:
    """What the caller says of each leaf: an axis, ``None``, or ``...`` where nothing."""
    rest, args, kwargs = given
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
        y: Any,
        variables: Mapping[str, Any],
        out_axes: Any,
        variable_axes: Mapping[str, Any],
        grown: Callable[[], list[int | None]],
        id_: Any,
    ) -> tuple[list[chex.Array], _Result]:
        """The arrays of one row without the axes of the rows, and the rest.

        Args:
          y: the result.
          variables: collections that ``apply`` gives beside it.
          out_axes: of the result.
          variable_axes: of the collections.
          grown: says of each leaf which axis grows with the batch.
          id_: of the row.

        Raises:
          ValueError: an array whose axis is not that of the batch.
        """
        paths, _ = jax.tree_util.tree_flatten_with_path((y, variables))
        said = _prefix(out_axes, y)
        for name, collection in sorted(variables.items()):
            axis = variable_axes.get(name, _COLLECTIONS.get(name, Ellipsis))
            said += _prefix(axis, collection)
        arrays, axes, leaves = [], [], []
        for i, ((path, leaf), axis) in enumerate(zip(paths, said, strict=True)):
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
    name = _name((_FIRST, *where)) if is_variable else f"result{jax.tree_util.keystr(tuple(where))}"
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
    """Errors for what has no axis for rows, where it is another one for each."""

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
