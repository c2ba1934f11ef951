"""Where the arrays of an adapter are, so that they follow their kernel.

``U`` is sharded as the inputs of the kernel, ``V`` and ``m`` as its outputs; axes that stack
kernels stay sharded as they are, and the rank is whole. Several axes of a kernel become one axis of
a factor, which can only be cut where the blocks of the kernel lie one after another: by the first
axis, and by the next one where the first is cut into single entries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

from lora_jax.core._adapter import Adapter
from lora_jax.core._adapter_stack import AdapterStack
from lora_jax.core._axes import KernelAxes

# Names of axes of a mesh, by which one axis of an array is cut.
Names = tuple[str, ...]


def array_specs(
    node: Adapter | AdapterStack,
    spec: PartitionSpec,
    mesh_shape: Mapping[str, int],
    shape: Sequence[int] | None = None,
) -> dict[str, PartitionSpec]:
    """How each array of an adapter, or of a stack of them, is sharded, for a kernel sharded so.

    Args:
      node: the adapter, whose arrays may be abstract.
      spec: of the kernel.
      mesh_shape: the sizes of the axes of the mesh.
      shape: that of the kernel; without it an axis is taken to be longer than its cuts.

    Example:
      >>> import jax.numpy as jnp
      >>> from lora_jax.core.variants._dora import DoRA
      >>> a = Adapter(jnp.zeros((8, 2)), jnp.ones((2, 4)), jnp.ones(4), variant=DoRA(), rank=2)
      >>> specs = array_specs(a, PartitionSpec("data", "model"), {"data": 4, "model": 2})
      >>> {name: tuple(spec) for name, spec in specs.items()}
      {'U': ('data', None), 'V': (None, 'model'), 'm': ('model',)}
    """
    axes = node.axes
    names = [_names(spec, axis) for axis in range(axes.ndim)]

    def cut(some: Sequence[int]) -> Names:
        sizes = [None if shape is None else shape[axis] for axis in some]
        return _joined([names[axis] for axis in some], sizes, mesh_shape)

    roles: dict[str, Names] = {
        "d": cut(axes.inputs),
        "k": cut(_outputs_of_one(axes, shape)),
        "": (),
    }
    stack = [names[axis] for axis in axes.batch] + [()] * (axes.fused > 1)
    of_matrix = _roles(node)
    found = {}
    for name, array in node.arrays.items():
        own = [*stack, *(roles[role] for role in of_matrix[name])]
        in_front: list[Names] = [()] * (len(array.shape) - len(own))  # where there are several
        entries = in_front + own
        cuts = [math.prod(mesh_shape[one] for one in entry) for entry in entries]
        found[name] = PartitionSpec(
            *(
                _entry(entry) if size % cut_in == 0 else None
                for entry, size, cut_in in zip(entries, array.shape, cuts, strict=True)
            )
        )
    return found


def _names(spec: PartitionSpec, axis: int) -> Names:
    """By which axes of a mesh an axis is cut; what is left to the compiler is not known."""
    entry = spec[axis] if axis < len(spec) else None
    if isinstance(entry, str):
        return (entry,)
    return tuple(entry) if isinstance(entry, tuple) else ()


def _entry(names: Names) -> str | Names | None:
    """The entry of a ``PartitionSpec``."""
    return names[0] if len(names) == 1 else names or None


def _joined(
    names: Sequence[Names], sizes: Sequence[int | None], mesh_shape: Mapping[str, int]
) -> Names:
    """By what several axes can be cut when they are one."""
    joined: Names = ()
    for own, size in zip(names, sizes, strict=True):
        joined += own
        if size != math.prod(mesh_shape[name] for name in own):
            break
    return joined


def _outputs_of_one(axes: KernelAxes, shape: Sequence[int] | None) -> Sequence[int]:
    """The output axes of one of the fused kernels: those behind the axes that count them.

    Where there are none, as they lie side by side in one axis, each is cut as all of it is.
    """
    fused = 1
    for n, axis in enumerate(axes.outputs if shape is not None and axes.fused > 1 else ()):
        fused *= shape[axis]  # type: ignore[index]
        if fused == axes.fused:
            return axes.outputs[n + 1 :] or axes.outputs
    return axes.outputs


def _roles(node: Adapter | AdapterStack) -> dict[str, tuple[str, ...]]:
    """For each array of one matrix, which of its axes are the ``d`` inputs and ``k`` outputs.

    They are known by sizes that nothing else has.
    """
    d, k = 1_000_003, 1_000_033
    role = {d: "d", k: "k"}
    members = node.members if isinstance(node, AdapterStack) else [node]
    shapes: dict[str, tuple[int, ...]] = {}
    for member in members:
        shapes |= member.variant.shapes(d, k, member.rank)
    return {name: tuple(role.get(size, "") for size in shape) for name, shape in shapes.items()}
