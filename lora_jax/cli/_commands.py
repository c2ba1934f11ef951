"""The commands; each returns its exit code."""

from __future__ import annotations

import os
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

from lora_jax import peft
from lora_jax.arithmetic._low_rank import low_rank
from lora_jax.cli import _merging as merging
from lora_jax.cli import _prefixes as prefixes
from lora_jax.cli import _trees as trees
from lora_jax.cli._completed import completed
from lora_jax.cli._experts import order_of
from lora_jax.cli._factors import Factors, Opened, difference, is_peft, open_adapter, opened
from lora_jax.cli._heads import Model, embedding_by
from lora_jax.cli._layouts import Layouts, model_types
from lora_jax.cli._start import Start
from lora_jax.core._adapter import Adapter as Node
from lora_jax.core._axes import KernelAxes
from lora_jax.files._checkpoint import Checkpoint, rewrite
from lora_jax.files._fingerprint import fingerprint
from lora_jax.files._json import read_json
from lora_jax.files._read import read as read_folder
from lora_jax.files._save import save
from lora_jax.files._tensors import floats
from lora_jax.peft import _files as peft_files
from lora_jax.peft._names import CONV1D, as_names
from lora_jax.trees._rounding import RoundingReport
from lora_jax.trees._table import text_table

Adapter = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER")]
Other = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OTHER")]
Base = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BASE")]
Tuned = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TUNED")]
Out = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
Names = Annotated[str, tyro.conf.arg(metavar="FAMILY|FILE.json")]
Experts = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME ...]")]
Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT")]
Number = Annotated[int | None, tyro.conf.arg(metavar="NUMBER")]
console = Console(highlight=False, soft_wrap=True)


def inspect(path: Adapter) -> int:
    """Shows what is in an adapter of any format.

    Example: lora-jax inspect my-adapter

    Args:
        path: the adapter's folder.
    """
    adapter = open_adapter(path)
    rows: dict[tuple[str, ...], list[tuple[str, Factors, np.ndarray]]] = {}
    for name, one in _progress(adapter.factors.items(), "singular values"):
        size = f"{one.U.shape[0]} x {one.V.shape[1]}"
        kind = "LoRA" if one.m is None else "DoRA"
        alike = (_pattern(name), size, kind, str(one.rank), f"{one.scale:g}")
        rows.setdefault(alike, []).append((name, one, one.singular_values))
    head = ("matrix", "d x k", "variant", "rank", "scale", "||s U V||", "largest", "eff. rank")
    body = [
        (
            _name(pattern, [name for name, _, _ in group]),
            *alike,
            _range(_digits(float(np.linalg.norm(values))) for _, _, values in group),
            _range(_digits(float(values[0])) for _, _, values in group),
            _range(f"{one.effective_rank:.1f}" for _, one, _ in group),
        )
        for (pattern, *alike), group in rows.items()
    ]
    _show(head, body)
    if adapter.whole:
        arrays: dict[tuple[str, ...], list[str]] = {}
        for name, array in adapter.whole.items():
            shape = " x ".join(map(str, array.shape))
            arrays.setdefault((_pattern(name), shape, array.dtype.name), []).append(name)
        whole = [(_name(pattern, names), *facts) for (pattern, *facts), names in arrays.items()]
        _show(("fully trained", "shape", "dtype"), whole)
    facts = {"format": adapter.format, **adapter.facts}
    trained = sum(_size(one) for one in adapter.factors.values())
    trained += sum(array.size for array in adapter.whole.values())
    nbytes = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    facts |= {"numbers": f"{trained:,}", "bytes": f"{nbytes:,}"}
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()), markup=False)
    return 0


