"""``lora-jax verify``: whether an adapter is complete, and what base it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from lora_jax.cli._arguments import Adapter
from lora_jax.cli._printing import print_line, progress
from lora_jax.cli.adapters._open_adapter import open_adapter
from lora_jax.files._checkpoint import Checkpoint
from lora_jax.files._fingerprint import fingerprint
from lora_jax.files._read_folder import read


def verify(
    path: Adapter, base: Annotated[Path | None, tyro.conf.arg(metavar="BASE")] = None
) -> int:
    """Reads all of an adapter, and says whether it is complete and, if asked, fits its base.

    Example: lora-jax verify my-adapter --base base.safetensors

    Args:
        path: the adapter's folder.
        base: safetensors of the base with Flax's paths as names, to compare with the hashes that
            an adapter of lora_jax may have.
    """
    adapter = open_adapter(path)
    for name, one in adapter.matrices.items():
        for array in (one.U, one.V, one.m):
            if array is not None and not np.isfinite(array.astype(np.float32)).all():
                raise ValueError(f"{path}: {name!r} has NaN or infinite values.")
    counts = (
        f"{len(adapter.matrices)} matrices, {len(adapter.fully_trained)} parameters fully trained"
    )
    print_line(f"{path}: {adapter.format}, {counts}: whole.")
    if base is not None:
        if adapter.format != "lora_jax":
            raise ValueError("PEFT saves nothing about its base that could be verified.")
        checkpoint = Checkpoint(base)
        hashes = read(path).base
        if not hashes:
            raise ValueError(f"{path} has no hashes of its base.")
        for name, expected in progress(hashes.items(), "comparing"):
            if name not in checkpoint:
                raise ValueError(f"{base} lacks {name!r}, of the base that {path} was trained on.")
            if fingerprint(checkpoint[name], name) != expected:
                raise ValueError(f"{base} has another {name!r} than {path} was trained on.")
        print_line(f"{base} is the base that it was trained on.")
    return 0
