"""Adapters to and from PEFT, the format of PyTorch's world.

PEFT's ``lora_A`` is ``U`` transposed, its ``lora_B`` is ``V`` transposed, its
``lora_magnitude_vector`` is ``m``, and its scale is not stored but follows from the config.

    frozen, adapters = lora_jax.peft.load("my-adapter", params, axes=axes)
    lora_jax.peft.save("my-adapter", frozen, adapters)
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter import Adapter, Shift, Whole
from lora_jax.axes import KernelAxes
from lora_jax.config import nearest, scale
from lora_jax.names import EXPERTS, FAMILIES, Name, Torch, as_names
from lora_jax.peft_config import CONFIG, DEFAULTS, PeftConfig, by_pattern, read_config
from lora_jax.store import host, leaves_of, whole_leaf
from lora_jax.tensors import StrPath, Tensors, encode, is_floating, write_bytes
from lora_jax.torch_layout import factor_shapes, from_factors, to_factors
from lora_jax.torch_params import TorchParams
from lora_jax.tree import check_fits, flatten, path_of, unbox, unflatten

__all__ = ["FAMILIES", "Name", "load", "save"]

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# How the name of a tensor of an adapter ends, behind the module's name.
_ROLES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
    "lora_B.bias": "bias",
}
_NAMES = {
    False: {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"},
    True: {"A": "lora_embedding_A", "B": "lora_embedding_B", "m": "lora_magnitude_vector"},
}

# Copies of modules that are saved whole.
_COPY = re.compile(r"\.(original_module|modules_to_save)(?=\.)")


def load(
    path: StrPath,
    params: chex.ArrayTree,
    *,
    names: str | Sequence[Name | tuple[Any, ...]] = "transformers",
    axes: Mapping[str, KernelAxes] | None = None,
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """Loads an adapter that PEFT saved: as :func:`lora_jax.lora_init`, with trained adapters.

    Whatever the folder says is used or refused. Factors and magnitudes become float32, as PEFT
    makes them. DoRA's norm is detached in the gradient, as in PEFT. The biases of ``B``
    (``lora_bias``) are each a :class:`lora_jax.Shift` of the layer's own bias.

    Args:
      path: the folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
      params: the model's ``params`` collection.
      names: a family of :data:`FAMILIES`, or a list of :class:`Name` (or of tuples of its fields),
        of which the first that fits a path counts. Of kernels that lie side by side in one
        (``{q|k|v}``) those are adapted that the files have.
      axes: from :func:`lora_jax.kernel_axes`; needed for kernels that are no matrices, for what is
        stacked, for embeddings that are saved whole, and to merge adapters of embeddings.

    Returns:
      ``(frozen, adapters)``; modules that PEFT saved whole, and trained biases, are only in
      ``adapters``.

    Raises:
      FileNotFoundError: there is no such adapter.
      ValueError: files that are damaged, do not fit the model, or hold what has no equal here. The
        message names the file and the key.
    """
    files = read(path)
    frozen = flatten(params, "params")
    keys = {path_of(key): key for key in frozen}
    model = TorchParams({p: frozen[key] for p, key in keys.items()}, as_names(names), axes)
    parts, whole, shifts = _sorted(files, model)
    _check_complete(files, model, parts, whole, shifts)

    adapters: dict[Any, Any] = {}
    for leaf_path, ones in parts.items():
        adapter = _to_adapter(leaf_path, ones, files, model)
        check_fits(leaf_path, frozen[keys[leaf_path]], adapter)
        adapters[keys[leaf_path]] = adapter
    for leaf_path, arrays in whole.items():
        value = model.to_leaf(leaf_path, arrays, files.tensors.path)
        leaf = frozen.pop(keys[leaf_path])
        dtype = jnp.dtype(unbox(leaf).dtype).name
        node = value if dtype == value.dtype.name else Whole(value, dtype)
        adapters[keys[leaf_path]] = whole_leaf(leaf_path, node, leaf, str(path))
    for leaf_path, found in shifts.items():
        adapters[keys[leaf_path]] = _to_shift(leaf_path, found, files, model)
    return unflatten(frozen, params), unflatten(adapters, params)


def save(
    path: StrPath,
    frozen: chex.ArrayTree,
    adapters: chex.ArrayTree,
    *,
    names: str | Sequence[Name | tuple[Any, ...]] = "transformers",
    axes: Mapping[str, KernelAxes] | None = None,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    dtype: Any = None,
) -> None:
    """Saves adapters so that ``PeftModel.from_pretrained`` loads them.

    What has no equal in PEFT is refused: LoRA and DoRA in one adapter, or rsLoRA and plain LoRA;
    different dropouts; parts of a module that are trained whole; a :class:`lora_jax.Shift` of
    anything but the biases of all adapted layers. How this library computes an
    adapter (``product``, ``detach_norm``) changes no result and is not saved.

    Args:
      path: the folder; it is made where there is none. Other files in it stay.
      frozen: the base.
      adapters: the adapters, trained.
      names: as for :func:`load`.
      axes: as for :func:`load`; needed for convolutions and embeddings, where PEFT may compute
        something else than the model, and where leaves that are trained whole are stacked.
      base_model_name_or_path: the base in PyTorch, which PEFT's readers look up.
      task_type: one of PEFT's, such as ``"SEQ_CLS"``.
      dtype: of the saved arrays; by default the one that they have.

    Raises:
      ValueError: adapters that do not fit the base, that are not finite, or that have no equal in
        PEFT; parameters that no name is for.
    """
    base, found = leaves_of(frozen, "frozen"), leaves_of(adapters, "adapters")
    kernels = {p: node for p, node in found.items() if isinstance(node, Adapter)}
    if not kernels:
        raise ValueError("adapters has no adapter of a kernel, and PEFT saves nothing else.")
    for leaf_path, adapter in kernels.items():
        if leaf_path not in base:
            raise ValueError(f"There is an adapter for {leaf_path!r}, which frozen lacks.")
        check_fits(leaf_path, base[leaf_path], adapter)
    shifts = {p: node for p, node in found.items() if isinstance(node, Shift)}
    for leaf_path, shift in shifts.items():
        if leaf_path not in base:
            raise ValueError(f"Something is added to {leaf_path!r}, which frozen lacks.")
        check_fits(leaf_path, base[leaf_path], shift)
    whole = [p for p in found if p not in kernels and p not in shifts]
    flat = base | {p: getattr(found[p], "value", found[p]) for p in whole}
    own = {p: adapter.axes for p, adapter in kernels.items()}
    model = TorchParams(flat, as_names(names), axes, own)

    tensors: dict[str, np.ndarray] = {}
    modules: dict[str, Adapter] = {}
    torches: dict[Torch, tuple[int, ...]] = {}  # with their index in the adapter's arrays
    for leaf_path, adapter in kernels.items():
        for torch, index in model.adapted(leaf_path, adapter.axes).items():
            _check_equal(torch, model, adapter.untied, str(path))
            if _target(torch) in modules or not (
                torch.kind in EXPERTS or torch.name.endswith(".weight")
            ):
                raise ValueError(
                    f"names gives {leaf_path!r} the name {torch.name!r}, which another kernel has "
                    f"too, or which does not end in '.weight': PEFT adapts modules by weights."
                )
            modules[_target(torch)] = adapter
            torches[torch] = index
    nested = _nested(torch for torch in torches if torch.kind in EXPERTS)
    keys = {torch: key for key, torch in nested.items()}
    for torch, index in torches.items():
        adapter, window = kernels[torch.path], model.window(torch.path, torch.kind)
        for name, array in _from_adapter(adapter, torch, index, window).items():
            tensors[f"{PREFIX}{keys.get(torch, torch.module)}.{name}"] = array
    for torch in _biases_of_B(shifts, model, modules):
        name = f"{PREFIX}{torch.module}.lora_B.bias"
        tensors[name] = model.from_leaf(torch, shifts[torch.path].value)
    saved, bias = _whole_modules(model, whole, modules)
    to_save = _modules_to_save(model, {} if bias == "all" else saved, modules, task_type)
    for torch in saved.values():
        _check_equal(torch, model, None, str(path))
        layer = ".base_layer" if bias != "none" and torch.module in modules else ""
        array = model.from_leaf(torch)
        tensors[f"{PREFIX}{torch.module}{layer}.{torch.name.rpartition('.')[2]}"] = array
    if dtype is not None:
        tensors = {name: array.astype(jnp.dtype(dtype)) for name, array in tensors.items()}
    config = _config(modules, list(torches)) | {
        "base_model_name_or_path": base_model_name_or_path,
        "task_type": task_type,
        "bias": bias,
        "lora_bias": bool(shifts),
        "modules_to_save": to_save or None,
        "exclude_modules": _excluded(model, modules) or None,
    }
    said = json.dumps({**DEFAULTS, **config}, indent=2, sort_keys=True, allow_nan=False).encode()
    content = encode(tensors, {"format": "pt"})
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / CONFIG
    # There are two files, so that no one ever reads one of the old and one of the new: until the
    # second is there, the folder has no config, unless it stays the same.
    if file.exists() and file.read_bytes() != said:
        file.unlink()
    write_bytes(folder / WEIGHTS, content)
    write_bytes(file, said)


@dataclasses.dataclass(frozen=True)
class PeftFiles:
    """What a folder holds, by PyTorch's names and without a model.

    Attributes:
      config: what the config says.
      tensors: the file of arrays.
      modules: for each adapted module the keys of its tensors by ``"A"``, ``"B"``, ``"m"`` and
        ``"bias"``.
      whole: for each parameter that is saved whole its key.
    """

    config: PeftConfig
    tensors: Tensors
    modules: Mapping[str, Mapping[str, str]]
    whole: Mapping[str, str]

    def scale(self, module: str) -> float:
        """``s`` of a module."""
        config = self.config
        return scale(config.rank_of(module), config.alpha_of(module), config.rslora)


def read(path: StrPath) -> PeftFiles:
    """Reads the config and the names of a folder, and checks that they fit each other.

    Raises:
      FileNotFoundError: there is no such adapter.
      ValueError: files that are damaged, or hold what has no equal here.
    """
    folder = Path(path)
    config = read_config(folder)
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise ValueError(
            f"{folder} has its weights as a pickle, adapter_model.bin, which can run any code: "
            f"convert it with PEFT's save_pretrained(..., safe_serialization=True)."
        )
    tensors = Tensors(folder / WEIGHTS)
    modules: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for key in tensors:
        if not key.startswith(PREFIX):
            raise ValueError(f"{tensors.path}: {key!r} does not begin with {PREFIX!r}.")
        name = key.removeprefix(PREFIX)
        plain = _COPY.sub("", name) if config.modules_to_save else name
        if plain != name:  # a copy, which PEFT writes beside with bias="all"
            other = PREFIX + plain
            same = other in tensors and np.array_equal(tensors[key], tensors[other])
            if not same and ".original_module." not in name:
                raise ValueError(f"{tensors.path}: {key!r} is no copy of {other!r}.")
            continue
        end = next((end for end in _ROLES if name.endswith(f".{end}")), None)
        if end is None:
            if re.search(r"\.lora_(A|B|embedding_A|embedding_B)\.", name):
                raise ValueError(
                    f"{tensors.path}: {key!r} has the adapter's name in it: save it with PEFT's "
                    f"save_pretrained."
                )
            whole[name] = key
        elif (
            modules.setdefault(name.removesuffix(f".{end}"), {}).setdefault(_ROLES[end], key) != key
        ):
            raise ValueError(f"{tensors.path}: {key!r} is there in two forms.")
    needed = {"A", "B", *(("m",) if config.dora else ()), *(("bias",) if config.lora_bias else ())}
    for module, roles in modules.items():
        # Embeddings have no bias, whatever the config says.
        lacks = needed - set(roles) - ({"bias"} if "embedding" in roles.get("A", "") else set())
        if lacks or set(roles) - needed:
            raise ValueError(
                f"{tensors.path}: {module!r} has {', '.join(sorted(roles))}, but by {CONFIG} it "
                f"should have {', '.join(sorted(needed))}."
                + (" Were the magnitudes of DoRA dropped?" if lacks == {"m"} else "")
            )
    for name, key in whole.items():
        biases = config.bias != "none" and name.endswith(".bias")
        # PEFT also saves weights that it does not train, such as embeddings of a new size.
        if not (biases or config.saves(name) or name.endswith(".weight")):
            raise ValueError(
                f"{tensors.path}: {key!r} is neither of an adapter nor of modules_to_save in "
                f"{CONFIG}."
            )
    return PeftFiles(config, tensors, modules, whole)


# Arrays of a module by their role, with the PyTorch parameter that they adapt.
_Part = tuple[Torch, dict[str, np.ndarray]]
# Arrays of one leaf, by their index in the stack.
_Stack = dict[tuple[int, ...], np.ndarray]


def _sorted(
    files: PeftFiles, model: TorchParams
) -> tuple[dict[str, list[_Part]], dict[str, _Stack], dict[str, _Stack]]:
    """The tensors by path: of adapters, of leaves that are trained whole, of biases of ``B``."""
    tensors = files.tensors
    parts: dict[str, list[_Part]] = {}
    whole: dict[str, _Stack] = {}
    shifts: dict[str, _Stack] = {}
    alone = [t for name, t in model.by_name.items() if files.config.targets_parameter(name)]
    nested = _nested(alone)
    for module, keys in files.modules.items():
        if module not in nested and ".base_layer." in f"{module}.":
            raise ValueError(
                f"{tensors.path} has {module!r}: an adapter below another one, as PEFT makes them "
                f"for nn.MultiheadAttention, has no equal here."
            )
        torch = nested.get(module) or _lookup(f"{module}.weight", tensors, model)
        _check_equal(torch, model, True, str(tensors.path))
        embedding = keys["A"].endswith("_embedding_A")
        if torch.kind == "plain" or embedding != (torch.kind == "embedding"):
            raise ValueError(
                f"{tensors.path} has {keys['A']!r}, but names says that it is {torch.kind}: "
                f"{torch.path!r}."
            )
        arrays = {role: tensors[key] for role, key in keys.items()}
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
        if plain.endswith(".weight") and (name != plain or not files.config.saves(plain)):
            _check_same(torch, tensors[key], model, f"{tensors.path}: {key!r}")
            continue
        _check_equal(torch, model, None, f"{tensors.path}: {key!r}")
        if torch.index in whole.setdefault(torch.path, {}):
            raise ValueError(f"{tensors.path}: {key!r} is there in two forms.")
        whole[torch.path][torch.index] = tensors[key]
    return parts, whole, shifts


def _target(torch: Torch) -> str:
    """What PEFT calls the target: a module, or a parameter that is adapted by itself."""
    return torch.name if torch.kind in EXPERTS else torch.module


def _check_equal(torch: Torch, model: TorchParams, untied: bool | None, where: str) -> None:
    """Errors where PEFT would compute something else.

    Args:
      torch: what is adapted, or trained whole.
      model: the parameters.
      untied: whether the adapter is for one use only; ``None`` for what is trained whole.
      where: the file.
    """
    axes, path = model.model_axes, torch.path
    if torch.kind == "unused":
        raise ValueError(
            f"{where}: PyTorch's {torch.name!r} is not where the model computes with {path!r}, so "
            f"that in PEFT the same adapter, or a saved copy, would do something else."
        )
    if axes is None and (torch.kind == "conv" or (torch.kind == "embedding" and not untied)):
        raise ValueError(
            f"{where}: whether PEFT computes with {torch.name!r} as Flax with {path!r} depends on "
            f"the model (dilation, padding, groups; other uses of an embedding): pass "
            f"axes=lora_jax.kernel_axes(...)."
        )
    if axes is None:
        return
    reason = axes.unlike.get(path)
    if reason and (untied is not None or "transposed" in reason):
        raise ValueError(f"{where}: {path!r} has no equal in PEFT: {reason}.")
    several = path in axes.tied or path in axes.shared
    if torch.kind == "embedding" and several and not untied:
        raise ValueError(
            f"{where}: the model uses {path!r} several times. In PEFT only its lookup would be "
            f"{'trained' if untied is None else 'adapted'}, and the other uses keep the base."
            + ("" if untied is None else " Adapt it with tied='untie'.")
        )
    if untied is None and "BatchNorm" in axes.layers.get(path, ""):
        raise ValueError(
            f"{where}: {path!r} is of a BatchNorm, whose running statistics PEFT saves too, and "
            f"which are not parameters here."
        )


def _nested(torches: Iterable[Torch]) -> dict[str, Torch]:
    """Parameters that are adapted by themselves, by the modules that PEFT has for them.

    It wraps the module once for each of its parameters, in their order, the first innermost.
    """
    modules: dict[str, list[Torch]] = {}
    for torch in torches:
        modules.setdefault(torch.module, []).append(torch)
    return {
        module + ".base_layer" * depth: torch
        for module, ones in modules.items()
        for depth, torch in enumerate(sorted(ones, key=lambda t: t.order, reverse=True))
    }


def _lookup(name: str, tensors: Tensors, model: TorchParams) -> Torch:
    if name not in model.by_name:
        near = ", ".join(nearest(name, model.by_name)) or "none"
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


def _check_complete(
    files: PeftFiles,
    model: TorchParams,
    parts: Mapping[str, list[_Part]],
    whole: Mapping[str, _Stack],
    shifts: Mapping[str, _Stack],
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


def _to_adapter(path: str, found: list[_Part], files: PeftFiles, model: TorchParams) -> Adapter:
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
    (d, k), stack = axes.matrix_shape(shape), axes.stack_shape(shape)
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
                    f"{file}: {role} of {_target(torch)!r} is {array.dtype} {array.shape}, but "
                    f"should be {expected[role]} for rank {r} and the kernel {path!r} of shape "
                    f"{shape}."
                )
        factors[torch.index] = to_factors(kind, arrays, (d, k), r, experts)
    out: dict[str, Any] = {}
    for name in ("U", "V", "m") if config.dora else ("U", "V"):
        stacked = np.stack([factors[index][name] for index in sorted(factors)])
        one = stacked.shape[len(stacked.shape) - (1 if name == "m" else 2) :]
        out[name] = jnp.asarray(stacked.reshape(*stack, *one), jnp.float32)
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


def _to_shift(path: str, found: _Stack, files: PeftFiles, model: TorchParams) -> Shift:
    """``s (B A x + b)`` is the layer's own bias with ``s b`` added."""
    scales = {files.scale(torch.module) for torch in model.torch(path)}
    if len(scales) > 1:
        raise ValueError(
            f"{files.tensors.path}: the biases that {path!r} holds in one have different scales: "
            f"{sorted(scales)}."
        )
    value = jnp.asarray(model.to_leaf(path, found, files.tensors.path), jnp.float32)
    return Shift(value, scales.pop())


