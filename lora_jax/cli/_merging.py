"""What an adapter on disk makes of the arrays of a base on disk."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.cli._experts import alone_in
from lora_jax.cli._heads import grown, is_head, is_vocabulary
from lora_jax.cli._layouts import Layouts
from lora_jax.cli._start import Start, check_floats, head_biases
from lora_jax.core._fully_trained import as_node
from lora_jax.core._matching import nearest_paths
from lora_jax.core._node import Node
from lora_jax.core._variants import VARIANTS
from lora_jax.files._bytes import StrPath
from lora_jax.files._checkpoint import Checkpoint
from lora_jax.files._read import read
from lora_jax.files._tensors import Info, floats, is_floating
from lora_jax.peft import _files as peft_files
from lora_jax.peft._lora_bias import LoraBias
from lora_jax.peft._names import EXPERTS
from lora_jax.peft._torch_layout import factor_shapes, from_kernel, to_factors, to_kernel
from lora_jax.trees._rounding import (
    Rounding,
    RoundingReport,
    key_for,
    measure,
    measure_parts,
    round_to,
)

# What is merged of one array of the base: the index of a part of it, and that part in float32. Of
# experts there is one part for each, of anything else one.
_Parts = Iterable[tuple[tuple[int, ...], chex.Array]]


@dataclasses.dataclass
class Updates:
    """Merged arrays by their names in the base, and what rounding did to them.

    Attributes:
      base: the arrays that are merged into.
      exact: gives ``W'`` in float32, part by part, for a base's array, by its name.
      whole: arrays that take the place of the base's, or that it lacks.
      info: dtype and shape of every array of the merged model.
      config: that of the merged model, where it is another than the base's.
      notes: what was done that the adapter does not say by itself.
    """

    base: Mapping[str, np.ndarray]
    exact: Mapping[str, Callable[[np.ndarray], _Parts]]
    whole: Mapping[str, np.ndarray]
    info: Mapping[str, Info]
    config: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()
    _rows: dict[str, Rounding] = dataclasses.field(default_factory=dict)

    def __call__(self, name: str, key: chex.PRNGKey | None) -> np.ndarray:
        """The array of the merged model, in the dtype of the base's."""
        chance = None if key is None else key_for(key, name)
        if name in self.exact:
            return self._merged(name, self.base[name], chance)
        if name not in self.whole:
            return self.base[name]
        if not is_floating(self.whole[name]):
            return self.whole[name]
        exact = jnp.asarray(self.whole[name]).astype(jnp.float32)
        out = round_to(exact, self.info[name].dtype, chance)
        self._rows[name] = measure(exact, out, None)
        return np.asarray(out)

    def _merged(self, name: str, base: np.ndarray, chance: chex.PRNGKey | None) -> np.ndarray:
        out = base

        def parts() -> Iterator[tuple[chex.Array, chex.Array, chex.Array]]:
            nonlocal out
            for index, exact in self.exact[name](base):
                own = chance
                if index and chance is not None:
                    own = functools.reduce(jax.random.fold_in, index, chance)
                rounded = round_to(exact, base.dtype, own)
                if not index:
                    out = np.asarray(rounded)
                else:
                    out = np.empty_like(base) if out is base else out
                    out[index] = rounded
                yield exact, rounded, jnp.asarray(base[index])

        self._rows[name] = measure_parts(parts())
        return out

    def report(self) -> RoundingReport:
        """The rounding of all that was merged."""
        return RoundingReport(dict(sorted(self._rows.items())))


def of_own(path: StrPath, base: Checkpoint) -> Updates:
    """Of an adapter of ours, for a base with Flax's paths as names."""
    exact: dict[str, Callable[[np.ndarray], _Parts]] = {}
    whole: dict[str, np.ndarray] = {}
    for name, leaf in read(path).adapters_alone(path).items():
        _has(base, name, path)
        node = as_node(leaf)
        if node.in_base:
            node.check_merges(name)
            node.check_fits(name, base.info[name].shape)
            exact[name] = functools.partial(_effective, node)
        else:
            array = np.asarray(node.merge(None))
            _check_shape(name, Info(array.dtype, array.shape), base, path)
            whole[name] = array
    return Updates(base, exact, whole, base.info)


