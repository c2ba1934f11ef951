"""Leaves that were trained whole, such as a head or a bias, in a batch of mixed requests.

A module of which a parameter differs from row to row is applied row by row, under ``jax.vmap``. It
need not be a layer that is known: a normalization, a head, whatever computes with its own
parameters only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chex
import flax.errors
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lora_jax.adapter import Whole
from lora_jax.compat import is_traced, mutable_but_params, streams
from lora_jax.meshes import left_to_compiler, spec_of
from lora_jax.mixed import BASE, MAP_ROWS, check_rows, taken
from lora_jax.tree import Key, path_of, unbox

# The name of the leaves of the rows is that of the parameter and this.
SUFFIX = "@rows@lora"


@flax.struct.dataclass
class OwnLeaves:
    """A parameter for each row of the batch, beside the parameter.

    One leaf for each row, so that transforms slice them as they slice the parameter.
    """

    leaves: tuple[Any, ...]
    path: str = flax.struct.field(pytree_node=False)


def beside(key: Key, leaf: Any, node: Any, ids: chex.Array) -> dict[Key, Any]:
    """The leaves of the rows, next to the parameter; or it alone, where one is for all rows.

    Args:
      key: of the parameter.
      leaf: the base's own, or ``None``.
      node: the leaves of all adapters, on an axis in front.
      ids: of the rows.
    """
    path = path_of(key)
    if ids.ndim > 1:
        raise ValueError(
            f"{path!r} was trained whole, so that adapter_ids must be one number for each example, "
            f"not for each token: {ids.shape}."
        )
    dtype = node.dtype if isinstance(node, Whole) else unbox(node).dtype
    box = node.value if isinstance(node, Whole) else node
    known = not is_traced(ids)
    if leaf is None and known and bool((np.asarray(ids) == BASE).any()):
        raise ValueError(
            f"{path!r} was trained whole, and the base lacks it, so no row can have the base alone "
            f"(id {BASE}): pass all of the model's parameters as {{'params': params}}."
        )
    shape = jnp.shape(unbox(box))
    if leaf is not None and jnp.shape(unbox(leaf)) != shape[1:]:
        raise ValueError(
            f"{path!r} was trained whole: its stack is {shape}, but the base has "
            f"{jnp.shape(unbox(leaf))} there. Was it made for another model?"
        )
    if not all(isinstance(n, int) for n in ids.shape):
        raise ValueError(
            f"{path!r} was trained whole, which needs a batch of a known size, and adapter_ids is "
            f"{ids.shape}."
        )
    base = (0.0 if known else jnp.nan) if leaf is None else unbox(leaf)
    rows = jax.tree.map(lambda array: taken(array, ids, base).astype(dtype), box)
    if ids.ndim == 0:
        return {key: rows}
    leaves = tuple(jax.tree.map(lambda array, b=b: array[b], rows) for b in range(len(ids)))
    own = OwnLeaves(leaves, path)
    # Who reads the parameter past its module must not get that of the first row.
    # (Of NumPy, as JAX may have been told to look for NaN in what it computes.)
    unread = jax.tree.map(
        lambda array: np.broadcast_to(np.array(np.nan, array.dtype), array.shape), leaves[0]
    )
    return {key: unread, (*key[:-1], key[-1] + SUFFIX): own}


def own_leaves(module: nn.Module) -> dict[str, OwnLeaves]:
    """The parameters of a module that differ from row to row, by their names."""
    params: Any = module.variables.get("params", {})
    return {
        name.removesuffix(SUFFIX): value
        for name, value in (params.items() if isinstance(params, Mapping) else ())
        if isinstance(value, OwnLeaves)
    }


def call_by_rows(
    module: nn.Module,
    method: str,
    own: Mapping[str, OwnLeaves],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """A call of a module of which parameters differ from row to row."""
    first = next(iter(own.values()))
    params = dict(module.variables["params"])
    inside = [name for name, value in params.items() if isinstance(value, Mapping)]
    others = [name for name in module.variables if name != "params"]
    if inside or others:
        what = f"module {inside[0]!r}" if inside else f"collection {others[0]!r}"
        raise ValueError(
            f"{first.path!r} was trained whole and differs from row to row, but its module also "
            f"has the {what}. {MAP_ROWS}"
        )
    count = len(first.leaves)
    ids = jnp.arange(count)
    leaves, treedef = jax.tree.flatten((args, dict(kwargs)))
    inputs = jax.tree.leaves([*args, *kwargs.values()])  # in the order of the call
    x = next((_shape(leaf) for leaf in inputs if _shape(leaf)), ())
    check_rows(ids, x, first.path)
    mapped = [i for i, leaf in enumerate(leaves) if _shape(leaf)[:1] == (count,)]
    unlike = [_shape(leaves[i]) for i in mapped if len(_shape(leaves[i])) != len(x)]
    if unlike:
        raise ValueError(
            f"{first.path!r} was trained whole and differs from row to row. Its module is given an "
            f"array {unlike[0]} beside its input {x}, and whether its first axis is that of the "
            f"rows cannot be told. {MAP_ROWS}"
        )
    mutable = mutable_but_params(module)
    alone = module.clone(parent=None, name=None)
    rngs = {name: jax.random.split(module.make_rng(name), count) for name in streams(module)}

    def one(mapped_leaves: list[Any], b: chex.Array, own: Mapping[str, Any], rngs: Any) -> Any:
        given = dict(zip(mapped, mapped_leaves, strict=True))
        leaves_ = [given[i][None] if i in given else leaf for i, leaf in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(treedef, leaves_)
        here = {
            name: value.replace(rows=value.rows.replace(row=b))
            if getattr(value, "rows", None) is not None
            else value
            for name, value in params.items()
            if not isinstance(value, OwnLeaves)
        }
        variables = {"params": {**here, **own}}
        try:
            out = alone.apply(variables, *args, method=method, rngs=rngs, mutable=mutable, **kwargs)
        except flax.errors.FlaxError as error:
            raise ValueError(
                f"{first.path!r} was trained whole and differs from row to row, but its module "
                f"cannot be applied alone. {MAP_ROWS}"
            ) from error
        if mutable is not False:
            out, changed = out
            if jax.tree.leaves(changed):
                raise ValueError(
                    f"{first.path!r} was trained whole and differs from row to row, but its module "
                    f"also writes to {', '.join(map(repr, changed))}. {MAP_ROWS}"
                )
        return jax.tree.map(lambda y: _without_batch(y, first.path), out)

    stacked = {
        name: jax.tree.map(lambda *x: jnp.stack(x), *value.leaves) for name, value in own.items()
    }
    return jax.vmap(one)(*_sharded_alike([leaves[i] for i in mapped], ids, stacked, rngs))


def _sharded_alike(inputs: list[Any], *others: Any) -> tuple[Any, ...]:
    """All with the rows where the first input has them in a mesh, as ``jax.vmap`` needs it."""
    over = spec_of(inputs[0])[0]

    def like(array: Any) -> PartitionSpec:
        return PartitionSpec(over, *(None if s == over else s for s in spec_of(array)[1:]))

    @jax.jit  # as outside of it an array that is in no mesh yet cannot come into one
    def alike(*trees: Any) -> Any:
        return left_to_compiler(lambda *same: same, *trees, like=jax.tree.map(like, trees))

    same: tuple[Any, ...] = alike(inputs, *others)
    return same


def _shape(leaf: Any) -> tuple[int, ...]:
    return tuple(getattr(leaf, "shape", ()))


def _without_batch(y: Any, path: str) -> Any:
    if jnp.ndim(y) == 0 or jnp.shape(y)[0] != 1:
        raise ValueError(
            f"{path!r} was trained whole and differs from row to row, but its module gives a "
            f"result {jnp.shape(y)} for one row, whose first axis is not the batch."
        )
    return y[0]
