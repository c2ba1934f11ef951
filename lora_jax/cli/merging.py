"""What an adapter on disk makes of the arrays of a base on disk."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import peft, store
from lora_jax.adapter import Adapter, Shift, Whole
from lora_jax.checkpoint import Checkpoint
from lora_jax.config import nearest
from lora_jax.rounding import Rounding, RoundingReport, key_for, measure, round_to
from lora_jax.tensors import StrPath
from lora_jax.torch_layout import factor_shapes, from_kernel, to_factors, to_kernel
from lora_jax.tree import check_fits, check_merges
from lora_jax.variants import VARIANTS


@dataclasses.dataclass
class Updates:
    """Merged arrays by their names in the base, and what rounding did to them.

    Attributes:
      exact: gives ``W'`` in float32 for a base's array, by its name.
      whole: arrays that take the place of the base's.
    """

    exact: Mapping[str, Callable[[np.ndarray], chex.Array]]
    whole: Mapping[str, np.ndarray]
    _rows: dict[str, Rounding] = dataclasses.field(default_factory=dict)

    def __call__(self, name: str, base: np.ndarray, key: chex.PRNGKey | None) -> np.ndarray:
        """The array that stands in place of the base's, in its dtype."""
        chance = None if key is None else key_for(key, name)
        if name in self.exact:
            exact = self.exact[name](base)
            out = round_to(exact, base.dtype, chance)
            self._rows[name] = measure(exact, out, jnp.asarray(base))
            return np.asarray(out)
        if name in self.whole:
            exact = jnp.asarray(self.whole[name]).astype(jnp.float32)
            out = round_to(exact, base.dtype, chance)
            self._rows[name] = measure(exact, out, None)
            return np.asarray(out)
        return base

    def report(self) -> RoundingReport:
        """The rounding of all that was merged."""
        return RoundingReport(dict(sorted(self._rows.items())))


def of_own(path: StrPath, base: Checkpoint) -> Updates:
    """Of an adapter of ours, for a base with Flax's paths as names."""
    exact: dict[str, Callable[[np.ndarray], chex.Array]] = {}
    whole: dict[str, np.ndarray] = {}
    for name, node in store.read(path).adapters.items():
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


def _effective(node: Adapter | Shift, W: np.ndarray) -> Any:
    return jax.jit(type(node).effective_kernel)(node, W)


def of_peft(path: StrPath, base: Checkpoint) -> Updates:
    """Of an adapter of PEFT, for a base with PyTorch's names."""
    files = peft.read(path)
    config = files.config
    if config.target_parameters:
        raise ValueError(
            f"{path} adapts parameters by themselves (target_parameters), whose order in their "
            f"module the files do not say: merge it in Python."
        )
    if config.lora_bias:
        raise ValueError(f"{path} has biases of B (lora_bias): merge it in Python.")
    exact: dict[str, Callable[[np.ndarray], chex.Array]] = {}
    for module, keys in files.modules.items():
        name = f"{module}.weight"
        _has(base, name, path)
        shape, r = base.info[name].shape, config.rank_of(module)
        A, B = (files.tensors.info[keys[role]].shape for role in ("A", "B"))
        kind = _kind(keys, A, B, shape, config.fan_in_fan_out)
        window = shape[2:] if kind == "conv" else ()
        d, k = A[1] * int(np.prod(window, dtype=int)), B[0]
        expected = factor_shapes(kind, (d, k), r, window, 1)
        kernel = to_kernel(kind, np.broadcast_to(np.float32(0), shape)).shape
        if (int(np.prod(kernel[:-1])), kernel[-1]) != (d, k) or (
            expected["A"],
            expected["B"],
        ) != (A, B):
            raise ValueError(
                f"{path}: {module!r} has A {A} and B {B}, which do not fit the base's {name!r} "
                f"{shape} at rank {r}."
            )
        exact[name] = _merger(files, module, keys, kind, (d, k), r)
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


def _merger(
    files: peft.PeftFiles,
    module: str,
    keys: Mapping[str, str],
    kind: str,
    matrix: tuple[int, int],
    r: int,
) -> Callable[[np.ndarray], Any]:
    def merged(W: np.ndarray) -> Any:
        arrays = {role: files.tensors[key].astype(np.float32) for role, key in keys.items()}
        one = {name: jnp.asarray(x) for name, x in to_factors(kind, arrays, matrix, r, 1).items()}
        kernel = to_kernel(kind, np.asarray(W, np.float32))
        formula = VARIANTS["dora" if files.config.dora else "lora"].kernel
        out = jax.jit(formula, static_argnums=(4, 5))(
            kernel.reshape(matrix),
            one["U"],
            one["V"],
            one.get("m"),
            files.scale(module),
            False,
        )
        return jnp.asarray(from_kernel(kind, np.asarray(out).reshape(kernel.shape)))

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
