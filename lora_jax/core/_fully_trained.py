"""The node of a leaf that is fully trained, such as a head or a bias."""

from __future__ import annotations

from typing import Any, ClassVar

import chex
import flax.struct
import jax
import jax.numpy as jnp

from lora_jax.core._boxes import content, is_quantized, unbox
from lora_jax.core._node import Node


@flax.struct.dataclass
class FullyTrained(Node):
    """A leaf that is fully trained, kept in float32 though the model has it in less.

    An optimizer's small steps vanish in 16 bits. The leaf goes back to ``dtype`` where the model
    uses it. A leaf that is float32 in the model stands in the tree as the plain array.

    Attributes:
      value: the leaf in float32.
      dtype: name of the dtype that the model has it in.
    """

    in_base: ClassVar[bool] = False
    value: Any
    # None in the node that as_node makes of a plain array.
    dtype: str | None = flax.struct.field(pytree_node=False, default="float32")

    @property
    def arrays(self) -> dict[str, Any]:
        """The trained array, out of its box."""
        return {"value": self.array}

    @property
    def kind(self) -> str:
        """``"full"``."""
        return "full"

    @property
    def array(self) -> Any:
        """The value out of its box."""
        return unbox(self.value)

    def merged_dtype(self, leaf: Any = None) -> Any:
        """The dtype that the model has the leaf in."""
        return jnp.dtype(self.array.dtype if self.dtype is None else self.dtype)

    def merge(self, leaf: Any = None) -> chex.Array:
        """The value itself."""
        return self.array

    def as_leaf(self) -> Any:
        """As it stands in a tree of adapters: a plain array where it was one."""
        return self.value if self.dtype is None else self

    def as_parameter(self) -> Any:
        """As the model has it: in its dtype, and in its box."""
        if self.dtype is None:
            return self.value
        return jax.tree.map(lambda x: x.astype(self.dtype), self.value)

    def check(self, path: str) -> None:
        """Raises ValueError if it could not be trained, or not go back into its dtype."""
        check_trainable(path, self.merged_dtype())

    def check_fits(
        self, path: str, shape: tuple[int, ...], count: int | None = None, name: str = "the base"
    ) -> None:
        """Checks the shape; of a stack nothing, as its leaf need not be in the base."""
        found = tuple(self.array.shape)
        if count is None and found != shape:
            raise ValueError(
                f"{path!r} was fully trained as {found}, but {name} has {shape} there. Was it made "
                f"for another model?"
            )


def as_node(leaf: Any) -> Node:
    """The node that a leaf of a tree of adapters is: a plain array is a leaf fully trained.

    ``FullyTrained.as_leaf`` is the inverse.
    """
    return leaf if isinstance(leaf, Node) else FullyTrained(leaf, None)


def check_trainable(path: str, dtype: Any) -> None:
    """Raises ValueError if a leaf of this dtype cannot be fully trained."""
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{path!r} cannot be fully trained: it is {dtype}, not floating-point.")


def raise_precision(path: str, leaf: Any) -> Any:
    """A leaf to train fully: at least float32, its own dtype kept in the structure.

    It is a copy, so that a train step may donate it and the parameters keep theirs.

    Args:
      path: of the leaf.
      leaf: an array, which may be in a box.

    Returns:
      A plain array, or a :class:`FullyTrained`.

    Raises:
      ValueError: if the leaf is not floating-point, or is quantized.
    """
    if is_quantized(content(leaf)):
        raise ValueError(
            f"{path!r} is quantized, and cannot be fully trained: leave it out of what is "
            f"quantized, or of what is trained."
        )
    node = FullyTrained(leaf, None)
    dtype = getattr(node.array, "dtype", None)
    check_trainable(path, dtype)
    dtype = node.merged_dtype()
    if dtype.itemsize >= 4:
        return jax.tree.map(jnp.array, leaf)
    return FullyTrained(jax.tree.map(lambda x: jnp.array(x, jnp.float32), leaf), dtype.name)
