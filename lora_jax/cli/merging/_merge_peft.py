"""What an adapter of PEFT on disk makes of the arrays of a base on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.cli.base._base_at_start import BaseAtStart
from lora_jax.cli.base._fits_base import check_has, check_shape
from lora_jax.cli.base._layouts import Layouts
from lora_jax.cli.base._vocabulary_arrays import is_head
from lora_jax.cli.merging._experts import alone_in
from lora_jax.cli.merging._merged_arrays import Parts, Updates
from lora_jax.core.variants._dora import DoRA
from lora_jax.core.variants._lora import LoRA
from lora_jax.peft._folder import PeftFiles
from lora_jax.peft.names._key_mapping import EXPERTS
from lora_jax.peft.names._keys import without_base_layer
from lora_jax.peft.torch._layout import factor_shapes, from_kernel, to_factors, to_kernel

Merged = dict[str, Callable[[np.ndarray], Parts]]


def updates_of_peft(
    files: PeftFiles,
    base: BaseAtStart,
    layouts: Layouts,
    experts: Mapping[str, bool | None] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> Updates:
    """The updates of an adapter of PEFT, for a base with PyTorch's names.

    Args:
      files: the adapter.
      base: the base, by the adapter's names.
      layouts: how the base stores square weights, where shapes do not say it.
      experts: what shapes may not say of parameters that are adapted by themselves: their names in
        their module, in its order, and whether it stores them ``(experts, in, out)``.
      kinds: how weights are stored, where the adapter itself knows it, by their names.

    Raises:
      ValueError: if the adapter does not fit the base, or the files do not say for which parameter
        it is.
    """
    merged: Merged = {}
    alone = alone_in(files, base, experts or {})
    for module, keys in files.modules.items():
        if module in alone:
            name, kind = alone[module]
            check_has(base, name, files.tensors.path)
            shape, r = base.info[name].shape, files.config.rank_of(name)
            size = shape[0] if kind in EXPERTS else 1
            matrix = _matrix_of(shape, kind)
            merged[name] = _merged_weight(files, name, keys, kind, matrix, r, size)
        else:
            merged |= _merged_layer(files, module, base, layouts, kinds or {})
    layouts.check()
    return Updates(base, merged, _replaced(files, base, merged), base.info)


def _merged_layer(
    files: PeftFiles,
    module: str,
    base: BaseAtStart,
    layouts: Layouts,
    kinds: Mapping[str, str],
) -> Merged:
    """The weight of an adapted layer, and its bias where one is added to it."""
    path, keys, name = files.tensors.path, files.modules[module], f"{module}.weight"
    check_has(base, name, path)
    shape, r = base.info[name].shape, files.config.rank_of(module)
    A, B = (files.tensors.info[keys[role]].shape for role in ("A", "B"))
    kind = _kind(keys, A, B, shape)
    if not kind:  # square, so that either fits until all are asked for
        kind = layouts.kind(name, kinds.get(name, ""), files) or "linear"
    window = shape[2:] if kind == "conv" else ()
    d, k = A[1] * int(np.prod(window, dtype=int)), B[0]
    expected = factor_shapes(kind, (d, k), r, window, 1)
    if _matrix_of(shape, kind) != (d, k) or (expected["A"], expected["B"]) != (A, B):
        raise ValueError(
            f"{path}: {module!r} has A {A} and B {B}, which do not fit the base's {name!r} "
            f"{shape} at rank {r}."
        )
    merged = {name: _merged_weight(files, module, keys, kind, (d, k), r)}
    if "bias" in keys:
        merged[f"{module}.bias"] = _merged_bias(files, module, base)
    return merged


def _replaced(files: PeftFiles, base: BaseAtStart, merged: Merged) -> dict[str, np.ndarray]:
    """Parameters of the files that take the place of the base's, or that it lacks.

    Copies of the base's that PEFT saves without training them must equal the base's.
    """
    path = files.tensors.path
    replaced: dict[str, np.ndarray] = {}
    for saved_name, key in files.parameters.items():
        name, info = _stored_name(without_base_layer(saved_name), base), files.tensors.info[key]
        if key in base.taken:
            continue
        if name not in base:
            _check_new(name, base, files)
        elif name in merged:
            _check_same(name, files.tensors[key], base, files, key)
            continue
        elif name.endswith(".bias") and not files.config.trains(saved_name):
            rows = files.tensors[key][: base.info[name].shape[0]]
            _check_same(name, rows, base, files, key)
            if info.shape == base.info[name].shape:
                continue
            check_shape(name, info, base, path)  # it has more tokens
        else:
            check_shape(name, info, base, path)
        array = files.tensors[key]
        if name in replaced and not np.array_equal(array, replaced[name]):
            raise ValueError(f"{path}: {key!r} is not the only array for {name!r}.")
        replaced[name] = array
    return replaced


def _check_same(
    name: str, array: np.ndarray, base: BaseAtStart, files: PeftFiles, key: str
) -> None:
    """Raises ValueError if an array of the files is not the base's."""
    if not np.array_equal(array.astype(base[name].dtype), base[name]):
        raise ValueError(
            f"{files.tensors.path} was trained on another {name!r} than {base.path} has: its "
            f"{key!r}."
        )


