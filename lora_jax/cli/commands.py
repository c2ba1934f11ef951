"""The commands; each returns its exit code."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress
import tyro
from rich.console import Console
from rich.table import Table

from lora_jax import peft, peft_files, store
from lora_jax.adapter import Adapter
from lora_jax.approximation import nearest
from lora_jax.axes import KernelAxes
from lora_jax.checkpoint import Checkpoint, rewrite
from lora_jax.cli import merging, trees
from lora_jax.cli.experts import order_of
from lora_jax.cli.layouts import Layouts, model_types
from lora_jax.factors import Factors, Opened, difference, is_peft, open_adapter
from lora_jax.names import CONV1D, as_names
from lora_jax.rounding import RoundingReport
from lora_jax.tensors import read_json

Folder = Annotated[Path, tyro.conf.Positional]
# How modules of embeddings are called: their weights look like those of linear layers in a file.
_EMBEDDING = re.compile(
    r"(^|[._])(wte|wpe|shared|embeds?|embeddings?|embed_(tokens|positions|in))\.weight$"
)
console = Console(highlight=False, soft_wrap=True)


def inspect(path: Folder) -> int:
    """Shows what is in an adapter of any format.

    Args:
        path: the adapter's folder.
    """
    opened = open_adapter(path)
    table = _table(
        "matrix", "d x k", "variant", "rank", "scale", "||s U V||", "largest", "eff. rank"
    )
    for name, one in _progress(opened.factors.items(), "singular values"):
        values = one.singular_values
        table.add_row(
            name,
            f"{one.U.shape[0]} x {one.V.shape[1]}",
            "LoRA" if one.m is None else "DoRA",
            str(one.rank),
            f"{one.scale:g}",
            f"{np.linalg.norm(values):.3g}",
            f"{values[0]:.3g}",
            f"{one.effective_rank:.1f}",
        )
    console.print(table)
    if opened.whole:
        table = _table("trained whole", "shape", "dtype")
        for name, array in opened.whole.items():
            table.add_row(name, " x ".join(map(str, array.shape)), array.dtype.name)
        console.print(table)
    facts = {"format": opened.format, **opened.facts}
    trained = sum(_size(one) for one in opened.factors.values())
    trained += sum(array.size for array in opened.whole.values())
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    facts |= {"numbers": f"{trained:,}", "bytes": f"{size:,}"}
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()), markup=False)
    return 0


def convert(
    source: Folder,
    target: Folder,
    names: str = "transformers",
    base_model: str | None = None,
    task_type: str | None = None,
) -> int:
    """Converts an adapter of lora_jax into one of PEFT, or one of PEFT into one of lora_jax.

    Args:
        source: the adapter's folder.
        target: the new folder; it must not exist.
        names: a family of names (transformers, gemma), or a JSON file with a list of
            [Flax's path, PyTorch's name, kind].
        base_model: the base's name for PEFT's config.
        task_type: the task's type for PEFT's config, as SEQ_CLS.
    """
    _new(target)
    table = as_names(_names(names))
    if is_peft(source):
        frozen, adapters = trees.from_peft(source, table)
        store.save(target, adapters)
    else:
        frozen, adapters, axes = trees.from_own(source, table)
        peft.save(
            target,
            frozen,
            adapters,
            names=table,
            axes=axes,
            base_model_name_or_path=base_model,
            task_type=task_type,
        )
    console.print(f"{target}: {len(open_adapter(target).factors)} matrices.")
    return 0


def merge(
    adapter: Folder,
    base: Folder,
    out: Folder,
    names: str = "transformers",
    seed: int | None = None,
    experts: tuple[str, ...] = (),
    layout: Literal["in-out", "out-in"] | None = None,
) -> int:
    """Merges an adapter into the safetensors of a base, one matrix at a time.

    Args:
        adapter: the adapter's folder.
        base: a safetensors file, or a folder of them; with PyTorch's names or, for an adapter of
            lora_jax, with Flax's paths.
        out: the new file or folder; it must not exist.
        names: as for convert; used where the adapter is lora_jax's and the base PyTorch's.
        seed: round by chance with this seed; by default to the nearest.
        experts: where PEFT's adapter is for parameters (target_parameters) whose shapes are alike:
            their names in their module, in the order in which its class makes them.
        layout: whether these are stored (experts, in, out) or (experts, out, in), where their
            shapes do not say it; and whether square weights of layers are stored (in, out), as
            GPT-2's Conv1D does, or (out, in), where neither other shapes nor the base's config.json
            say it.
    """
    _new(out)
    _check_experts(adapter, experts)
    checkpoint = Checkpoint(base)
    layouts = Layouts(checkpoint, layout)
    key = None if seed is None else jax.random.key(seed)
    with tempfile.TemporaryDirectory() as scratch:
        if is_peft(adapter):
            order = dict.fromkeys(experts, None if layout is None else layout == "in-out")
            updates = merging.of_peft(adapter, checkpoint, order, layouts)
        elif set(store.read(adapter).adapters) <= set(checkpoint):
            updates = merging.of_own(adapter, checkpoint)
        else:
            table = as_names(_names(names))
            frozen, tree, axes = trees.from_own(adapter, table)
            peft.save(scratch, frozen, tree, names=table, axes=axes)
            own = trees.kinds(frozen, table, axes)
            updates = merging.of_peft(scratch, checkpoint, order_of(table), layouts, own)
        if layout is not None and not (experts or layouts.asked):
            raise ValueError(
                "--layout is said of the parameters that --experts names, or of square weights of "
                "which nothing else says it, and there is none."
            )
        with _bar("merging") as bar:
            task = bar.add_task("merging", total=len(checkpoint))

            def read(name: str) -> np.ndarray:
                bar.advance(task)
                return updates(name, checkpoint[name], key)

            rewrite(checkpoint, out, checkpoint.info, read)
    _report(updates.report())
    return 0


def diff(first: Folder, second: Folder) -> int:
    """Compares two adapters of any format. Exits with 1 where they differ.

    Args:
        first: an adapter's folder.
        second: another one's.
    """
    a, b = open_adapter(first), open_adapter(second)
    table = _table("matrix", "rank", "||A - B|| / ||A||", "cosine", "m, largest difference")
    differs = False
    for name in dict.fromkeys((*a.factors, *b.factors)):
        if name not in a.factors or name not in b.factors:
            table.add_row(name, f"only in {first if name in a.factors else second}", "", "", "")
            differs = True
            continue
        one, other = a.factors[name], b.factors[name]
        if one.U.shape[0] != other.U.shape[0] or one.V.shape[1] != other.V.shape[1]:
            table.add_row(name, "of different shapes", "", "", "")
            differs = True
            continue
        relative, cosine = difference(one, other)
        magnitude = _magnitudes(one, other)
        table.add_row(
            name, f"{one.rank}, {other.rank}", f"{relative:.3g}", f"{cosine:.4f}", magnitude
        )
        differs |= relative > 1e-6 or magnitude not in ("", "0")
    for name in dict.fromkeys((*a.whole, *b.whole)):
        if name not in a.whole or name not in b.whole:
            table.add_row(name, f"only in {first if name in a.whole else second}", "", "", "")
            differs = True
        elif not _same(a.whole[name], b.whole[name]):
            table.add_row(name, "trained whole, differs", "", "", "")
            differs = True
    console.print(table)
    console.print("They differ." if differs else "They are the same.")
    return int(differs)


def extract(
    tuned: Folder,
    base: Folder,
    out: Folder,
    rank: int | None = None,
    energy: float | None = None,
    match: str = ".*",
    allow_rest: bool = False,
    layout: Literal["in-out", "out-in"] | None = None,
) -> int:
    """Makes an adapter from a fine-tuned model and its base, by singular values.

    Args:
        tuned: safetensors of the tuned model, a file or a folder.
        base: those of its base, with the same names.
        out: the new folder; it must not exist. Names that end in ".weight" give an adapter of
            PEFT, Flax's paths one of lora_jax.
        rank: of every matrix; or
        energy: keep this share of the squared norm of every difference.
        match: only matrices whose whole name matches this regular expression; in PyTorch's names
            it must leave out embeddings.
        allow_rest: leave out what differs and is no matrix that matches; else it is an error.
        layout: as for merge: whether PyTorch stores square weights of layers (in, out), as GPT-2's
            Conv1D does, or (out, in), where neither other shapes nor the base's config.json say it.
    """
    if (rank is None) == (energy is None):
        raise ValueError("extract needs either --rank or --energy.")
    if rank is not None and rank < 1:
        raise ValueError(f"--rank must be at least 1, got {rank}.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"--energy must be in (0, 1], got {energy}.")
    _new(out)
    new, old = Checkpoint(tuned), Checkpoint(base)
    if missing := sorted(set(new) ^ set(old)):
        raise ValueError(f"Only one of the two has {', '.join(map(repr, missing[:4]))}.")
    pattern, rest = re.compile(match), []
    layouts = Layouts(old, layout, model_types(new))
    kinds: dict[str, str] = {}
    found: dict[str, Adapter] = {}
    table = _table("matrix", "rank", "||error|| / ||difference||")
    for name in _progress(old, "singular values"):
        if new.info[name].shape != old.info[name].shape:
            raise ValueError(f"{name!r} is {old.info[name].shape} and {new.info[name].shape}.")
        delta = new[name].astype(np.float32) - old[name].astype(np.float32)
        if not delta.any():
            continue
        if delta.ndim != 2 or not pattern.fullmatch(name):
            rest.append(name)
            continue
        in_torch = name.endswith(".weight")
        if in_torch and _EMBEDDING.search(name) and f"{name[:-6]}bias" not in old:
            raise ValueError(
                f"{name!r} is of an embedding, by its name, and differs: leave it out, with "
                f"--match and --allow-rest."
            )
        kind = layouts.kind(name) if in_torch or name.endswith("/kernel") else "linear"
        if layouts.asked and layout is None:
            continue
        axes = CONV1D if in_torch == (kind == "linear") else KernelAxes()
        low = nearest(delta.T if axes == CONV1D else delta, rank, energy)
        kinds[name], found[name] = kind, trees.adapter(low.U, low.V, axes)
        table.add_row(name, str(low.U.shape[1]), f"{low.error:.3g}")
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
        raise ValueError("--layout is said of square weights of which nothing else says it.")
    if all(torch):
        names = [(name, name, kinds[name]) for name in found]
        frozen = {n: jax.ShapeDtypeStruct(old.info[n].shape, jnp.float32) for n in found}
        peft.save(out, frozen, found, names=names)
    else:
        store.save(out, trees.nested(found))
    console.print(table)
    if rest:
        console.print(f"Left out, though they differ: {', '.join(rest)}.", markup=False)
    return 0


def verify(path: Folder, base: Path | None = None) -> int:
    """Reads all of an adapter, and says whether it is whole and, if asked, fits its base.

    Args:
        path: the adapter's folder.
        base: safetensors of the base with Flax's paths as names, to compare with the hashes that
            an adapter of lora_jax may have.
    """
    opened = open_adapter(path)
    for name, one in opened.factors.items():
        for array in (one.U, one.V, one.m):
            if array is not None and not np.isfinite(array.astype(np.float32)).all():
                raise ValueError(f"{path}: {name!r} has NaN or infinite values.")
    console.print(f"{path}: {opened.format}, {_count(opened)}: whole.")
    if base is not None:
        if opened.format != "lora_jax":
            raise ValueError("PEFT saves nothing about its base that could be verified.")
        checkpoint = Checkpoint(base)
        hashes = store.read(path).base
        if not hashes:
            raise ValueError(f"{path} has no hashes of its base.")
        for name, said in _progress(hashes.items(), "comparing"):
            if name not in checkpoint:
                raise ValueError(f"{base} lacks {name!r}, of the base that {path} was trained on.")
            if store.fingerprint(checkpoint[name], name) != said:
                raise ValueError(f"{base} has another {name!r} than {path} was trained on.")
        console.print(f"{base} is the base that it was trained on.")
    return 0


def _names(names: str) -> Any:
    if names.endswith(".json"):
        said = read_json(Path(names))
        if not isinstance(said, list) or not all(isinstance(one, list) for one in said):
            raise ValueError(f"{names} must be a list of [Flax's path, PyTorch's name, kind].")
        return [tuple(one) for one in said]
    return names


def _check_experts(adapter: Path, experts: Sequence[str]) -> None:
    """Errors where the option would have no effect."""
    targets = peft_files.read(adapter).config.target_parameters if is_peft(adapter) else ()
    for name in experts:
        if name not in {target.rpartition(".")[2] for target in targets}:
            raise ValueError(f"--experts names {name!r}, of which {adapter} is no adapter of PEFT.")


def _new(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"{path} exists: name another one.")


def _table(*columns: str) -> Table:
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0)
    return table


def _bar(what: str) -> rich.progress.Progress:
    return rich.progress.Progress(console=Console(stderr=True), transient=True)


def _progress(items: Iterable[Any], what: str) -> Iterable[Any]:
    items = list(items)
    return rich.progress.track(items, what, console=Console(stderr=True), transient=True)


def _size(one: Factors) -> int:
    return int(one.U.size + one.V.size + (0 if one.m is None else one.m.size))


def _count(opened: Opened) -> str:
    return f"{len(opened.factors)} matrices, {len(opened.whole)} parameters trained whole"


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(a.astype(np.float32), b.astype(np.float32))


def _magnitudes(a: Factors, b: Factors) -> str:
    if a.m is None or b.m is None:
        return "" if a.m is b.m else "LoRA and DoRA"
    return f"{np.abs(a.m.astype(np.float32) - b.m.astype(np.float32)).max():.3g}"


def _report(report: RoundingReport) -> None:
    console.print(str(report), markup=False)
