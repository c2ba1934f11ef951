"""The merged model as a safetensors file, written one matrix at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np

from lora_jax.core._axes import KernelAxes
from lora_jax.core._boxes import content, unbox
from lora_jax.files._array_names import named_pair
from lora_jax.files._bytes import StrPath
from lora_jax.files._tensors import Info, write_tensors
from lora_jax.peft.names._families import as_names
from lora_jax.peft.names._key_mapping import KeyMapping
from lora_jax.peft.torch._arrays import from_leaf, torch_shape
from lora_jax.peft.torch._torch_model import TorchModel, TorchParameter
from lora_jax.trees._rounding import Rounding, RoundingReport, key_for, measure, round_to


def export(
    path: StrPath,
    frozen: chex.ArrayTree,
    adapters: chex.ArrayTree,
    *,
    names: str | Sequence[KeyMapping | tuple[Any, ...]] | None = None,
    axes: Mapping[str, KernelAxes] | None = None,
    dtype: Any = None,
    key: chex.PRNGKey | None = None,
) -> RoundingReport:
    """Writes the merged model into a safetensors file, and says what rounding loses.

    ``W'`` is formed in float32 and cast once, one parameter after another: no more than one merged
    parameter is in memory besides the base. The model's other collections are not in the file.

    Args:
      path: the file, as ``"model.safetensors"``.
      frozen: the base.
      adapters: the adapters, trained.
      names: the names and the layout of PyTorch, as for :func:`lora_jax.peft.load`; by default
        those of Flax, with the paths as names.
      axes: from :func:`lora_jax.kernel_axes`; with ``names`` needed where parameters are stacked.
      dtype: of the floating-point parameters; by default each keeps its own.
      key: round stochastically, as for :func:`lora_jax.lora_merge`.

    Returns:
      The rounding of every parameter that was trained.

    Raises:
      TypeError: if a leaf of the base is not one array.
      ValueError: if adapters do not fit the base or cannot be merged, if numbers are not finite in
        the new dtype, or if no name is for a parameter.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, lora_jax
      >>> params = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("dense/kernel", rank=1)])
      >>> frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config)
      >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> report = lora_jax.export(file, frozen, adapters, names="transformers")
      >>> list(report.rows)
      ['dense/kernel']
    """
    base, found = named_pair(frozen, adapters)
    for leaf_path, leaf in base.items():
        if not hasattr(content(leaf), "dtype"):
            raise TypeError(
                f"frozen has {leaf!r} at {leaf_path!r}, which is not one array and has no place in "
                f"a file. Make dicts of lists, as with flax.serialization.to_state_dict."
            )
    for leaf_path, node in found.items():
        node.check_merges(leaf_path)
    trained = {p: node for p, node in found.items() if not node.in_base}
    leaves = {p: content(leaf) for p, leaf in base.items()}
    leaves |= {p: node.merge(None) for p, node in trained.items()}
    dtypes = {p: node.merged_dtype(None) for p, node in trained.items()}

    def dtype_of(leaf_path: str) -> np.dtype[Any]:
        had = np.dtype(jnp.dtype(dtypes.get(leaf_path, leaves[leaf_path].dtype)))
        changes = dtype is not None and jnp.issubdtype(had, jnp.floating)
        return jnp.dtype(dtype) if changes else had  # type: ignore[no-any-return]

    if names is None:
        model = TorchModel(leaves, (), None)
        torches = {p: TorchParameter(p, p, (), "plain") for p in leaves}
    else:
        model = TorchModel(leaves, as_names(names), axes)
        torches = {torch.name: torch for p in leaves for torch in model.complete(p)}
    rows: dict[str, Rounding] = {}
    last: dict[str, Any] = {}  # what is stacked in one leaf is merged once

    def merged(leaf_path: str) -> Any:
        W, to = jnp.asarray(unbox(leaves[leaf_path])), dtype_of(leaf_path)
        if leaf_path not in found:
            return W.astype(to)
        node = found[leaf_path]
        exact = node.merge(W)
        out = round_to(exact, to, None if key is None else key_for(key, leaf_path))
        rows[leaf_path] = measure(exact, out, W.astype(to) if node.in_base else None)
        return out

    def read(name: str) -> np.ndarray:
        torch = torches[name]
        if torch.path not in last:
            last.clear()
            last[torch.path] = merged(torch.path)
        return from_leaf(model, torch, last[torch.path])

    info = {n: Info(dtype_of(t.path), torch_shape(model, t)) for n, t in torches.items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, info, read, {"format": "flax" if names is None else "pt"})
    return RoundingReport({p: rows[p] for p in found})
