"""The arguments of a call that is only traced: arrays without values, and all else as it is."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from lora_jax.core._boxes import content, is_quantized, rebox
from lora_jax.core._meshes import explicit_sharding


@dataclasses.dataclass(frozen=True)
class AbstractInputs:
    """Any tree, taken apart into what is traced and what is not. It holds no array alive.

    Attributes:
      arrays: the arrays, without values.
      at: their places among all leaves.
      leaves: the leaves, ``None`` for those.
      treedef: the structure.

    Example:
      >>> import jax.numpy as jnp
      >>> inputs = AbstractInputs.of(((jnp.ones(3), "train"), {"depth": 2}))
      >>> inputs.arrays, inputs.with_arrays([0.0])
      ([ShapeDtypeStruct(shape=(3,), dtype=float32)], ((0.0, 'train'), {'depth': 2}))
    """

    arrays: list[Any]
    at: list[int]
    leaves: list[Any]
    treedef: Any

    @classmethod
    def of(cls, tree: Any) -> AbstractInputs:
        """The tree, taken apart. A NumPy array may be what a model takes sizes from: it stays."""
        leaves, treedef = jax.tree.flatten(tree)
        at = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array | jax.ShapeDtypeStruct)]
        arrays = [abstract(leaves[i]) for i in at]
        return cls(arrays, at, [None if i in set(at) else x for i, x in enumerate(leaves)], treedef)

    def with_arrays(self, arrays: list[Any]) -> Any:
        """The tree, with these in the places of its arrays."""
        values = dict(zip(self.at, arrays, strict=True))
        return jax.tree.unflatten(
            self.treedef, [values.get(i, leaf) for i, leaf in enumerate(self.leaves)]
        )


def without_values(leaf: Any) -> Any:
    """A leaf of the parameters, without its values. A quantized one is what it dequantizes to."""
    return jax.tree.map(abstract, dequantized_abstractly(leaf))


def dequantized_abstractly(leaf: Any) -> Any:
    """A leaf; a quantized one as what it dequantizes to, without values."""
    inside = content(leaf)
    if not is_quantized(inside):
        return leaf
    return rebox(leaf, jax.eval_shape(type(inside).dequantize, inside))


def abstract(leaf: Any) -> Any:
    """An array without its values. In a mesh with explicit axes the sharding is in its type."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jax.dtypes.result_type(leaf)
    return jax.ShapeDtypeStruct(np.shape(leaf), dtype, sharding=explicit_sharding(leaf))