def convert(
    source: Adapter,
    target: Out,
    names: Names = "transformers",
    base_model: Text = None,
    task_type: Text = None,
) -> int:
    """Converts an adapter of lora_jax into one of PEFT, or one of PEFT into one of lora_jax.

    Example: lora-jax convert my-adapter for-peft --names names.json

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
        save(target, adapters)
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
            itself where there is one way only.
        base_prefix: how the base's names begin where the adapter's do not.
    """
    _new(out)
    _check_experts(adapter, experts)
    checkpoint = Checkpoint(base)
    key = None if seed is None else jax.random.key(seed)
    with tempfile.TemporaryDirectory() as scratch:
        named = {name: name for name in checkpoint}
        if not is_peft(adapter) and set(read_folder(adapter).adapters) <= set(checkpoint):
            if adapter_prefix is not None or base_prefix is not None:
                raise ValueError(f"{base} has the names of {adapter}: there is no prefix to give.")
            if layout is not None:
                raise ValueError(f"{base} has the names of {adapter}: there is no layout to give.")
            updates = merging.of_own(adapter, checkpoint)
        else:
            own: dict[str, str] = {}
            if is_peft(adapter):
                files = peft_files.read(adapter, tying=True)
                order = dict.fromkeys(experts, None if layout is None else layout == "in-out")
            else:
                table = as_names(_names(names))
                (files, own), order = trees.as_peft(adapter, table, scratch), order_of(table)
            files, named, notes = prefixes.aligned(files, checkpoint, adapter_prefix, base_prefix)
            view = checkpoint.renamed(named)
            model = Model.of(view, adapter)
            tie = model.tie(files, view)
            layouts = Layouts(view, layout)
            updates = merging.of_peft(files, Start(view, files, tie), layouts, order, own)
            if layout is not None and not (experts or layouts.asked):
                raise ValueError(
                    "--layout is said of the parameters that --experts names, or of square weights "
                    "of which nothing else says it, and there is none."
                )
            updates = completed(updates, view, model, tie, notes)
            if not set(updates.info) <= set(view):  # then all are named as in the adapter's model
                if checkpoint.info.keys() != view.info.keys():
                    updates.notes = (*updates.notes, "All names are as in the adapter's model.")
                checkpoint, named = view, {name: name for name in updates.info}
        with _bar("merging") as bar:
            task = bar.add_task("merging", total=len(named))

            def read(name: str) -> np.ndarray:
                bar.advance(task)
                return updates(named[name], key)

            info = {name: updates.info[to] for name, to in named.items()}
            rewrite(checkpoint, out, info, read, updates.config)
    if checkpoint.beside:
        beside = ", ".join(file.name for file in checkpoint.beside)
        console.print(f"Not copied, as no part of the model: {beside}.", markup=False)
    for note in updates.notes:
        console.print(note, markup=False)
    _report(updates.report())
    return 0


