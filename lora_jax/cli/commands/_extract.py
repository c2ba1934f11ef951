"""``lora-jax extract``: the adapter that turns a base into a fine-tuned model."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from lora_jax import peft
from lora_jax.arithmetic._low_rank import low_rank
from lora_jax.cli._arguments import Base, Number, Out, Tuned, check_new
from lora_jax.cli._printing import print_line, print_table, progress
from lora_jax.cli.adapters._trees_without_model import lora_adapter, nested
from lora_jax.cli.base._layouts import Layouts, model_types
from lora_jax.cli.base._vocabulary_arrays import embedding_by
from lora_jax.core._adapter import Adapter
from lora_jax.core._axes import KernelAxes
from lora_jax.files._checkpoint import Checkpoint
from lora_jax.files._save import save
from lora_jax.files._tensors import floats
from lora_jax.peft.torch._layout import CONV1D


def extract(
    tuned: Tuned,
    base: Base,
    out: Out,
    rank: Number = None,
    explained_variance: Annotated[
        float | None, tyro.conf.arg(metavar="SHARE", aliases=["--energy"])
    ] = None,
    match: Annotated[str, tyro.conf.arg(metavar="PATTERN")] = ".*",
    allow_rest: bool = False,
    layout: Literal["in-out", "out-in"] | None = None,
) -> int:
    """Makes an adapter from a fine-tuned model and its base, by singular values.

    Example: lora-jax extract tuned.safetensors base.safetensors new-adapter --rank 16

    Args:
        tuned: safetensors of the tuned model, a file or a folder.
        base: those of its base, with the same names.
        out: the new folder; it must not exist. Names that end in ".weight" give an adapter of
            PEFT, Flax's paths one of lora_jax.
        rank: the rank of every matrix; either this or explained_variance.
        explained_variance: keep this share of the squared norm of every difference.
        match: only matrices whose full name matches this regular expression; in PyTorch's names
            it must leave out embeddings, which look like linear layers in a file.
        allow_rest: leave out what differs and is not a matrix that matches; else it is an error.
        layout: as for merge: whether PyTorch stores square weights of layers (in, out), as GPT-2's
            Conv1D does, or (out, in), where neither other shapes nor the base's config.json say it.
    """
    _check_size(rank, explained_variance)
    check_new(out)
    new, old = Checkpoint(tuned), Checkpoint(base)
    pattern = re.compile(match)
    rest = sorted(set(new) ^ set(old))
    if missing := [name for name in rest if pattern.fullmatch(name)]:
        raise ValueError(
            f"Only one of the two has {', '.join(map(repr, missing[:4]))}: leave it out by --match."
        )
    layouts = Layouts(old, layout, model_types(new))
    all_torch = any("." in name for name in old) and not any("/" in name for name in old)
    kinds: dict[str, str] = {}
    found: dict[str, Adapter] = {}
    body: list[tuple[str, ...]] = []
    for name in progress([name for name in old if name in new], "singular values"):
        numbers = floats(old.info[name].dtype) and floats(new.info[name].dtype)
        matches = numbers and pattern.fullmatch(name)
        if new.info[name].shape != old.info[name].shape:
            if matches:
                raise ValueError(
                    f"{name!r} is {old.info[name].shape} in {base}, and {new.info[name].shape} in "
                    f"{tuned}: leave it out by --match and --allow-rest."
                )
            rest.append(name)
            continue
        delta = new[name].astype(np.float32) - old[name].astype(np.float32)
        if not delta.any():
            continue
        in_torch = name.endswith(".weight")
        # In PyTorch's names PEFT can adapt weights of layers only.
        if delta.ndim != 2 or not matches or (all_torch and not in_torch):
            rest.append(name)
            continue
        if in_torch and (evidence := embedding_by(name, old, new)):
            raise ValueError(
                f"{name!r} is of an embedding, by its {evidence}, and differs: leave it out, with "
                f"--match and --allow-rest."
            )
        kind = layouts.kind(name) if in_torch or name.endswith("/kernel") else "linear"
        if layouts.asked and layout is None:
            continue
        axes = CONV1D if in_torch == (kind == "linear") else KernelAxes()
        low = low_rank(delta.T if axes == CONV1D else delta, rank, explained_variance)
        kinds[name], found[name] = kind, lora_adapter(low.U, low.V, axes)
        body.append((name, str(low.U.shape[1]), f"{low.error:.3g}"))
    layouts.check()
    if rest and not allow_rest:
        raise ValueError(
            f"{len(rest)} arrays differ that would not be in the adapter: "
            f"{', '.join(map(repr, rest[:4]))}. --allow-rest leaves them out."
        )
    if not found:
        raise ValueError("No matrix differs, or none matches: there is nothing to extract.")
    torch = [name.endswith(".weight") for name in found]
    if any(torch) and not all(torch):
        raise ValueError("The names are neither all PyTorch's nor all Flax's: narrow --match.")
    if layout is not None and not layouts.asked:
        raise ValueError("--layout is for square weights where nothing else says it.")
    if all(torch):
        names = [(name, name, kinds[name]) for name in found]
        frozen = {n: jax.ShapeDtypeStruct(old.info[n].shape, jnp.float32) for n in found}
        peft.save(out, frozen, found, names=names)
    else:
        save(out, nested(found))
    print_table(("matrix", "rank", "||error|| / ||difference||"), body)
    if rest:
        print_line(f"Left out, though they differ: {', '.join(rest)}.")
    return 0


def _check_size(rank: int | None, explained_variance: float | None) -> None:
    """Raises ValueError if there is not one of the two, or it is out of its range."""
    if (rank is None) == (explained_variance is None):
        raise ValueError("extract needs either --rank or --explained_variance.")
    if rank is not None and rank < 1:
        raise ValueError(f"--rank must be at least 1, got {rank}.")
    if explained_variance is not None and not 0 < explained_variance <= 1:
        raise ValueError(f"--explained_variance must be in (0, 1], got {explained_variance}.")
