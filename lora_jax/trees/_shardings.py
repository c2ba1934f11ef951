"""Where the arrays of adapters are: each follows its kernel."""

from __future__ import annotations

from typing import Any

import chex
import jax
from flax.traverse_util import empty_node
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from lora_jax._compat import is_traced, mesh_in_force, spec_of_box
from lora_jax.core._adapter import Adapter
from lora_jax.core._adapter_stack import AdapterStack
from lora_jax.core._boxes import content, is_quantized
from lora_jax.core._fully_trained import as_node
from lora_jax.core._meshes import explicit_sharding
from lora_jax.core._node import Node
from lora_jax.core._placement import array_specs
from lora_jax.trees._pair import base_of, check_pair, near, nodes_of
from lora_jax.trees._paths import flatten, path_of, unflatten, unflatten_adapters
from lora_jax.trees._states import names_of_variable


def shardings(
    frozen: chex.ArrayTree,
    adapters: chex.ArrayTree,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    replicate: bool = False,
) -> chex.ArrayTree:
    """The sharding of every array of adapters, so that each follows its kernel.

    ``U`` is sharded as the inputs of the kernel and ``V`` and ``m`` as its outputs; axes that stack
    kernels stay as they are, and the rank is whole. Several input axes are one axis of ``U``, which
    can only be sharded as the first of them (and as the next, where the first one is sharded into
    single entries). A leaf that is fully trained is where it is in the base.

    Args:
      frozen: the base, or all parameters. Its shardings are those of its arrays or
        ``jax.ShapeDtypeStruct``, or else the names in its boxes, as of ``nn.with_partitioning``,
        or in the metadata of its ``nnx.Param``. Or a tree of ``PartitionSpec`` or
        ``NamedSharding`` in its place.
      adapters: the adapters, of arrays or ``jax.ShapeDtypeStruct``, also a stack of them.
      mesh: that of the names and ``PartitionSpec``; the one of ``jax.set_mesh`` by default.
      replicate: every array whole on each device of its kernel instead.

    Returns:
      A tree like ``adapters`` with a ``jax.sharding.Sharding`` in place of each array, for
      ``jax.device_put`` and for ``out_shardings`` of ``jax.jit``.

    Raises:
      TypeError: if ``frozen`` is not a nested dict or a state, ``adapters`` are none, or ``mesh``
        is no mesh.
      ValueError: if nothing says how a kernel is sharded, a name is not of the mesh, or the
        adapters are for another base.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax
      >>> from jax.sharding import PartitionSpec as P
      >>> params = {"kernel": jnp.ones((8, 4))}
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=2)])
      >>> frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config)
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1])
      >>> specs = {"kernel": P("data", "model")}
      >>> found = lora_jax.shardings(specs, adapters, mesh=mesh)
      >>> tuple(found["kernel"].U.spec), tuple(found["kernel"].V.spec)
      (('data', None), (None, 'model'))
    """
    if mesh is not None and not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"mesh must be a mesh, as of jax.make_mesh, got {mesh!r}.")
    base, nodes = base_of(frozen), nodes_of(adapters)
    stacked = any(getattr(node, "count", None) is not None for node in nodes.values())
    found: dict[Any, Any] = {}
    for key, node in nodes.items():
        path, leaf = path_of(key), base.get(key, empty_node)
        if leaf is not empty_node and hasattr(content(leaf), "shape"):
            check_pair(key, node, base, _count(node, content(leaf)))
        elif leaf is empty_node and node.in_base:
            raise ValueError(
                f"There is an adapter for {path!r}, which frozen lacks. Were the adapters made for "
                f"another model? Nearest paths: {near(key, base)}."
            )
        sharding = _said(path, node.as_leaf() if leaf is empty_node else leaf, mesh)
        if sharding is None:
            raise ValueError(
                f"Nothing says how {path!r} is sharded: pass a base of arrays that are on their "
                f"devices, jax.ShapeDtypeStruct with sharding=, or a tree of NamedSharding. Or "
                f"PartitionSpec or names of axes, and what they are of, shardings(..., mesh=mesh)."
            )
        ndim = len(next(iter(node.arrays.values())).shape) - stacked
        ndim = node.axes.ndim if isinstance(node, Adapter | AdapterStack) else ndim
        if isinstance(sharding, NamedSharding) and len(sharding.spec) > ndim:
            raise ValueError(
                f"{path!r} has {ndim} axes, and its sharding is for more: {sharding.spec}."
            )
        found[key] = _like_leaf(node, leaf, sharding, replicate=replicate, in_front=int(stacked))
    return unflatten_adapters(found, adapters)