def diff(first: Adapter, second: Other, names: Names = "transformers") -> int:
    """Compares two adapters of any format. Exits with 1 where they differ.

    Example: lora-jax diff my-adapter another

    Args:
        first: an adapter's folder.
        second: another one's.
        names: a family of names (transformers, gemma), or a JSON file, as for convert; used where
            one is of lora_jax and the other of PEFT.
    """
    a, b = _both(first, second, names)
    head = ("matrix", "rank", "||A - B|| / ||A||", "cosine", "m, largest difference", "else")
    body: list[tuple[str, ...]] = []
    differs = False
    for name in dict.fromkeys((*a.factors, *b.factors)):
        if name not in a.factors or name not in b.factors:
            body.append((name, f"only in {first if name in a.factors else second}", *[""] * 4))
            differs = True
            continue
        one, other = a.factors[name], b.factors[name]
        if one.U.shape[0] != other.U.shape[0] or one.V.shape[1] != other.V.shape[1]:
            body.append((name, "of different shapes", *[""] * 4))
            differs = True
            continue
        relative, cosine = difference(one, other)
        magnitude = _magnitudes(one, other)
        ranks, how = f"{one.rank}, {other.rank}", _how(one, other)
        body.append((name, ranks, f"{relative:.3g}", f"{cosine:.4f}", magnitude, how))
        differs |= relative > 1e-6 or magnitude not in ("", "0") or how != ""
    for name in dict.fromkeys((*a.whole, *b.whole)):
        if name not in a.whole or name not in b.whole:
            body.append((name, f"only in {first if name in a.whole else second}", *[""] * 4))
            differs = True
        elif not _same(a.whole[name], b.whole[name]):
            body.append((name, "fully trained, differs", *[""] * 4))
            differs = True
    _show(head, body)
    console.print("They differ." if differs else "They are the same.")
    return int(differs)


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
        match: only matrices whose whole name matches this regular expression; in PyTorch's names
            it must leave out embeddings, which look like linear layers in a file.
        allow_rest: leave out what differs and is no matrix that matches; else it is an error.
        layout: as for merge: whether PyTorch stores square weights of layers (in, out), as GPT-2's
            Conv1D does, or (out, in), where neither other shapes nor the base's config.json say it.
    """
    if (rank is None) == (explained_variance is None):
        raise ValueError("extract needs either --rank or --explained_variance.")
    if rank is not None and rank < 1:
        raise ValueError(f"--rank must be at least 1, got {rank}.")
    if explained_variance is not None and not 0 < explained_variance <= 1:
        raise ValueError(f"--explained_variance must be in (0, 1], got {explained_variance}.")
    _new(out)
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
    found: dict[str, Node] = {}
    body: list[tuple[str, ...]] = []
    for name in _progress([name for name in old if name in new], "singular values"):
        numbers = floats(old.info[name].dtype) and floats(new.info[name].dtype)
        matches = numbers and pattern.fullmatch(name)
        if new.info[name].shape != old.info[name].shape and not matches:
            rest.append(name)
            continue
        if new.info[name].shape != old.info[name].shape:
            raise ValueError(
                f"{name!r} is {old.info[name].shape} in {base}, and {new.info[name].shape} in "
                f"{tuned}: leave it out by --match and --allow-rest."
            )
        delta = new[name].astype(np.float32) - old[name].astype(np.float32)
        if not delta.any():
            continue
        if delta.ndim != 2 or not matches:
            rest.append(name)
            continue
        in_torch = name.endswith(".weight")
        if all_torch and not in_torch:  # of no layer that PEFT could adapt
            rest.append(name)
            continue
        if in_torch and (says := embedding_by(name, old, new)):
            raise ValueError(
                f"{name!r} is of an embedding, by its {says}, and differs: leave it out, with "
                f"--match and --allow-rest."
            )
        kind = layouts.kind(name) if in_torch or name.endswith("/kernel") else "linear"
        if layouts.asked and layout is None:
            continue
        axes = CONV1D if in_torch == (kind == "linear") else KernelAxes()
        low = low_rank(delta.T if axes == CONV1D else delta, rank, explained_variance)
        kinds[name], found[name] = kind, trees.adapter(low.U, low.V, axes)
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
        raise ValueError("--layout is said of square weights of which nothing else says it.")
    if all(torch):
        names = [(name, name, kinds[name]) for name in found]
        frozen = {n: jax.ShapeDtypeStruct(old.info[n].shape, jnp.float32) for n in found}
        peft.save(out, frozen, found, names=names)
    else:
        save(out, trees.nested(found))
    _show(("matrix", "rank", "||error|| / ||difference||"), body)
    if rest:
        console.print(f"Left out, though they differ: {', '.join(rest)}.", markup=False)
    return 0


def verify(
    path: Adapter, base: Annotated[Path | None, tyro.conf.arg(metavar="BASE")] = None
) -> int:
    """Reads all of an adapter, and says whether it is whole and, if asked, fits its base.

    Example: lora-jax verify my-adapter --base base.safetensors

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
        hashes = read_folder(path).base
        if not hashes:
            raise ValueError(f"{path} has no hashes of its base.")
        for name, said in _progress(hashes.items(), "comparing"):
            if name not in checkpoint:
                raise ValueError(f"{base} lacks {name!r}, of the base that {path} was trained on.")
            if fingerprint(checkpoint[name], name) != said:
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
    targets = (
        peft_files.read(adapter, tying=True).config.target_parameters if is_peft(adapter) else ()
    )
    for name in experts:
        if name not in {target.rpartition(".")[2] for target in targets}:
            raise ValueError(f"--experts names {name!r}, of which {adapter} is no adapter of PEFT.")


