"""Adapters out of a folder into trees, for a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, overload

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import empty_node

from lora_jax.core._boxes import content, rebox
from lora_jax.core._fully_trained import FullyTrained, as_node
from lora_jax.files import _collections as variables
from lora_jax.files._bytes import StrPath
from lora_jax.files._fingerprint import fingerprint
from lora_jax.files._fingerprint import verify as verify_base
from lora_jax.files._read_folder import read
from lora_jax.trees._pair import base_of, check_pair
from lora_jax.trees._paths import path_of, unflatten, unflatten_adapters
from lora_jax.trees._shardings import follow
from lora_jax.trees._states import parameters_in


@overload
def load(
    path: StrPath, params: chex.ArrayTree, *, collections: None = None, verify: bool = False
) -> tuple[chex.ArrayTree, chex.ArrayTree]: ...


@overload
def load(
    path: StrPath,
    params: chex.ArrayTree,
    *,
    collections: Mapping[str, chex.ArrayTree],
    verify: bool = False,
) -> tuple[chex.ArrayTree, chex.ArrayTree, dict[str, chex.ArrayTree]]: ...


def load(
    path: StrPath,
    params: chex.ArrayTree,
    *,
    collections: Mapping[str, chex.ArrayTree] | None = None,
    verify: bool = False,
) -> (
    tuple[chex.ArrayTree, chex.ArrayTree]
    | tuple[chex.ArrayTree, chex.ArrayTree, dict[str, chex.ArrayTree]]
):
    """Loads adapters for a model: as :func:`lora_jax.lora_init`, with trained adapters.

    Args:
      path: the folder that :func:`lora_jax.save` wrote.
      params: the model's ``params`` collection, as for ``lora_init``.
      collections: the model's other collections, as ``model.init`` returns them; ``"params"`` may
        be among them and is passed over. Needed where some were saved.
      verify: compare every frozen parameter with the hash that was saved with the adapters.

    Returns:
      ``(frozen, adapters)``; with ``collections`` ``(frozen, adapters, collections)``, in which
      those that were saved are as they were, and the others as they were given.

    Raises:
      FileNotFoundError: if no adapters are there.
      ValueError: if files are damaged, if adapters or collections do not fit this model, if
        collections were saved and are not asked for, or, with ``verify``, if the base is not the
        one that they were trained on. The message names the file and the parameter.

    Example:
      >>> import tempfile, flax.linen as nn, jax, jax.numpy as jnp, lora_jax
      >>> model, x = nn.BatchNorm(use_running_average=False), jnp.arange(6.0).reshape(3, 2)
      >>> variables = model.init(jax.random.key(0), x)
      >>> config = lora_jax.LoraConfig(trainable=["scale|bias"])
      >>> frozen, adapters = lora_jax.lora_init(jax.random.key(1), variables["params"], config)
      >>> rest = {"batch_stats": variables["batch_stats"]}
      >>> y, changed = lora_jax.lora_apply(
      ...     model, {"params": frozen, **rest}, adapters, x, mutable=["batch_stats"]
      ... )
      >>> folder = tempfile.mkdtemp()
      >>> lora_jax.save(folder, adapters, frozen=frozen, collections=changed)
      >>> frozen, adapters, rest = lora_jax.load(
      ...     folder, variables["params"], collections=variables, verify=True
      ... )
      >>> chex.assert_trees_all_equal(rest, changed)
    """
    stored = read(path)
    if stored.collections and collections is None:
        raise ValueError(
            f"{path} has {variables.listed(stored.collections)} beside the adapters, as training "
            f"changed it. Pass the model's own too, and use what is returned: frozen, adapters, "
            f"collections = lora_jax.load(path, params, collections=variables)."
        )
    flat = base_of(params, "params")
    keys = {path_of(key): key for key, leaf in flat.items() if leaf is not empty_node}
    frozen, adapters = dict(flat), {}
    for leaf_path, leaf in stored.adapters.items():
        key = keys.get(leaf_path, tuple(leaf_path.split("/")))
        node: Any = as_node(leaf)
        try:
            check_pair(key, node, flat, name="params", needed=True)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if node.changes_base:
            node = node.replace(base_hash=stored.base.get(leaf_path))
        if node.changes_base and node.base_hash != fingerprint(flat[key], leaf_path):
            raise ValueError(
                f"{path}: the variant {node.kind!r} changed the base at the start, and params is "
                f"not that base at {leaf_path!r}. Pass the frozen tree that lora_init returned; it "
                f"has to be saved too, as by orbax."
            )
        if not node.in_base:
            node = in_box(leaf_path, node, frozen.pop(key), str(path))
        for array in jax.tree.leaves(node):
            _check_dtype(array, str(path))
        adapters[key] = jax.tree.map(jnp.asarray, follow(node.as_leaf(), flat[key]))
    if verify:
        left = {path_of(k): v for k, v in parameters_in(frozen).items() if v is not empty_node}
        verify_base(stored.base, left, path)
    split = unflatten(frozen, params), unflatten_adapters(adapters, params)
    if collections is None:
        return split
    others = {
        name: {p: _to_jax(array, str(path)) for p, array in arrays.items()}
        for name, arrays in stored.collections.items()
    }
    return *split, variables.restored(others, collections, str(path))


def in_box(path: str, node: FullyTrained, leaf: Any, file: str) -> FullyTrained:
    """A leaf that was fully trained, in the box of the model's leaf.

    Args:
      path: of the leaf.
      node: the leaf as the file has it, without a box.
      leaf: that of the model.
      file: the file, for messages.

    Raises:
      ValueError: if the model has another shape or dtype there.
    """
    array, dtype, shape = content(leaf), node.merged_dtype(), node.array.shape
    if tuple(array.shape) != shape or jnp.dtype(array.dtype) != dtype:
        raise ValueError(
            f"{file} has {path!r} fully trained as {dtype.name} {shape}, but params has "
            f"{jnp.dtype(array.dtype).name} {tuple(array.shape)} there. Is it of another model?"
        )
    return FullyTrained(rebox(leaf, node.value), node.dtype)


def _check_dtype(array: np.ndarray, file: str) -> None:
    """Raises ValueError if JAX would make another dtype of it."""
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise ValueError(
            f"{file} has arrays of dtype {array.dtype}: set jax.config.update('jax_enable_x64', "
            "True)."
        )


def _to_jax(array: np.ndarray, file: str) -> jax.Array:
    _check_dtype(array, file)
    return jnp.asarray(array)
