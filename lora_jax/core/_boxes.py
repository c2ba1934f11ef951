"""Leaves out of their boxes, ``nn.Partitioned`` and the like, and back into them."""

from __future__ import annotations

from typing import Any

import chex
import jax


def unbox(leaf: Any) -> Any:
    """The array of a leaf, out of the box (``nn.Partitioned`` and the like) where it has one."""
    arrays = jax.tree.leaves(leaf)
    return arrays[0] if len(arrays) == 1 else leaf


def rebox(leaf: Any, array: chex.Array) -> Any:
    """The array, in the same box as the leaf."""
    return jax.tree.map(lambda _: array, leaf)
