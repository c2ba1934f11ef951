"""PEFT's tensors as the nodes of an adapter tree: each is used, or refused with its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.core._adapter import Adapter
from lora_jax.core._matching import nearest_paths
from lora_jax.core._variants import float32_or_more
from lora_jax.files._checkpoint import Checkpoint
from lora_jax.files._tensors import Tensors, is_floating
from lora_jax.peft._config import CONFIG
from lora_jax.peft._files import PeftFiles
from lora_jax.peft._lora_bias import LoraBias
from lora_jax.peft._names import EXPERTS, Torch
from lora_jax.peft._targets import check_equal, nested_modules, target_of
from lora_jax.peft._torch_layout import factor_shapes, to_factors
from lora_jax.peft._torch_params import TorchParams

# Arrays of a module by their role, with the PyTorch parameter that they adapt.
Part = tuple[Torch, dict[str, np.ndarray]]
# Arrays of one leaf, by their index in the stack.
Stack = dict[tuple[int, ...], np.ndarray]


def sort_tensors(
    files: PeftFiles, model: TorchParams
) -> tuple[dict[str, list[Part]], dict[str, Stack], dict[str, Stack]]:
    """The tensors by path: of adapters, of leaves that are fully trained, of biases of ``B``."""
    tensors = files.tensors
    parts: dict[str, list[Part]] = {}
    whole: dict[str, Stack] = {}
    shifts: dict[str, Stack] = {}
    alone = [t for name, t in model.by_name.items() if files.config.targets_parameter(name)]
    nested = nested_modules(alone)
    for module, keys in files.modules.items():
        if module not in nested and ".base_layer." in f"{module}.":
            raise ValueError(
                f"{tensors.path} has {module!r}: an adapter below another one, as PEFT makes them "
                f"for nn.MultiheadAttention, has no equal here."
            )
        torch = nested.get(module) or _lookup(f"{module}.weight", tensors, model)
        check_equal(torch, model, True, str(tensors.path))
        embedding = keys["A"].endswith("_embedding_A")
        if torch.kind == "plain" or embedding != (torch.kind == "embedding"):
            raise ValueError(
                f"{tensors.path} has {keys['A']!r}, but names says that it is {torch.kind}: "
                f"{torch.path!r}."
            )
        arrays = {role: tensors[key] for role, key in keys.items()}
        if module in nested and torch.kind == "conv1d":
            # Of a parameter by itself PEFT does not know that it is (in, out).
            arrays = {"A": arrays["B"].T, "B": arrays["A"].T}
        if "bias" in arrays:
            leaf = model.by_name.get(f"{module}.bias")
            if leaf is None:
                raise ValueError(
                    f"{tensors.path} has {keys['bias']!r}, but the layer of {torch.path!r} has no "
                    f"bias that it could be added to: give it one of zeros (use_bias=True), and "
                    f"names one for {module + '.bias'!r}."
                )
            shifts.setdefault(leaf.path, {})[leaf.index] = arrays.pop("bias")
        parts.setdefault(torch.path, []).append((torch, arrays))
    for name, key in files.whole.items():
        plain = name.replace(".base_layer.", ".")
        torch = _lookup(plain, tensors, model)
        if plain.endswith((".weight", ".bias")) and not files.trains(name):
            _check_same(torch, tensors[key], model, f"{tensors.path}: {key!r}")
            continue
        check_equal(torch, model, None, f"{tensors.path}: {key!r}")
        if torch.index in whole.setdefault(torch.path, {}):
            raise ValueError(f"{tensors.path}: {key!r} is there in two forms.")
        whole[torch.path][torch.index] = tensors[key]
    return parts, whole, shifts


def check_complete(
    files: PeftFiles,
    model: TorchParams,
    parts: Mapping[str, list[Part]],
    whole: Mapping[str, Stack],
    shifts: Mapping[str, Stack],
) -> None:
    """Errors where tensors are missing that the config, or the rest of a stack, asks for."""
    file, config = files.tensors.path, files.config
    if twice := sorted((set(parts) | set(shifts)) & set(whole)):
        raise ValueError(f"{file}: {twice[0]!r} is both adapted and saved whole.")
    has = {path: {torch.index for torch, _ in found} for path, found in parts.items()}
    has |= {path: set(arrays) for path, arrays in (*whole.items(), *shifts.items())}
    for path, indices in has.items():
        axes = model.axes(path)
        # Of kernels side by side some may be adapted, but the same ones in every layer of a scan.
        some = path in parts and axes is not None and axes.fused > 1
        for torch in model.torch(path):
            if some and all(torch.index[-1] != index[-1] for index in indices):
                continue
            if torch.index not in indices:
                raise ValueError(
                    f"{file} lacks {torch.name!r}: {path!r} holds {len(model.torch(path))} such "
                    f"kernels in one, which are adapted together or not at all."
                )
    has = {path: indices for path, indices in has.items() if path not in shifts}
    missing = {n: t for n, t in model.by_name.items() if t.index not in has.get(t.path, ())}
    for name, torch in missing.items():
        # PEFT also lists modules that heads may have, such as "score", which this model need not
        # have.
        if config.saves(name):
            raise ValueError(f"{file} lacks {name!r}, of modules_to_save in {CONFIG}.")
        weight = torch.kind != "plain" and name.endswith(".weight")
        if weight and not config.restricted and config.targets(torch.module):
            raise ValueError(f"{file} lacks {torch.module!r}, of target_modules in {CONFIG}.")
        if config.targets_parameter(name):
            raise ValueError(f"{file} lacks {name!r}, of target_parameters in {CONFIG}.")


def to_adapter(path: str, found: list[Part], files: PeftFiles, model: TorchParams) -> Adapter:
    """``U = A^T``, ``V = B^T`` and ``m`` of every kernel in the stack."""
    config, file, torches = files.config, files.tensors.path, [torch for torch, _ in found]
    axes, shape = model.axes(path), model.shape(path)
    if axes is None:
        raise ValueError(
            f"{path!r} is {shape}: which of its axes are inputs? Pass "
            "axes=lora_jax.kernel_axes(...)."
        )
    if axes.fused > 1:
        there = sorted({torch.index[-1] for torch in torches})
        axes = dataclasses.replace(axes, parts=tuple(axes.parts[i] for i in there))
    (d, k), stack = axes.matrix_shape(shape), axes.batch_shape(shape)
    # PEFT looks for patterns by the name of the module, or of a parameter adapted by itself.
    targets = [t.name if config.targets_parameter(t.name) else t.module for t in torches]
    facts = {(config.rank_of(target), config.alpha_of(target)) for target in targets}
    if len(facts) > 1:
        raise ValueError(
            f"{file}: the kernels that {path!r} holds in one have different ranks and alphas: "
            f"{sorted(facts)}."
        )
    ((r, alpha),) = facts
    kind = torches[0].kind
    window = model.window(path, kind)
    experts = stack[-1] if kind in EXPERTS else 1
    expected = factor_shapes(kind, (d, k), r, window, experts)
    factors = {}
    for torch, arrays in found:
        for role, array in arrays.items():
            if array.shape != expected[role] or not is_floating(array):
                raise ValueError(
                    f"{file}: {role} of {target_of(torch)!r} is {array.dtype} {array.shape}, but "
                    f"should be {expected[role]} for rank {r} and the kernel {path!r} of shape "
                    f"{shape}."
                )
        factors[torch.index] = to_factors(kind, arrays, (d, k), r, experts)
    out: dict[str, Any] = {}
    for name in ("U", "V", "m") if config.dora else ("U", "V"):
        stacked = np.stack([factors[index][name] for index in sorted(factors)])
        one = stacked.shape[len(stacked.shape) - (1 if name == "m" else 2) :]
        # As lora_init has them: a magnitude is as exact as the norm that it is divided by.
        kernel = jnp.result_type(model.leaves[path].dtype)  # float32, unless jax_enable_x64
        dtype = float32_or_more(kernel) if name == "m" else jnp.float32
        out[name] = jnp.asarray(stacked.reshape(*stack, *one), dtype)
    return Adapter(
        **out,
        variant="dora" if config.dora else "lora",
        rank=r,
        alpha=alpha,
        rslora=config.rslora,
        # PEFT has none for embeddings, whatever the config says.
        dropout=0.0 if kind == "embedding" else config.dropout,
        detach_norm=config.dora,
        axes=axes,
        untied=model.untied(path, kind),
    )


def to_shift(path: str, found: Stack, files: PeftFiles, model: TorchParams) -> LoraBias:
    """``s (B A x + b)`` is the layer's own bias with ``s b`` added."""
    scales = {files.scale(torch.module) for torch in model.torch(path)}
    if len(scales) > 1:
        raise ValueError(
            f"{files.tensors.path}: the biases that {path!r} holds in one have different scales: "
            f"{sorted(scales)}."
        )
    value = jnp.asarray(model.to_leaf(path, found, files.tensors.path), jnp.float32)
    return LoraBias(value, scales.pop())


def _lookup(name: str, tensors: Tensors | Checkpoint, model: TorchParams) -> Torch:
    if name not in model.by_name:
        near = ", ".join(nearest_paths(name, model.by_name)) or "none"
        raise ValueError(
            f"{tensors.path} has something for {name!r}, but names gives no parameter of this "
            f"model that name. Nearest: {near}."
        )
    return model.by_name[name]


def _check_same(torch: Torch, array: np.ndarray, model: TorchParams, where: str) -> None:
    """Errors where PEFT saved the weight below an adapter, and it is not the one in params."""
    ours = model.from_leaf(torch)
    if array.shape != ours.shape or not np.array_equal(array.astype(ours.dtype), ours):
        raise ValueError(
            f"{where} is the base that the adapter was trained on, and another one than params has "
            f"at {torch.path!r}. Put it into params first."
        )
