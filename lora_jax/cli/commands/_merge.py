"""``lora-jax merge``: the safetensors of a base with an adapter in them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from lora_jax.cli._arguments import (
    Adapter,
    Base,
    Experts,
    Names,
    Number,
    Out,
    Text,
    check_new,
    read_names,
)
from lora_jax.cli._printing import print_line, progress_bar
from lora_jax.cli.adapters._open_adapter import is_peft
from lora_jax.cli.adapters._trees_without_model import as_peft
from lora_jax.cli.base._base_at_start import BaseAtStart
from lora_jax.cli.base._layouts import Layouts
from lora_jax.cli.base._model import Model
from lora_jax.cli.base._tied import tie_of
from lora_jax.cli.merging._experts import order_of
from lora_jax.cli.merging._head_and_config import with_consequences
from lora_jax.cli.merging._merge_lora_jax import updates_of_lora_jax
from lora_jax.cli.merging._merge_peft import updates_of_peft
from lora_jax.cli.merging._merged_arrays import Updates
from lora_jax.cli.merging._prefixes import aligned
from lora_jax.files._checkpoint import Checkpoint, rewrite
from lora_jax.files._read_folder import read as read_lora_jax
from lora_jax.peft._folder import read as read_peft
from lora_jax.peft.names._key_mapping import KeyMapping


def merge(
    adapter: Adapter,
    base: Base,
    out: Out,
    names: Names = "transformers",
    seed: Number = None,
    experts: Experts = (),
    layout: Literal["in-out", "out-in"] | None = None,
    adapter_prefix: Text = None,
    base_prefix: Text = None,
) -> int:
    """Merges an adapter into the safetensors of a base, one matrix at a time.

    Example: lora-jax merge my-adapter base-folder merged-folder

    Args:
        adapter: the adapter's folder.
        base: a safetensors file, or a folder of them; with PyTorch's names or, for an adapter of
            lora_jax, with Flax's paths.
        out: the new file or folder; it must not exist.
        names: a family of names (transformers, gemma), or a JSON file, as for convert; used where
            the adapter is lora_jax's and the base PyTorch's.
        seed: round stochastically with this seed; by default to the nearest.
        experts: where PEFT's adapter is for parameters (target_parameters) whose shapes are alike:
            their names in their module, in the order in which its class makes them.
        layout: whether these are stored (experts, in, out) or (experts, out, in), where their
            shapes do not say it; and whether square weights of layers are stored (in, out), as
            GPT-2's Conv1D does, or (out, in), where neither other shapes nor the base's config.json
            say it.
        adapter_prefix: how the adapter's names begin where the base's do not, as "bert."; found by
            itself where there is one choice only.
        base_prefix: how the base's names begin where the adapter's do not.
    """
    check_new(out)
    _check_experts(adapter, experts)
    checkpoint = Checkpoint(base)
    key = None if seed is None else jax.random.key(seed)
    with tempfile.TemporaryDirectory() as scratch:
        if not is_peft(adapter) and set(read_lora_jax(adapter).adapters) <= set(checkpoint):
            if adapter_prefix is not None or base_prefix is not None:
                raise ValueError(f"{base} has the names of {adapter}: there is no prefix to give.")
            if layout is not None:
                raise ValueError(f"{base} has the names of {adapter}: there is no layout to give.")
            updates = updates_of_lora_jax(adapter, checkpoint)
            named: Mapping[str, str] = {name: name for name in checkpoint}
        else:
            table = () if is_peft(adapter) else read_names(names)
            prefixes = adapter_prefix, base_prefix
            updates, checkpoint, named = _by_torch_names(
                adapter, checkpoint, table, scratch, experts, layout, prefixes
            )
        with progress_bar() as bar:
            task = bar.add_task("merging", total=len(named))

            def merged(name: str) -> np.ndarray:
                bar.advance(task)
                return updates(named[name], key)

            info = {name: updates.info[to] for name, to in named.items()}
            rewrite(checkpoint, out, info, merged, updates.config)
    if checkpoint.others:
        not_copied = ", ".join(file.name for file in checkpoint.others)
        print_line(f"Not copied, as no part of the model: {not_copied}.")
    for note in updates.notes:
        print_line(note)
    print_line(updates.report())
    return 0


def _by_torch_names(
    adapter: Path,
    checkpoint: Checkpoint,
    names: Sequence[KeyMapping],
    scratch: str,
    experts: Sequence[str],
    layout: str | None,
    prefixes: tuple[str | None, str | None],
) -> tuple[Updates, Checkpoint, Mapping[str, str]]:
    """What is merged where the base has PyTorch's names.

    Returns:
      The merged arrays; the base; the name in the merged arrays of every array to write.
    """
    kinds: dict[str, str] = {}
    if is_peft(adapter):
        files = read_peft(adapter, tying=True)
        order = dict.fromkeys(experts, None if layout is None else layout == "in-out")
    else:
        (files, kinds), order = as_peft(adapter, names, scratch), order_of(names)
    files, named, notes = aligned(files, checkpoint, *prefixes)
    base = checkpoint.renamed(named)
    model = Model.of(base, adapter)
    tie = tie_of(model, files, base)
    layouts = Layouts(base, layout)
    updates = updates_of_peft(files, BaseAtStart(base, files, tie), layouts, order, kinds)
    if layout is not None and not (experts or layouts.asked):
        raise ValueError(
            "--layout is for the parameters that --experts names, or for square weights where "
            "nothing else says it, and there is none."
        )
    updates = with_consequences(updates, base, model, tie, notes)
    if set(updates.info) <= set(base):
        return updates, checkpoint, named
    if checkpoint.info.keys() != base.info.keys():
        updates.notes = (*updates.notes, "All names are as in the adapter's model.")
    return updates, base, {name: name for name in updates.info}


def _check_experts(adapter: Path, experts: Sequence[str]) -> None:
    """Raises ValueError if the option would have no effect."""
    targets = read_peft(adapter, tying=True).config.target_parameters if is_peft(adapter) else ()
    for name in experts:
        if name not in {target.rpartition(".")[2] for target in targets}:
            raise ValueError(
                f"--experts names {name!r}, but {adapter} is not an adapter of PEFT for it."
            )
