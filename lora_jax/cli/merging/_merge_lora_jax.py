"""What an adapter of lora_jax on disk makes of the arrays of a base on disk."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np

from lora_jax.cli.base._fits_base import check_has, check_shape
from lora_jax.cli.merging._merged_arrays import Parts, Updates
from lora_jax.core._fully_trained import as_node
from lora_jax.core._node import Node
from lora_jax.files._bytes import StrPath
from lora_jax.files._checkpoint import Checkpoint
from lora_jax.files._read_folder import read
from lora_jax.files._tensors import Info


def updates_of_lora_jax(path: StrPath, base: Checkpoint) -> Updates:
    """The updates of an adapter of lora_jax, for a base with Flax's paths as names.

    Raises:
      ValueError: if the adapter does not fit the base, or cannot be merged.
    """
    merged: dict[str, Callable[[np.ndarray], Parts]] = {}
    replaced: dict[str, np.ndarray] = {}
    for name, leaf in read(path).adapters_alone(path).items():
        check_has(base, name, path)
        node = as_node(leaf)
        if node.in_base:
            node.check_merges(name)
            node.check_fits(name, base.info[name].shape)
            merged[name] = functools.partial(_parts, node)
        else:
            array = np.asarray(node.merge(None))
            check_shape(name, Info(array.dtype, array.shape), base, path)
            replaced[name] = array
    return Updates(base, merged, replaced, base.info)


def _parts(node: Node, W: np.ndarray) -> Parts:
    """``W'``, which is one part."""
    yield (), jax.jit(type(node).merge)(node, W)
