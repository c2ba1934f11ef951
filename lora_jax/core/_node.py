"""What every node of an adapter tree can do: the one protocol of all functions over such trees.

A tree of adapters has a node for each leaf of the model that is trained. A node changes its leaf,
which stays in the base, or takes its place.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import chex
import jax.numpy as jnp


class Node(abc.ABC):
    """What is trained for one leaf of the model. A pytree, whose leaves are the trained arrays.

    Attributes:
      in_base: whether the leaf itself stays in the base, and the node only changes it.
      arrays: the trained arrays by the names of their fields.
      base_hash: of the leaf of the base that it is for, where it is for that one only and the hash
        is known.
    """

    in_base: ClassVar[bool] = True
    base_hash: str | None = None
    if TYPE_CHECKING:

        @property
        def arrays(self) -> Mapping[str, Any]:
            """The trained arrays by the names of their fields."""

    @abc.abstractmethod
    def merge(self, leaf: Any) -> chex.Array:
        """The leaf of the merged model, in float32 or the leaf's own precision where that is more.

        Args:
          leaf: the array of the base; ``None`` where the base lacks it.
        """

    @property
    def in_layer(self) -> bool:
        """Whether a layer computes with it, next to its kernel; else it changes the leaf itself."""
        return False

    @property
    def changes_base(self) -> bool:
        """Whether it is only for a base that was changed at the start."""
        return False

    def merged_dtype(self, leaf: Any) -> Any:
        """The dtype that the merged leaf has in the model."""
        return jnp.dtype(leaf.dtype)

    def as_parameter(self) -> Any:
        """The leaf as the model has it, in its dtype and its box, where the base lacks it."""
        raise TypeError(f"{type(self).__name__} only changes a leaf of the base.")

    def as_leaf(self) -> Any:
        """The node as it stands in a tree of adapters."""
        return self

    @abc.abstractmethod
    def check_fits(
        self, path: str, shape: tuple[int, ...], count: int | None = None, name: str = "the base"
    ) -> None:
        """Checks that the node is for a leaf of this shape.

        Args:
          path: of the leaf.
          shape: of the leaf.
          count: how many nodes are stacked in this one; ``None`` for one alone.
          name: of the tree that the leaf is in, for messages.

        Raises:
          ValueError: if it is not.
        """

    # By default nothing is wrong.

    def check(self, path: str) -> None:  # noqa: B027
        """Raises ValueError if the fields of the node do not fit each other."""

    def check_merges(self, path: str) -> None:  # noqa: B027
        """Raises ValueError if no merged leaf gives the same model."""

    def check_alone(self, path: str) -> None:  # noqa: B027
        """Raises ValueError if it is not one node as it was trained, which a file can hold."""

    def check_combines(self, path: str, name: str) -> None:  # noqa: B027
        """Raises ValueError if such a node cannot be added to others; ``name`` is of its tree."""

    def check_stacks(self, path: str, name: str) -> None:  # noqa: B027
        """Raises ValueError if such a node cannot be stacked; ``name`` is of its tree."""

    @property
    @abc.abstractmethod
    def kind(self) -> str:
        """The kind of node in a word, as a summary has it."""
