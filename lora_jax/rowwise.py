"""Leaves that were trained whole, such as a head or a bias, in a batch of mixed requests.

A module of which a parameter differs from row to row is applied row by row, under ``jax.vmap``. It
need not be a layer that is known: a normalization, a head, whatever computes with its own
parameters only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter import Whole
from lora_jax.mixed import BASE, check_rows, taken
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
    known = not isinstance(ids, jax.core.Tracer)
    if leaf is None and known and bool((np.asarray(ids) == BASE).any()):
        raise ValueError(
            f"{path!r} was trained whole, and the base lacks it, so no row can have the base alone "
            f"(id {BASE}): pass all of the model's parameters as {{'params': params}}."
        )
    base = jnp.nan if leaf is None else unbox(leaf)
    rows = jax.tree.map(lambda array: taken(array, ids, base).astype(dtype), box)
    if ids.ndim == 0:
        return {key: rows}
    leaves = tuple(jax.tree.map(lambda array, b=b: array[b], rows) for b in range(len(ids)))
    own = OwnLeaves(leaves, path)
    return {key: leaves[0], (*key[:-1], key[-1] + SUFFIX): own}


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
            f"has the {what}. Map over the rows instead: jax.vmap(lambda i, x: lora_apply(model, "
            f"variables, stacked, x[None], adapter_ids=i)[0])(adapter_ids, x)."
        )
    count = len(first.leaves)
    ids = jnp.arange(count)
    leaves, treedef = jax.tree.flatten((args, dict(kwargs)))
    # The first argument must have the rows; what else has them is mapped with it.
    arrays = [i for i, leaf in enumerate(leaves) if getattr(leaf, "ndim", 0)]
    check_rows(ids, leaves[arrays[0]].shape if arrays else (), first.path)
    mapped = [i for i in arrays if leaves[i].shape[0] == count]
    alone = module.clone(parent=None, name=None)
    rngs = {name: jax.random.split(module.make_rng(name), count) for name in _rngs(module)}

    def one(b: chex.Array, own: Mapping[str, Any], rngs: Any, mapped_leaves: list[Any]) -> Any:
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
        out = alone.apply({"params": {**here, **own}}, *args, method=method, rngs=rngs, **kwargs)
        return jax.tree.map(lambda y: _without_batch(y, first.path), out)

    stacked = {
        name: jax.tree.map(lambda *x: jnp.stack(x), *value.leaves) for name, value in own.items()
    }
    return jax.vmap(one)(ids, stacked, rngs, [leaves[i] for i in mapped])


def _rngs(module: nn.Module) -> list[str]:
    assert module.scope is not None
    return list(module.scope.rngs)


def _without_batch(y: Any, path: str) -> Any:
    if jnp.ndim(y) == 0 or jnp.shape(y)[0] != 1:
        raise ValueError(
            f"{path!r} was trained whole and differs from row to row, but its module gives a "
            f"result {jnp.shape(y)} for one row, whose first axis is not the batch."
        )
    return y[0]
