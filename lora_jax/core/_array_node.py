"""A node whose arrays are the leaves of its pytree, and all else of it the structure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import jax

from lora_jax.core._axes import KernelAxes
from lora_jax.core._node import Node


class ArrayNode(Node):
    """The pytree of a node with named arrays.

    Every step of a training goes through it for each kernel, in several trees: so the structure
    is made once, and handed on.

    Attributes:
      arrays: the arrays by their names, also as attributes.
      axes: how the kernel is a matrix.
      materialize: whether ``W'`` stands in place of the parameter itself.
      STATIC: the names of its other fields.
    """

    STATIC: ClassVar[tuple[str, ...]]
    arrays: Mapping[str, Any]
    axes: KernelAxes
    materialize: bool

    @property
    def in_layer(self) -> bool:
        """Whether its layer computes with it, and not with ``W'`` in the place of the kernel."""
        return not self.materialize

    @property
    def stack_ndim(self) -> int:
        """How many axes stack the kernels: those of a scan, and one for parts of a fused kernel."""
        return len(self.axes.batch) + (self.axes.fused > 1)

    def __getattr__(self, name: str) -> Any:
        arrays = self.__dict__.get("arrays", {})
        if name in arrays:
            return arrays[name]
        if name == "m" and arrays:  # of LoRA
            return None
        raise AttributeError(f"{type(self).__name__} has no {name!r}; it has {', '.join(arrays)}.")

    def tree_flatten(self) -> tuple[Any, Any]:
        """Its arrays, and all else as its structure.

        Next to ``U`` and ``V`` alone there is an ``m`` that is ``None``, as in checkpoints of orbax
        that an older version has written.
        """
        structure = self.__dict__.get("_structure")
        if structure is None:
            names = tuple(self.arrays)
            names = (*names, "m") if names == ("U", "V") else names
            structure = (names, *(getattr(self, name) for name in self.STATIC))
            self.__dict__["_structure"] = structure
        children = tuple(self.arrays.values())
        return children if len(children) == len(structure[0]) else (*children, None), structure

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """The same, with the names as keys."""
        children, structure = self.tree_flatten()
        keys = map(jax.tree_util.GetAttrKey, structure[0])
        return tuple(zip(keys, children, strict=True)), structure

    @classmethod
    def tree_unflatten(cls, structure: Any, children: Iterable[Any]) -> Self:
        """The inverse of :meth:`tree_flatten`."""
        names, *static = structure
        new = object.__new__(cls)
        arrays = dict(zip(names, children, strict=True))
        if names == ("U", "V", "m") and arrays["m"] is None:
            del arrays["m"]
        fields = new.__dict__
        fields.update(zip(cls.STATIC, static, strict=True))
        fields["arrays"], fields["_structure"] = arrays, structure
        return new
