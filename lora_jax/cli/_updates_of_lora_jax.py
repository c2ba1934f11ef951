"""What an adapter of lora_jax on disk makes of the arrays of a base on disk."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np

from lora_jax.cli._fits_base import check_has, check_shape
from lora_jax.cli._updates import Parts, Updates
from lora_jax.core._adapter import Adapter, FullyTrained, LoraBias
from lora_jax.files import _store as store
from lora_jax.files._checkpoint import Checkpoint
from lora_jax.files._tensors import Info, StrPath
from lora_jax.trees._checks import check_fits, check_merges


def updates_of_lora_jax(path: StrPath, base: Checkpoint) -> Updates:
    """The updates of an adapter of lora_jax, for a base with Flax's paths as names.

    Raises:
      ValueError: if the adapter does not fit the base, or cannot be merged.
    """
    merged: dict[str, Callable[[np.ndarray], Parts]] = {}
    replaced: dict[str, np.ndarray] = {}
    for name, node in store.read(path).adapters_alone(path).items():
        check_has(base, name, path)
        if isinstance(node, Adapter | LoraBias):
            check_merges(name, node)
            check_fits(name, np.broadcast_to(np.float32(0), base.info[name].shape), node)
            merged[name] = functools.partial(_parts, node)
        else:
            array = np.asarray(node.value if isinstance(node, FullyTrained) else node)
            check_shape(name, Info(array.dtype, array.shape), base, path)
            replaced[name] = array
    return Updates(base, merged, replaced, base.info)


def _parts(node: Adapter | LoraBias, W: np.ndarray) -> Parts:
    """``W'``, which is one part."""
    yield (), jax.jit(type(node).effective_kernel)(node, W)