def _effective(node: Node, W: np.ndarray) -> _Parts:
    yield (), jax.jit(type(node).merge)(node, W)


def of_peft(
    files: peft_files.PeftFiles,
    base: Start,
    layouts: Layouts,
    experts: Mapping[str, bool | None] | None = None,
    own: Mapping[str, str] | None = None,
) -> Updates:
    """Of an adapter of PEFT, for a base with PyTorch's names.

    Args:
      files: the adapter.
      base: the base, by the adapter's names.
      layouts: how the base stores square weights, of which shapes do not say it.
      experts: what shapes may not say of parameters that are adapted by themselves: their names in
        their module, in its order, and whether it stores them ``(experts, in, out)``.
      own: what the adapter itself knows of that, by the names of the weights.

    Raises:
      ValueError: an adapter that does not fit the base, or of which the files do not say for which
        parameter it is.
    """
    path = files.tensors.path
    exact: dict[str, Callable[[np.ndarray], _Parts]] = {}
    alone = alone_in(files, base, experts or {})
    for module, keys in files.modules.items():
        if module in alone:
            name, kind = alone[module]
            _has(base, name, path)
            shape, r = base.info[name].shape, files.config.rank_of(name)
            d, k = _matrix_of(shape, kind)
            size = shape[0] if kind in EXPERTS else 1
            exact[name] = _merger(files, name, keys, kind, (d, k), r, size)
            continue
        name = f"{module}.weight"
        _has(base, name, path)
        shape, r = base.info[name].shape, files.config.rank_of(module)
        A, B = (files.tensors.info[keys[role]].shape for role in ("A", "B"))
        kind = _kind(keys, A, B, shape)
        if not kind:  # square, so that either fits until all are asked for
            kind = layouts.kind(name, (own or {}).get(name, ""), files) or "linear"
        window = shape[2:] if kind == "conv" else ()
        d, k = A[1] * int(np.prod(window, dtype=int)), B[0]
        expected = factor_shapes(kind, (d, k), r, window, 1)
        if _matrix_of(shape, kind) != (d, k) or (expected["A"], expected["B"]) != (A, B):
            raise ValueError(
                f"{path}: {module!r} has A {A} and B {B}, which do not fit the base's {name!r} "
                f"{shape} at rank {r}."
            )
        exact[name] = _merger(files, module, keys, kind, (d, k), r)
        if "bias" in keys:
            exact[f"{module}.bias"] = _shifted(files, module, keys["bias"], base)
    layouts.check()
    whole: dict[str, np.ndarray] = {}
    for name, key in files.whole.items():
        plain = _place(name.replace(".base_layer.", "."), base)
        if key in base.taken:
            continue
        if plain not in base:
            _check_new(plain, base, files)
        elif plain in exact:
            if not np.array_equal(files.tensors[key].astype(base[plain].dtype), base[plain]):
                raise ValueError(
                    f"{path} was trained on another {plain!r} than {base.path} has: its {key!r}."
                )
            continue
        elif plain.endswith(".bias") and not files.trains(name):
            rows = files.tensors[key][: base.info[plain].shape[0]]
            if not np.array_equal(rows.astype(base[plain].dtype), base[plain]):
                raise ValueError(
                    f"{path} was trained on another {plain!r} than {base.path} has: its {key!r}."
                )
            if files.tensors.info[key].shape == base.info[plain].shape:
                continue
            _check_shape(plain, files.tensors.info[key], base, path)  # it has more tokens
        else:
            _check_shape(plain, files.tensors.info[key], base, path)
        array = files.tensors[key]
        if plain in whole and not np.array_equal(array, whole[plain]):
            raise ValueError(f"{path}: {key!r} is not the only array for {plain!r}.")
        whole[plain] = array
    return Updates(base, exact, whole, base.info)


def _place(name: str, base: Start) -> str:
    """The parameter that a tied bias of a head is stored as, or the name itself."""
    head, _, leaf = name.rpartition(".")
    beside = f"{head.rpartition('.')[0]}.bias"
    tied = leaf == "bias" and is_head(head) and head.endswith(".decoder")
    return beside if tied and name not in base and beside in base else name


