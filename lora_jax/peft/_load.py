"""Loads a folder of PEFT as adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import chex

from lora_jax.core._axes import KernelAxes
from lora_jax.files._bytes import StrPath
from lora_jax.files._load import in_box
from lora_jax.peft._folder import read
from lora_jax.peft._sort_tensors import sort_tensors
from lora_jax.peft._to_nodes import to_nodes
from lora_jax.peft.names._families import as_names
from lora_jax.peft.names._key_mapping import KeyMapping
from lora_jax.peft.torch._torch_model import TorchModel
from lora_jax.trees._pair import base_of, check_pair
from lora_jax.trees._paths import path_of, unflatten, unflatten_adapters
from lora_jax.trees._shardings import follow


def load(
    path: StrPath,
    params: chex.ArrayTree,
    *,
    names: str | Sequence[KeyMapping | tuple[Any, ...]] = "transformers",
    axes: Mapping[str, KernelAxes] | None = None,
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """Loads an adapter that PEFT saved: as :func:`lora_jax.lora_init`, with trained adapters.

    Whatever the folder says is used or refused. Factors and magnitudes become float32, as PEFT
    makes them, and magnitudes of float64 kernels float64. DoRA's norm is detached in the gradient,
    as in PEFT. The biases of ``B`` (``lora_bias``) are each a :class:`lora_jax.LoraBias` of the
    layer's own bias.

    Args:
      path: the folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
      params: the model's ``params`` collection.
      names: a family of :data:`FAMILIES`, or a list of :class:`KeyMapping` (or of tuples of its
        fields), and the first that fits a path counts. Of kernels that lie side by side in one
        (``{q|k|v}``) those are adapted that the files have.
      axes: from :func:`lora_jax.kernel_axes`; needed for kernels that are not matrices, for what is
        stacked, for square kernels that may be those of GPT-2's ``FlaxConv1D``, for embeddings that
        are fully trained, and to merge adapters of embeddings.

    Returns:
      ``(frozen, adapters)``; modules of ``modules_to_save``, and trained biases, are only in
      ``adapters``.

    Raises:
      FileNotFoundError: if there is no such adapter.
      ValueError: if files are damaged, do not fit the model, or hold what has no equal here. The
        message names the file and the key.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, lora_jax
      >>> params = {"query": {"kernel": jnp.ones((3, 2))}}
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("query/kernel", rank=1)])
      >>> frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config)
      >>> folder = tempfile.mkdtemp()
      >>> lora_jax.peft.save(folder, frozen, adapters)
      >>> frozen, adapters = lora_jax.peft.load(folder, params)
      >>> adapters["query"]["kernel"].V.shape
      (1, 2)
    """
    frozen, adapters = base_of(params, "params"), dict[Any, Any]()
    keys = {path_of(key): key for key in frozen}
    model = TorchModel({p: frozen[key] for p, key in keys.items()}, as_names(names), axes)
    files = read(path)
    found = sort_tensors(files, model)
    for leaf_path, node in to_nodes(found, files, model).items():
        key = keys[leaf_path]
        leaf = frozen[key]
        check_pair(key, node, frozen, name="params")
        if not node.in_base:
            node = in_box(leaf_path, node, frozen.pop(key), str(path))
        adapters[key] = follow(node.as_leaf(), leaf)
    return unflatten(frozen, params), unflatten_adapters(adapters, params)