def _biases_of_B(
    shifts: Mapping[str, Shift], model: TorchParams, adapted: Mapping[str, Adapter]
) -> list[Torch]:
    """The biases of adapted modules to which something is added: of all of them, or of none."""
    torches = [torch for path in shifts for torch in model.torch(path)]
    for torch in torches:
        adapter = adapted.get(torch.module)
        if adapter is None or not torch.name.endswith(".bias"):
            raise ValueError(
                f"Something is added to {torch.path!r}, which PEFT has for biases of adapted "
                f"layers only (lora_bias)."
            )
        if adapter.variant != "lora":
            raise ValueError(f"PEFT has no DoRA with lora_bias, as at {torch.path!r}.")
        if adapter.scale != shifts[torch.path].scale:
            raise ValueError(
                f"{torch.path!r} has something added with the scale {shifts[torch.path].scale}, "
                f"and its layer is adapted with {adapter.scale}: PEFT has one for both."
            )
    if torches and (lacking := sorted(set(adapted) - {torch.module for torch in torches})):
        raise ValueError(
            f"PEFT's lora_bias is for all adapted modules or for none, and nothing is added to a "
            f"bias of {lacking[0]!r}."
        )
    return torches


def _from_adapter(
    adapter: Adapter, torch: Torch, index: tuple[int, ...], window: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """The inverse of :func:`_to_adapter`, for one kernel of the stack."""
    path = torch.path
    if torch.kind == "plain":
        raise ValueError(f"{path!r} has an adapter, but names says that it is plain.")
    if torch.kind == "embedding" and adapter.substitute:
        raise ValueError(
            f"{path!r} is an embedding whose W' all uses see (substitute); in PEFT only the lookup "
            f"does. Adapt it with tied='untie'."
        )
    if torch.kind in EXPERTS and (adapter.m is not None or adapter.dropout):
        raise ValueError(f"{path!r} holds experts, for which PEFT has neither DoRA nor dropout.")
    U, V = (host(getattr(adapter, n), f"{path}.{n}")[index] for n in ("U", "V"))
    m = None if adapter.m is None else host(adapter.m, f"{path}.m")[index]
    arrays = from_factors(torch.kind, U, V, m, window)
    return {_NAMES[torch.kind == "embedding"][role]: array for role, array in arrays.items()}


def _whole_modules(
    model: TorchParams, paths: Sequence[str], adapted: Mapping[str, Adapter]
) -> tuple[dict[str, Torch], str]:
    """What is trained whole, by PyTorch's names, and which value of ``bias`` says so."""
    saved = {torch.name: torch for path in paths for torch in model.complete(path)}
    biases = {n: t for n, t in saved.items() if t.module in adapted}
    for name in biases:
        if not name.endswith(".bias"):
            raise ValueError(f"{name!r} is trained whole beside an adapter, which PEFT has not.")
    all_biases = {name for name in model.by_name if name.endswith(".bias")} if saved else set()
    if saved and set(saved) == all_biases and len(biases) < len(saved):
        return saved, "all"
    in_module = {torch.module for torch in saved.values()} - set(adapted)
    for name, torch in model.by_name.items() if saved else ():
        if torch.module in in_module and name not in saved:
            raise ValueError(
                f"Of the module {torch.module!r} a part is trained whole, and {torch.path!r} is "
                f"not: PEFT saves modules whole or not at all."
            )
        if biases and torch.module in adapted and name.endswith(".bias") and name not in saved:
            raise ValueError(
                f"Some biases of adapted modules are trained whole, and {torch.path!r} is not: "
                f"PEFT trains all of them or none."
            )
    return saved, "lora_only" if biases else "none"


_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def _modules_to_save(
    model: TorchParams,
    saved: Mapping[str, Torch],
    adapted: Mapping[str, Adapter],
    task_type: str | None,
) -> list[str]:
    """PEFT's list of modules that are trained whole, which names no other module.

    PEFT compares ends of names, takes a module with all that is in it, and adds the head of a task.
    """
    modules = {torch.module for torch in saved.values()} - set(adapted)
    if "" in modules:
        raise ValueError("PEFT cannot save a parameter that is in no module.")
    heads = _HEADS.get(task_type or "", ())

    def up(module: str) -> str:
        parts = module.split(".")
        above = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return next((m for m in above if m in modules or m.endswith(heads or ("\0",))), module)

    out = sorted({up(module) for module in modules})
    if not (out or heads):
        return out
    rule = PeftConfig(1, 1.0, modules_to_save=(*out, *heads))
    for name, torch in model.by_name.items():
        if name not in saved and rule.saves(name):
            raise ValueError(
                f"PEFT would train {name!r} whole too, as its name ends like one of "
                f"{[*out, *heads]}: train {torch.path!r} whole"
                + (", or leave out task_type." if heads else ".")
            )
    return out


def _excluded(model: TorchParams, adapted: Mapping[str, Adapter]) -> list[str]:
    """Modules that are not adapted, and whose names end like those that are."""
    rule = PeftConfig(1, 1.0, target_modules=tuple(adapted))
    out = sorted(m for m in model.modules() - set(adapted) if rule.targets(m))
    no = PeftConfig(1, 1.0, target_modules=tuple(out))
    for module in adapted:
        if no.targets(module):
            raise ValueError(
                f"PEFT cannot adapt {module!r} and leave {out} as they are, by ends of names."
            )
    return out


def _config(modules: Mapping[str, Adapter], torches: Sequence[Torch]) -> dict[str, Any]:
    """The config of adapters by module, or by parameter."""
    kinds = {torch.kind for torch in torches}
    parameters = sorted(torch.name for torch in torches if torch.kind in EXPERTS)
    same: dict[str, Any] = {}
    for name, what in (("variant", "LoRA and DoRA"), ("rslora", "rsLoRA and plain LoRA")):
        values = {getattr(adapter, name) for adapter in modules.values()}
        if len(values) > 1:
            raise ValueError(f"PEFT has no {what} in one adapter: save them as two.")
        same[name] = values.pop()
    embeddings = {torch.module for torch in torches if torch.kind == "embedding"}
    rates = {a.dropout for module, a in modules.items() if module not in embeddings}
    if any(modules[module].dropout for module in embeddings):
        raise ValueError("PEFT has no dropout for embeddings.")
    if len(rates) > 1:
        raise ValueError(f"PEFT has one dropout for all modules, and these have {sorted(rates)}.")
    rank, ranks = by_pattern({module: adapter.rank for module, adapter in modules.items()})
    alpha, alphas = by_pattern({module: _number(a.alpha) for module, a in modules.items()})
    return {
        "r": rank,
        "rank_pattern": ranks,
        "lora_alpha": alpha,
        "alpha_pattern": alphas,
        "use_dora": same["variant"] == "dora",
        "use_rslora": same["rslora"],
        "lora_dropout": max(rates, default=0.0),
        "fan_in_fan_out": "conv1d" in kinds,
        "target_modules": sorted(set(modules) - set(parameters)),
        "target_parameters": parameters or None,
    }


def _number(x: float) -> float:
    """As an integer where it is one, as PEFT writes it."""
    return int(x) if float(x).is_integer() else float(x)
