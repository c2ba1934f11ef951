"""An adapter's names and a base's that differ in how they begin.

A model with a head has its base under a prefix (``bert.``, ``transformer.``), which a checkpoint of
the base alone has not.
"""

from __future__ import annotations

import itertools

from lora_jax.cli.base._vocabulary_arrays import is_embedding, is_head
from lora_jax.core.rules._match_paths import nearest_paths
from lora_jax.files._checkpoint import Checkpoint
from lora_jax.peft._folder import PeftFiles
from lora_jax.peft.names._keys import PREFIX, without_base_layer, wrapped_module

ADAPTER, BASE = "--adapter-prefix", "--base-prefix"

_WRAPPER = "module."  # of a model for several devices, as DistributedDataParallel


def aligned(
    files: PeftFiles, base: Checkpoint, ours: str | None = None, theirs: str | None = None
) -> tuple[PeftFiles, dict[str, str], list[str]]:
    """The adapter, its name of every array of the base, and notes on it.

    Args:
      files: the adapter.
      base: the base.
      ours: how the adapter's names begin where the base's do not, if that is known.
      theirs: how the base's names begin where the adapter's do not.

    Raises:
      ValueError: if names do not fit, or fit in several ways.
    """
    path, same = files.tensors.path, {name: name for name in base}
    ones = (*files.modules, *files.parameters, *files.originals)
    if all(n.startswith(_WRAPPER) for n in ones) and not any(n.startswith(_WRAPPER) for n in base):
        files = files.without(_WRAPPER)
    notes = [f"{path}: {part!r} in its keys names no module." for part in files.left_out]
    if not any("base_model." in key for key in files.tensors):
        notes.append(f"{path}: its keys lack {PREFIX!r}, and are the names in the model.")
    there = {name.rpartition(".")[0] for name in base}
    modules = [wrapped_module(module) for module in files.modules]
    # A head may be the base's embedding, which has its own name.
    needed = [module for module in modules if not is_head(module)]
    needed = needed or [m for m in map(_module, files.parameters) if is_embedding(m)]
    if ours is not None or theirs is not None:
        found = [tuple(f"{one.rstrip('.')}." if one else "" for one in (ours, theirs))]
    elif not needed or any(module in there for module in needed):
        return files, same, notes
    else:
        found = sorted(_prefix_pairs(needed, there))
    if len(found) > 1:
        options = [
            " ".join(f"{n} {x}" for n, x in ((ADAPTER, a), (BASE, b)) if x) for a, b in found
        ]
        raise ValueError(
            f"{path} has something for {needed[0]!r}, and {base.path} has "
            f"{len(found)} modules that end so: say which is meant, {' or '.join(options)}."
        )
    if not found:
        return files, same, notes
    ((ours, theirs),) = found
    if missing := [m for m in needed if theirs + m.removeprefix(ours) not in there]:
        raise ValueError(
            f"{path} has something for {missing[0]!r}, but with these prefixes {base.path} has no "
            f"such module. Nearest: {', '.join(nearest_paths(missing[0], there)) or 'none'}."
        )
    names = {
        name: ours + name.removeprefix(theirs) if name.startswith(theirs) else name for name in base
    }
    where = f"with {theirs!r} for {ours!r}" if ours and theirs else f"without {ours!r}"
    where = where if ours else f"behind {theirs!r}"
    return files, names, [*notes, f"{base.path} has the adapter's names {where}."]


def _module(name: str) -> str:
    """The module of the model that has a parameter."""
    return without_base_layer(name).rpartition(".")[0]


def _prefix_pairs(modules: list[str], there: set[str]) -> list[tuple[str, str]]:
    """How the adapter's names begin and how the base's: one with nothing, or both with the same.

    The same in another order are ``model.language_model.`` and ``language_model.model.``, as
    transformers calls a part of a model and its file.
    """
    first, *_ = modules
    parts = first.split(".")
    pairs = {("", name.removesuffix(first)) for name in there if name.endswith(f".{first}")}
    for i in range(1, len(parts)):
        a = ".".join(parts[:i]) + "."
        pairs |= (
            {(a, ".".join(b) + ".") for b in itertools.permutations(parts[:i])} if i < 4 else set()
        )
        pairs.add((a, ""))
    found: dict[tuple[str, ...], tuple[str, str]] = {}
    for a, b in sorted(pairs, key=lambda pair: len("".join(pair))):
        names = tuple(b + m.removeprefix(a) for m in modules)
        if all(m.startswith(a) for m in modules) and there.issuperset(names):
            found.setdefault(names, (a, b))  # the shortest of those that come to the same
    return list(found.values())
