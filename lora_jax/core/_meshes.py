"""Meshes with explicit axes, in which the sharding of an array is a part of its type.

``jax.make_mesh`` makes such meshes. There every operation has a rule for the sharding of its
result, and is an error where that is ambiguous: a reshape that merges sharded axes, a product that
contracts them. The plain model says how its results shall be sharded. What an adapter adds to a
result is sharded as the result is, and the shardings in between are left to the compiler, as all
are in a mesh with automatic axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def left_to_compiler(function: Callable[..., Any], *args: Any, like: Any) -> Any:
    """``function(*args)``, sharded by the compiler inside, and the result as ``like``.

    Where none of the arrays is in a mesh with explicit axes it is ``function(*args)`` and no more.

    Args:
      function: of arrays.
      *args: trees of arrays.
      like: what the result shall be sharded as, an array or a ``PartitionSpec``; a tree of such
        where the result is one; or a function that gives it.

    Example:
      >>> import jax.numpy as jnp
      >>> y = jnp.ones((2, 3))
      >>> left_to_compiler(lambda y, a: a * y, y, jnp.ones((1, 3)), like=y).shape
      (2, 3)
    """
    explicit = _explicit(args)
    if explicit is None:
        return function(*args)
    mesh, axes = explicit
    like = like() if callable(like) else like

    def sharding(one: Any) -> NamedSharding:
        return NamedSharding(mesh, one if isinstance(one, PartitionSpec) else spec_of(one))

    out = jax.tree.map(sharding, like, is_leaf=lambda one: isinstance(one, PartitionSpec))
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=out)(*args)


def spec_of(array: Any) -> PartitionSpec:
    """By which axes of a mesh each axis of an array is sharded, as its type says.

    Of a quantized kernel, that of its codes, which have its axes.

    Example:
      >>> import jax.numpy as jnp
      >>> tuple(spec_of(jnp.ones((2, 3))))
      (None, None)
    """
    spec: PartitionSpec = jax.typeof(getattr(array, "codes", array)).sharding.spec
    return spec


def explicit_sharding(array: Any) -> Any:
    """How an array is sharded, where that is a part of its type; else ``None``.

    Example:
      >>> import jax.numpy as jnp
      >>> print(explicit_sharding(jnp.ones((2, 3))))
      None
    """
    return None if _explicit(array) is None else jax.typeof(array).sharding


def _explicit(tree: Any) -> tuple[Any, tuple[str, ...]] | None:
    """The mesh of the first array that is in one with explicit axes, and these axes."""
    for leaf in jax.tree.leaves(tree):
        mesh = jax.typeof(leaf).sharding.mesh
        types = () if mesh.empty else zip(mesh.axis_names, mesh.axis_types, strict=True)
        axes = tuple(name for name, kind in types if kind == AxisType.Explicit)
        if axes:
            return mesh, axes
    return None
