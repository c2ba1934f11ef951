"""PEFT's tensors as the nodes of an adapter tree: ``U = A^T``, ``V = B^T``, and ``m``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.core._adapter import Adapter
from lora_jax.core._fully_trained import FullyTrained
from lora_jax.core._numerics import float32_or_more
from lora_jax.core.variants._dora import DoRA
from lora_jax.core.variants._lora import LoRA
from lora_jax.files._tensors import is_floating
from lora_jax.peft._folder import PeftFiles
from lora_jax.peft._lora_bias import LoraBias
from lora_jax.peft._sort_tensors import Part, SortedTensors, Stack
from lora_jax.peft.names._key_mapping import EXPERTS
from lora_jax.peft.names._targets import target_of
from lora_jax.peft.torch._arrays import to_leaf
from lora_jax.peft.torch._layout import factor_shapes, to_factors
from lora_jax.peft.torch._torch_model import TorchModel


def to_nodes(found: SortedTensors, files: PeftFiles, model: TorchModel) -> dict[str, Any]:
    """The nodes of an adapter tree by their paths.

    Raises:
      ValueError: if a tensor does not fit, or kernels in one leaf have different ranks or scales.
    """
    nodes: dict[str, Any] = {}
    for path, parts in found.adapters.items():
        nodes[path] = _adapter(path, parts, files, model)
    for path, arrays in found.fully_trained.items():
        nodes[path] = _fully_trained(path, arrays, files, model)
    for path, arrays in found.biases.items():
        nodes[path] = _lora_bias(path, arrays, files, model)
    return nodes


def _adapter(path: str, parts: Sequence[Part], files: PeftFiles, model: TorchModel) -> Adapter:
    """``U``, ``V`` and ``m`` of every kernel in the stack."""
    axes, shape = model.axes(path), model.shape(path)
    if axes is None:
        raise ValueError(
            f"{path!r} is {shape}: which of its axes are inputs? Pass "
            "axes=lora_jax.kernel_axes(...)."
        )
    if axes.fused > 1:
        there = sorted({torch.index[-1] for torch, _ in parts})
        axes = dataclasses.replace(axes, parts=tuple(axes.parts[i] for i in there))
    config, kind = files.config, parts[0][0].kind
    r, alpha = _rank_and_alpha(path, parts, files)
    (d, k), stack = axes.matrix_shape(shape), axes.batch_shape(shape)
    experts = stack[-1] if kind in EXPERTS else 1
    expected = factor_shapes(kind, (d, k), r, model.window(path, kind), experts)
    factors = {}
    for torch, arrays in parts:
        for role, array in arrays.items():
            if array.shape != expected[role] or not is_floating(array):
                raise ValueError(
                    f"{files.tensors.path}: {role} of {target_of(torch)!r} is {array.dtype} "
                    f"{array.shape}, but should be {expected[role]} for rank {r} and the kernel "
                    f"{path!r} of shape {shape}."
                )
        factors[torch.index] = to_factors(kind, arrays, (d, k), r, experts)

    def stacked(name: str) -> np.ndarray:
        array = np.stack([factors[index][name] for index in sorted(factors)])
        one = array.shape[len(array.shape) - (1 if name == "m" else 2) :]
        return array.reshape(*stack, *one)

    m = None
    if config.dora:
        # As lora_init has them: a magnitude is as exact as the norm that it is divided by.
        kernel = jnp.result_type(model.leaves[path].dtype)  # float32, unless jax_enable_x64
        m = jnp.asarray(stacked("m"), float32_or_more(kernel))
    return Adapter(
        jnp.asarray(stacked("U"), jnp.float32),
        jnp.asarray(stacked("V"), jnp.float32),
        m,
        variant=DoRA(detach_norm=True) if config.dora else LoRA(),
        rank=r,
        alpha=alpha,
        rslora=config.rslora,
        # PEFT has none for embeddings, whatever the config says.
        dropout=0.0 if kind == "embedding" else config.dropout,
        axes=axes,
        untied=model.untied(path, kind),
    )


def _rank_and_alpha(path: str, parts: Sequence[Part], files: PeftFiles) -> tuple[int, float]:
    """What the config says of all kernels in a leaf."""
    config = files.config
    # PEFT looks for patterns by the name of the module, or of a parameter adapted by itself.
    targets = [t.name if config.targets_parameter(t.name) else t.module for t, _ in parts]
    facts = {(config.rank_of(target), config.alpha_of(target)) for target in targets}
    if len(facts) > 1:
        raise ValueError(
            f"{files.tensors.path}: the kernels that {path!r} holds in one have different ranks "
            f"and alphas: {sorted(facts)}."
        )
    return facts.pop()


def _fully_trained(path: str, arrays: Stack, files: PeftFiles, model: TorchModel) -> FullyTrained:
    """The leaf, with the dtype that the model has it in where that is another one."""
    value = to_leaf(model, path, arrays, files.tensors.path)
    dtype = jnp.dtype(model.leaves[path].dtype).name
    return FullyTrained(jnp.asarray(value), None if dtype == value.dtype.name else dtype)


def _lora_bias(path: str, arrays: Stack, files: PeftFiles, model: TorchModel) -> LoraBias:
    """``s (B A x + b)`` is the layer's own bias with ``s b`` added."""
    value = jnp.asarray(to_leaf(model, path, arrays, files.tensors.path), jnp.float32)
    scales = {files.config.scale_of(torch.module) for torch in model.torch(path)}
    if len(scales) > 1:
        raise ValueError(
            f"{files.tensors.path}: the biases that {path!r} holds in one have different scales: "
            f"{sorted(scales)}."
        )
    return LoraBias(value, scales.pop())
