"""A batch in which each row has its own adapter: the model, mapped over its rows.

By definition it is ``jax.vmap`` over ``(id, row)`` of a call with one row, a batch of the size 1.
So a row has what it would have alone, whatever the model computes: caches, norms, heads that were
fully trained. What the rows share, first of all ``x W``, is computed once for all of them.

Nothing is concluded from the size of an axis. The caller says which arrays have rows, and where, as
for ``jax.vmap``, and is asked where that is not plain.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import chex
import flax.core
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lora_jax.core._meshes import left_to_compiler, spec_of
from lora_jax.tracing._row_inputs import Call, RowInputs
from lora_jax.tracing._row_results import RowResult


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
    keys: Collection[str],
    gives_variables: bool,
) -> Any:
    """``call`` for every row with its id, as by ``jax.vmap``.

    Args:
      call: of a batch with one row.
      ids: ``(batch, ...)``.
      rest: the collections of variables other than ``params``.
      args: of the model.
      kwargs: of the model and of ``apply``.
      in_axes: as for :func:`lora_jax.lora_apply`; alike the others.
      out_axes: as there.
      variable_axes: as there.
      spmd_axis_name: as there.
      keys: names of arguments with keys of random numbers: each row gets its own keys.
      gives_variables: whether ``call`` gives a result and collections.
    """
    of_rows = {name: kwargs[name] for name in keys if kwargs.get(name) is not None}
    plain = {name: value for name, value in kwargs.items() if name not in of_rows}
    rest = {name: flax.core.unfreeze(tree) for name, tree in rest.items()}
    inputs = RowInputs.of(ids.shape[0], rest, args, plain, in_axes, variable_axes)
    of_rows = jax.tree.map(functools.partial(_keys_of_rows, rows=ids.shape[0]), of_rows)
    results: list[RowResult] = []

    def one(id_: Any, mapped: list[Any], keys: Any) -> list[Any]:
        rest, args, kwargs = inputs.of_row(mapped)
        out = call(id_, rest, args, {**kwargs, **keys})
        y, variables = out if gives_variables else (out, {})
        if unknown := variable_axes.keys() - rest.keys() - variables.keys():
            raise ValueError(
                f"variable_axes names the collection {min(unknown)!r}, which is neither given nor "
                f"in the result."
            )
        grown = functools.partial(inputs.grown, call, id_, keys)
        arrays, result = RowResult.of(y, variables, out_axes, variable_axes, grown, id_)
        results[:] = [dataclasses.replace(result, treedef=jax.tree.structure(out))]
        return arrays

    mapped, ids, of_rows = _sharded_alike(inputs.mapped, inputs.axes, ids, of_rows)
    arrays = jax.vmap(one, (0, inputs.axes, 0), spmd_axis_name=spmd_axis_name)(ids, mapped, of_rows)
    out = results[0].joined(arrays)
    if ids.ndim > 1:
        inputs.check_tokens(call, ids, of_rows)
    return out


def _keys_of_rows(key: chex.PRNGKey, rows: int) -> chex.PRNGKey:
    """Keys for rows, on an axis in front; of stacked keys those of each."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.ndim == 0:
        return jax.random.split(key, rows)
    each = jax.vmap(lambda one: jax.random.split(one, rows), out_axes=1)(jnp.ravel(key))
    return jnp.reshape(each, (rows, *key.shape))


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