def _count(node: Node, leaf: Any) -> int | None:
    """How many there are, on an axis in front."""
    if isinstance(node, Adapter | AdapterStack):
        return node.count
    array = next(iter(node.arrays.values()))
    return None if len(array.shape) == len(leaf.shape) else array.shape[0]


def follow(node: Any, leaf: Any) -> Any:
    """A node with its arrays where its leaf is, as far as the array of the leaf says it.

    Arrays that are nowhere yet, as those of NumPy, say nothing, nor does a program that is traced
    for a mesh with automatic axes.

    Args:
      node: the node, or a plain array for the leaf itself.
      leaf: the array, which may be in a box.
    """
    array = content(leaf)
    traced = any(map(is_traced, jax.tree.leaves((node, array))))
    sharding = explicit_sharding(getattr(array, "codes", array)) if traced else _of_array(array)
    if sharding is None:
        return node
    put = jax.sharding.reshard if traced else jax.device_put
    return jax.tree.map(put, node, _like_leaf(as_node(node), array, sharding))


def follow_base(adapters: chex.ArrayTree, params: chex.ArrayTree) -> chex.ArrayTree:
    """The same for all adapters of a base."""
    base = base_of(params, "params")
    found = {
        key: follow(node, base[key]) if key in base else node
        for key, node in flatten(adapters, "adapters").items()
    }
    return unflatten(found, adapters)


def _like_leaf(
    node: Node, leaf: Any, sharding: Sharding, *, replicate: bool = False, in_front: int = 0
) -> Any:
    """The node with shardings for arrays, where its leaf has this one.

    Args:
      node: the node.
      leaf: its leaf; where this has no shape, ``in_front`` are the axes of a stack.
      sharding: of the leaf.
      replicate: whether the arrays are whole on each device instead.
      in_front: number of axes of the stack.
    """
    leaf_shape = None if isinstance(leaf, Sharding) else getattr(content(leaf), "shape", None)
    if not isinstance(sharding, NamedSharding):  # one device
        return jax.tree.map(lambda _: sharding, node.as_leaf())
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    if replicate:
        return jax.tree.map(lambda _: whole, node.as_leaf())
    if isinstance(node, Adapter | AdapterStack):
        specs = array_specs(node, sharding.spec, sharding.mesh.shape, leaf_shape)
        return node.replace(
            arrays={name: NamedSharding(sharding.mesh, spec) for name, spec in specs.items()}
        )

    def as_leaf(array: Any) -> NamedSharding:  # several of them are on axes in front
        more = in_front if leaf_shape is None else len(array.shape) - len(leaf_shape)
        return NamedSharding(sharding.mesh, PartitionSpec(*(None,) * more, *sharding.spec))

    return jax.tree.map(as_leaf, node.as_leaf())


def _said(path: str, leaf: Any, mesh: Mesh | AbstractMesh | None) -> Sharding | None:
    """How a leaf is sharded, by its array, by its names, or as it says itself."""
    array = content(leaf)
    if isinstance(array, Sharding):
        return array
    if (sharding := _of_array(array)) is not None:
        return sharding
    box = array.box if is_quantized(array) else leaf
    said = array, names_of_variable(leaf), spec_of_box(box)
    spec = next((one for one in said if isinstance(one, PartitionSpec)), None)
    mesh = mesh or getattr(box, "mesh", None) or mesh_in_force()
    if spec is None or mesh is None:
        return None
    try:
        return NamedSharding(mesh, spec)
    except ValueError as error:
        raise ValueError(f"{path!r} has the axes {tuple(spec)}: {error}") from None


def _of_array(array: Any) -> Sharding | None:
    """How an array is sharded, where it is anywhere."""
    sharding: Sharding | None
    if is_quantized(array):  # its codes have the axes of the kernel
        array = array.codes
    if is_traced(array):
        sharding = explicit_sharding(array)
        return sharding
    sharding = getattr(array, "sharding", None)
    anywhere = isinstance(sharding, NamedSharding) or getattr(array, "committed", False)
    return sharding if anywhere and isinstance(sharding, Sharding) else None
