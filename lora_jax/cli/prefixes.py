"""An adapter's names and a base's that differ in how they begin.

A model with a head has its base under a prefix (``bert.``, ``transformer.``), which a checkpoint of
the base alone has not.
"""

from __future__ import annotations

from lora_jax.checkpoint import Checkpoint
from lora_jax.cli.heads import is_head
from lora_jax.config import nearest
from lora_jax.peft_files import PeftFiles

ADAPTER, BASE = "--adapter-prefix", "--base-prefix"


def aligned(
    files: PeftFiles, base: Checkpoint, ours: str | None = None, theirs: str | None = None
) -> tuple[dict[str, str], list[str]]:
    """The adapter's name of every array of the base, and what is to be said of it.

    Args:
      files: the adapter.
      base: the base.
      ours: how the adapter's names begin where the base's do not, if that is known.
      theirs: how the base's names begin where the adapter's do not.

    Raises:
      ValueError: names that do not fit, or in several ways.
    """
    same = {name: name for name in base}
    said = [
        f"{files.tensors.path}: {part!r} in its keys names no module." for part in files.left_out
    ]
    there = {name.rpartition(".")[0] for name in base}
    modules = [module.split(".base_layer")[0] for module in files.modules]
    # A head may be the base's embedding, which has its own name.
    needed = [module for module in modules if not is_head(module)] or modules
    if ours is not None or theirs is not None:
        found = [(ours or "", theirs or "")]
    elif not needed or any(module in there for module in needed):
        return same, said
    else:
        found = sorted(_ways(needed, there))
    if len(found) > 1:
        options = [f"{ADAPTER} {a}" if a else f"{BASE} {b}" for a, b in found]
        raise ValueError(
            f"{files.tensors.path} has something for {needed[0]!r}, and {base.path} has "
            f"{len(found)} modules that end so: say which is meant, {' or '.join(options)}."
        )
    if not found:
        return same, said
    ((ours, theirs),) = found
    missing = [m for m in needed if theirs + m.removeprefix(ours) not in there]
    if missing or not all(module.startswith(ours) for module in modules):
        name = next((m for m in modules if not m.startswith(ours)), *missing[:1])
        raise ValueError(
            f"{files.tensors.path} has something for {name!r}, but with these prefixes "
            f"{base.path} has no such module. Nearest: {', '.join(nearest(name, there)) or 'none'}."
        )
    names = {
        name: ours + name.removeprefix(theirs) if name.startswith(theirs) else name for name in base
    }
    where = f"without {ours!r}" if ours else f"behind {theirs!r}"
    return names, [*said, f"{base.path} has the adapter's names {where}."]


def _ways(modules: list[str], there: set[str]) -> set[tuple[str, str]]:
    """How the adapter's names begin and how the base's: one of the two with nothing."""
    first, *_ = modules
    parts = first.split(".")
    ours = {".".join(parts[:i]) + "." for i in range(1, len(parts))}
    theirs = {name.removesuffix(first) for name in there if name.endswith(f".{first}")}
    ways = {(prefix, "") for prefix in ours} | {("", prefix) for prefix in theirs}
    return {
        (a, b)
        for a, b in ways
        if all(m.startswith(a) and b + m.removeprefix(a) in there for m in modules)
    }