def _both(first: Path, second: Path, names: str) -> tuple[Opened, Opened]:
    """Two adapters by the same names: those of PEFT where one of them is of PEFT."""
    if is_peft(first) == is_peft(second):
        return open_adapter(first), open_adapter(second)
    table = as_names(_names(names))
    with tempfile.TemporaryDirectory() as scratch:
        a, b = (
            open_adapter(one) if is_peft(one) else opened(trees.as_peft(one, table, scratch)[0])
            for one in (first, second)
        )
    if not {*a.factors, *a.whole} & {*b.factors, *b.whole}:
        raise ValueError(
            f"By --names {names}, {first} has {next(iter(a.factors))!r} and so on, and {second} "
            f"{next(iter(b.factors))!r} and so on, and nothing in common: say by --names how they "
            f"are called."
        )
    return a, b


def _new(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"{path} exists: name another one.")


def _show(head: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    """A table; where it is wider than the terminal, names lose their beginnings, digits nothing."""
    lines = text_table(head, body, left=1)
    if console.is_terminal or "COLUMNS" in os.environ:
        over = max(map(len, lines)) - console.width
        room = max(max(len(row[0]) for row in (head, *body)) - max(over, 0), 16)
        short = [n if len(n) <= room else f"...{n[3 - room :]}" for n, *_ in body]
        lines = text_table(
            head, [(n, *row[1:]) for n, row in zip(short, body, strict=True)], left=1
        )
    console.print("\n".join(lines), markup=False)


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _name(pattern: str, names: Sequence[str]) -> str:
    """One name, or what several are that differ in numbers only."""
    return names[0] if len(names) == 1 else f"{pattern} ({len(names)})"


def _digits(value: float) -> str:
    """A number with three digits."""
    return f"{float(f'{value:.3g}'):g}"


def _range(values: Iterable[str]) -> str:
    """The smallest and the largest of some numbers."""
    ordered = sorted(values, key=float)
    return " to ".join(dict.fromkeys((ordered[0], ordered[-1])))


def _bar(what: str) -> rich.progress.Progress:
    return rich.progress.Progress(console=Console(stderr=True), transient=True)


def _progress(items: Iterable[Any], what: str) -> Iterable[Any]:
    items = list(items)
    return rich.progress.track(items, what, console=Console(stderr=True), transient=True)


def _size(one: Factors) -> int:
    return int(one.U.size + one.V.size + (0 if one.m is None else one.m.size))


def _count(opened: Opened) -> str:
    return f"{len(opened.factors)} matrices, {len(opened.whole)} parameters fully trained"


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(a.astype(np.float32), b.astype(np.float32))


def _magnitudes(a: Factors, b: Factors) -> str:
    if a.m is None or b.m is None:
        return "" if a.m is b.m else "LoRA and DoRA"
    return f"{np.abs(a.m.astype(np.float32) - b.m.astype(np.float32)).max():.3g}"


def _how(a: Factors, b: Factors) -> str:
    """What two adapters say otherwise of what they compute; empty where one is of PEFT."""
    fields = [field for field in a.how if field in b.how and a.how[field] != b.how[field]]
    return "; ".join(f"{field} {a.how[field]} and {b.how[field]}" for field in fields)


def _report(report: RoundingReport) -> None:
    console.print(str(report), markup=False)