def _matrix_of(shape: tuple[int, ...], kind: str) -> tuple[int, int]:
    """``(d, k)`` of a weight, or of each expert in it."""
    shape = shape[1:] if kind in EXPERTS else shape
    kernel = to_kernel(kind, np.broadcast_to(np.float32(0), shape)).shape
    return int(np.prod(kernel[:-1])), int(kernel[-1])


def _merger(
    files: peft_files.PeftFiles,
    target: str,
    keys: Mapping[str, str],
    kind: str,
    matrix: tuple[int, int],
    r: int,
    experts: int = 1,
) -> Callable[[np.ndarray], _Parts]:
    def merged(W: np.ndarray) -> _Parts:
        roles = [role for role in keys if role != "bias"]
        arrays = {role: files.tensors[keys[role]].astype(np.float32) for role in roles}
        factors = to_factors(kind, arrays, matrix, r, experts)
        formula = VARIANTS["dora" if files.config.dora else "lora"].kernel

        def part(index: tuple[int, ...]) -> chex.Array:  # of which nothing is held but the result
            one = {name: jnp.asarray(array[index]) for name, array in factors.items()}
            kernel = to_kernel(kind, np.asarray(W[index], np.float32))
            out = jax.jit(formula, static_argnums=(4, 5))(
                kernel.reshape(matrix),
                one["U"],
                one["V"],
                one.get("m"),
                files.scale(target),
                False,
            )
            return jnp.asarray(from_kernel(kind, np.asarray(out).reshape(kernel.shape)))

        for index in [(e,) for e in range(experts)] if kind in EXPERTS else [()]:
            yield index, part(index)

    return merged


def _shifted(
    files: peft_files.PeftFiles, module: str, key: str, base: Start
) -> Callable[[np.ndarray], _Parts]:
    """The bias of a layer with that of ``B`` added."""
    name, path = f"{module}.bias", files.tensors.path
    if name not in base:
        raise ValueError(
            f"{path} has {key!r}, but {base.path} has no {name!r} that it could be added to: the "
            f"merged layer needs a bias, so give the model and its base one of zeros first."
        )
    _has(base, name, path)
    if files.tensors.info[key].shape != base.info[name].shape:
        raise ValueError(
            f"{path}: {key!r} is {files.tensors.info[key].shape}, but {base.path} has "
            f"{base.info[name].shape} as {name!r}."
        )

    def merged(b: np.ndarray) -> _Parts:
        shift = LoraBias(jnp.asarray(files.tensors[key].astype(np.float32)), files.scale(module))
        yield (), shift.merge(jnp.asarray(b))

    return merged


def _kind(
    keys: Mapping[str, str], A: tuple[int, ...], B: tuple[int, ...], shape: tuple[int, ...]
) -> str:
    """How PyTorch stores a weight by its shape; empty where that is square."""
    if keys["A"].endswith("_embedding_A"):
        return "embedding"
    if len(A) > 2:
        return "conv"
    if shape == (B[0], A[1]) == (A[1], B[0]):
        return ""
    return "conv1d" if shape == (A[1], B[0]) else "linear"


def _has(base: Checkpoint | Start, name: str, path: StrPath) -> None:
    """Errors where the base lacks an array, or has codes in its place."""
    if name not in base:
        raise ValueError(
            f"{path} has something for {name!r}, but {base.path} has no such array. Nearest: "
            f"{', '.join(nearest_paths(name, base)) or 'none'}."
        )
    check_floats(base, name)


def _check_new(name: str, base: Start, files: peft_files.PeftFiles) -> None:
    """Errors for a parameter that the base lacks, but for those of a head that is new."""
    module = name.rpartition(".")[0]
    if not files.config.saves(name) or any(other.startswith(f"{module}.") for other in base):
        _has(base, name, files.tensors.path)


def _check_shape(name: str, one: Info, base: Checkpoint | Start, path: StrPath) -> None:
    if one.dtype != base.info[name].dtype or floats(one.dtype):
        _has(base, name, path)
    shape = base.info[name].shape
    tokens = is_vocabulary(name) or name in head_biases(base)
    if one.shape != shape and not (tokens and grown([one.shape], shape)):
        raise ValueError(f"{path}: {name!r} is {one.shape}, but {base.path} has {shape}.")
