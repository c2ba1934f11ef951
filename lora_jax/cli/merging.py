"""What an adapter on disk makes of the arrays of a base on disk."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import peft_files, store
from lora_jax.adapter import Adapter, Shift, Whole
from lora_jax.checkpoint import Checkpoint
from lora_jax.checks import check_fits, check_merges
from lora_jax.cli.experts import alone_in
from lora_jax.config import nearest
from lora_jax.names import EXPERTS
from lora_jax.rounding import (
    Rounding,
    RoundingReport,
    key_for,
    measure,
    measure_parts,
    round_to,
)
from lora_jax.tensors import StrPath
from lora_jax.torch_layout import factor_shapes, from_kernel, to_factors, to_kernel
from lora_jax.variants import VARIANTS

# What is merged of one array of the base: the index of a part of it, and that part in float32. Of
# experts there is one part for each, of anything else one.
_Parts = Iterable[tuple[tuple[int, ...], chex.Array]]


@dataclasses.dataclass
class Updates:
    """Merged arrays by their names in the base, and what rounding did to them.

    Attributes:
      exact: gives ``W'`` in float32, part by part, for a base's array, by its name.
      whole: arrays that take the place of the base's.
    """

    exact: Mapping[str, Callable[[np.ndarray], _Parts]]
    whole: Mapping[str, np.ndarray]
    _rows: dict[str, Rounding] = dataclasses.field(default_factory=dict)

    def __call__(self, name: str, base: np.ndarray, key: chex.PRNGKey | None) -> np.ndarray:
        """The array that stands in place of the base's, in its dtype."""
        chance = None if key is None else key_for(key, name)
        if name in self.exact:
            return self._merged(name, base, chance)
        if name in self.whole:
            exact = jnp.asarray(self.whole[name]).astype(jnp.float32)
            out = round_to(exact, base.dtype, chance)
            self._rows[name] = measure(exact, out, None)
            return np.asarray(out)
        return base

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
    for name, node in store.read(path).adapters_alone(path).items():
        _has(base, name, path)
        if isinstance(node, Adapter | Shift):
            check_merges(name, node)
            check_fits(name, np.broadcast_to(np.float32(0), base.info[name].shape), node)
            exact[name] = functools.partial(_effective, node)
        else:
            array = np.asarray(node.value if isinstance(node, Whole) else node)
            _check_shape(name, array, base, path)
            whole[name] = array
    return Updates(exact, whole)


def _effective(node: Adapter | Shift, W: np.ndarray) -> _Parts:
    yield (), jax.jit(type(node).effective_kernel)(node, W)


def of_peft(
    path: StrPath, base: Checkpoint, experts: Mapping[str, bool | None] | None = None
) -> Updates:
    """Of an adapter of PEFT, for a base with PyTorch's names.

    Args:
      path: the adapter's folder.
      base: the base.
      experts: what shapes may not say of parameters that are adapted by themselves: their names in
        their module, in its order, and whether it stores them ``(experts, in, out)``.

    Raises:
      ValueError: an adapter that does not fit the base, or of which the files do not say for which
        parameter it is.
    """
    files = peft_files.read(path)
    exact: dict[str, Callable[[np.ndarray], _Parts]] = {}
    alone = alone_in(files, base, experts or {})
    for module, keys in files.modules.items():
        if module in alone:
            name, kind = alone[module]
            shape, r = base.info[name].shape, files.config.rank_of(name)
            d, k = _matrix_of(shape, kind)
            size = shape[0] if kind in EXPERTS else 1
            exact[name] = _merger(files, name, keys, kind, (d, k), r, size)
            continue
        name = f"{module}.weight"
        _has(base, name, path)
        shape, r = base.info[name].shape, files.config.rank_of(module)
        A, B = (files.tensors.info[keys[role]].shape for role in ("A", "B"))
        kind = _kind(keys, A, B, shape, files.config.fan_in_fan_out)
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
    whole = {}
    for name, key in files.whole.items():
        plain = name.replace(".base_layer.", ".")
        _has(base, plain, path)
        if plain in exact:
            if not np.array_equal(files.tensors[key].astype(base[plain].dtype), base[plain]):
                raise ValueError(
                    f"{path} was trained on another {plain!r} than {base.path} has: its {key!r}."
                )
            continue
        whole[plain] = files.tensors[key]
        _check_shape(plain, whole[plain], base, path)
    return Updates(exact, whole)


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
    files: peft_files.PeftFiles, module: str, key: str, base: Checkpoint
) -> Callable[[np.ndarray], _Parts]:
    """The bias of a layer with that of ``B`` added."""
    name, path = f"{module}.bias", files.tensors.path
    if name not in base:
        raise ValueError(
            f"{path} has {key!r}, but {base.path} has no {name!r} that it could be added to: the "
            f"merged layer needs a bias, so give the model and its base one of zeros first."
        )
    if files.tensors.info[key].shape != base.info[name].shape:
        raise ValueError(
            f"{path}: {key!r} is {files.tensors.info[key].shape}, but {base.path} has "
            f"{base.info[name].shape} as {name!r}."
        )

    def merged(b: np.ndarray) -> _Parts:
        shift = Shift(jnp.asarray(files.tensors[key].astype(np.float32)), files.scale(module))
        yield (), shift.effective_kernel(jnp.asarray(b))

    return merged


def _kind(
    keys: Mapping[str, str],
    A: tuple[int, ...],
    B: tuple[int, ...],
    shape: tuple[int, ...],
    fan_in_fan_out: bool,
) -> str:
    """How PyTorch stores a weight: by its shape, and where that is square by the config."""
    if keys["A"].endswith("_embedding_A"):
        return "embedding"
    if len(A) > 2:
        return "conv"
    if shape == (B[0], A[1]) and shape == (A[1], B[0]):
        return "conv1d" if fan_in_fan_out else "linear"
    return "conv1d" if shape == (A[1], B[0]) else "linear"


def _has(base: Checkpoint, name: str, path: StrPath) -> None:
    if name not in base:
        raise ValueError(
            f"{path} has something for {name!r}, but {base.path} has no such array. Nearest: "
            f"{', '.join(nearest(name, base)) or 'none'}."
        )


def _check_shape(name: str, array: np.ndarray, base: Checkpoint, path: StrPath) -> None:
    if array.shape != base.info[name].shape:
        raise ValueError(
            f"{path}: {name!r} is {array.shape}, but {base.path} has {base.info[name].shape}."
        )