def _stored_name(name: str, base: BaseAtStart) -> str:
    """The parameter that a tied bias of a head is stored as, or the name itself."""
    head, _, leaf = name.rpartition(".")
    stored = f"{head.rpartition('.')[0]}.bias"
    tied = leaf == "bias" and is_head(head) and head.endswith(".decoder")
    return stored if tied and name not in base and stored in base else name


def _matrix_of(shape: tuple[int, ...], kind: str) -> tuple[int, int]:
    """``(d, k)`` of a weight, or of each expert in it."""
    shape = shape[1:] if kind in EXPERTS else shape
    kernel = to_kernel(kind, np.broadcast_to(np.float32(0), shape)).shape
    return int(np.prod(kernel[:-1])), int(kernel[-1])


def _merged_weight(
    files: PeftFiles,
    target: str,
    keys: Mapping[str, str],
    kind: str,
    matrix: tuple[int, int],
    r: int,
    experts: int = 1,
) -> Callable[[np.ndarray], Parts]:
    """``W'`` of a weight, or of each expert in it, by the formula of the variant."""

    def merged(W: np.ndarray) -> Parts:
        roles = [role for role in keys if role != "bias"]
        arrays = {role: files.tensors[keys[role]].astype(np.float32) for role in roles}
        factors = to_factors(kind, arrays, matrix, r, experts)
        variant = DoRA() if files.config.dora else LoRA()
        s = files.config.scale_of(target)

        def part(index: tuple[int, ...]) -> chex.Array:  # only its result is kept
            one = {name: jnp.asarray(array[index]) for name, array in factors.items()}
            kernel = to_kernel(kind, np.asarray(W[index], np.float32))
            out = jax.jit(variant.kernel, static_argnums=1)(kernel.reshape(matrix), s, **one)
            return jnp.asarray(from_kernel(kind, np.asarray(out).reshape(kernel.shape)))

        for index in [(e,) for e in range(experts)] if kind in EXPERTS else [()]:
            yield index, part(index)

    return merged


def _merged_bias(files: PeftFiles, module: str, base: BaseAtStart) -> Callable[[np.ndarray], Parts]:
    """The bias of a layer with that of ``B`` added."""
    name, key, path = f"{module}.bias", files.modules[module]["bias"], files.tensors.path
    if name not in base:
        raise ValueError(
            f"{path} has {key!r}, but {base.path} has no {name!r} that it could be added to: the "
            f"merged layer needs a bias, so give the model and its base one of zeros first."
        )
    check_has(base, name, path)
    if files.tensors.info[key].shape != base.info[name].shape:
        raise ValueError(
            f"{path}: {key!r} is {files.tensors.info[key].shape}, but {base.path} has "
            f"{base.info[name].shape} as {name!r}."
        )

    def merged(b: np.ndarray) -> Parts:
        yield (), files.lora_bias(module).merge(jnp.asarray(b))

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


def _check_new(name: str, base: BaseAtStart, files: PeftFiles) -> None:
    """Raises ValueError if the base lacks a parameter that is not of a new head."""
    module = name.rpartition(".")[0]
    if not files.config.saves(name) or any(other.startswith(f"{module}.") for other in base):
        check_has(base, name, files.tensors.path)
