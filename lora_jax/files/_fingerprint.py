"""Hashes of the base's parameters, by which a file knows the base that it was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import jax

from lora_jax.core._boxes import content, is_quantized, unbox
from lora_jax.files._bytes import StrPath
from lora_jax.files._to_host import host
from lora_jax.trees._base_hash import hash_of


def fingerprint(leaf: Any, path: str) -> str:
    """A hash of a parameter: its dtype, shape and values; of several arrays, of their hashes."""
    if len(arrays := jax.tree.leaves(leaf)) > 1:
        hashes = "".join(fingerprint(array, path) for array in arrays)
        if is_quantized(inside := content(leaf)):
            hashes += f"{inside.quantization} {inside.dtype.name}"
        return hashlib.blake2b(hashes.encode(), digest_size=16).hexdigest()
    return hash_of(host(unbox(leaf), path))


def verify(base: Mapping[str, str], leaves: Mapping[str, Any], path: StrPath) -> None:
    """Checks that a base is the one whose hashes were saved.

    Args:
      base: the hashes by path.
      leaves: of the base, by path.
      path: of the folder, for messages.

    Raises:
      ValueError: if a leaf differs, is missing, or was not there.
    """
    if leaves and not base:
        raise ValueError(
            f"{path} has no hashes of its base to verify: pass frozen=... to lora_jax.save."
        )
    problems = [f"{p!r} is missing" for p in base if p not in leaves]
    problems += [f"{p!r} was not there" for p in leaves if p not in base]
    problems += [
        f"{p!r} has other values"
        for p, leaf in leaves.items()
        if p in base and fingerprint(leaf, p) != base[p]
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(
            f"params is not the base that {path} was trained on: {'; '.join(problems[:4])}{more}."
        )
