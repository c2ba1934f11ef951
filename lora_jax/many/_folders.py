"""Adapters by the name of their folder, in either format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import chex

from lora_jax import peft
from lora_jax.files._adapter_json import INDEX
from lora_jax.files._bytes import StrPath
from lora_jax.files._load import load as load_own
from lora_jax.peft.config._module_config import CONFIG


def from_folders(
    root: StrPath, params: chex.ArrayTree, *, names: Any = None, axes: Any = None
) -> Callable[[str], chex.ArrayTree]:
    """A function that loads the adapters of a name, from the folder of that name.

    Args:
      root: the folder that has the folders. A name is that of one folder in it, so that a request
        cannot reach anything else.
      params: the model's parameters.
      names: for PEFT's files, as for :func:`lora_jax.peft.load`.
      axes: likewise.

    Raises:
      FileNotFoundError: if there are no adapters; by the function.
      ValueError: if a name is not that of one folder, or if files are damaged or do not fit; by the
        function.

    Example:
      >>> import tempfile, jax.numpy as jnp, lora_jax
      >>> root, params = Path(tempfile.mkdtemp()), {"bias": jnp.zeros(2)}
      >>> lora_jax.save(root / "reviews", {"bias": jnp.ones(2)})
      >>> from_folders(root, params)("reviews")
      {'bias': Array([1., 1.], dtype=float32)}
    """
    options = {} if names is None else {"names": names}

    def load(name: str) -> chex.ArrayTree:
        alone = all(path(name).name == name for path in (PurePosixPath, PureWindowsPath))
        if not alone or name in ("", ".", "..") or "\0" in name:
            raise ValueError(
                f"{name!r} is not a name of adapters: it must be that of one folder in {root}."
            )
        folder = Path(root) / name
        if (folder / INDEX).exists():
            return load_own(folder, params)[1]
        if (folder / CONFIG).exists():
            return peft.load(folder, params, axes=axes, **options)[1]
        raise FileNotFoundError(
            f"There are no adapters {name!r}: {folder} has neither {INDEX}, of "
            f"lora_jax.save, nor {CONFIG}, of PEFT."
        )

    return load
