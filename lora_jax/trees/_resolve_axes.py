"""Which axes a matched kernel has: what its rule says, what the model says, or a plain matrix."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from lora_jax.core._axes import KernelAxes
from lora_jax.core._model_axes import ModelAxes
from lora_jax.core.rules._rule import Rule

_UNREAD = (
    "on which the result of the call of kernel_axes does not depend: it would not be trained. Call "
    "kernel_axes with arguments that use it, or make the pattern narrower."
)


def resolve_axes(
    leaves: Mapping[str, Any], rules: Mapping[str, Rule], axes: Mapping[str, KernelAxes] | None
) -> tuple[dict[str, Rule], dict[str, KernelAxes]]:
    """The axes of every matched kernel, and its rule, in which ``tied`` is carried out.

    Args:
      leaves: every leaf by its path.
      rules: the rule of each matched path.
      axes: from :func:`lora_jax.kernel_axes`, or any mapping; ``None`` without the model.

    Raises:
      ValueError: if a matched leaf is not a floating-point matrix, if the model uses it so that it
        cannot be adapted, or if a rank is above ``min(d, k)``. The message names all culprits of
        one kind.
    """
    resolved: dict[str, KernelAxes] = {}
    carried_out: dict[str, Rule] = {}
    _check_axes(leaves, axes)
    model = axes if isinstance(axes, ModelAxes) else None
    culprits: dict[str, list[str]] = {}
    for path, rule in rules.items():
        where, leaf = f"Rule({rule.pattern!r}) matches {path!r}", leaves[path]
        shape = tuple(getattr(leaf, "shape", ()))
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            dtype = getattr(leaf, "dtype", type(leaf).__name__)
            raise ValueError(
                f"{where}, which is not floating-point but {dtype}: make the pattern narrower; "
                f"where these are codes, dequantize the base first."
            )
        if 0 in shape:
            raise ValueError(
                f"{where}, of shape {shape}, in which there are no numbers: make the pattern "
                f"narrower."
            )
        if rule.tied is not None and model is None:
            raise ValueError(
                f"{where} and has tied={rule.tied!r}: which parameters are tied is known with "
                f"axes=lora_jax.kernel_axes(model, variables, *args) only. Pass it to lora_init."
            )
        if rule.tied == "materialize" and model is not None and path in model.tied:
            rule = dataclasses.replace(rule, materialize=True)
        carried_out[path] = rule
        found = _axes_of(path, shape, rule, axes, model, where)
        if isinstance(found, str):
            culprits.setdefault(found, []).append(f"{path!r} {shape}")
            continue
        d, k = found.matrix_shape(shape)
        if rule.rank > min(d, k) and {"U", "V"} <= set(rule.as_variant().names()):
            each = f" of each of the {rule.fused} fused kernels" if rule.fused > 1 else ""
            raise ValueError(
                f"{where}, of shape {shape}: rank {rule.rank} is above min(d, k) = {min(d, k)}"
                f"{each}. Give it a rule with a lower rank before this one, or narrow the pattern."
            )
        resolved[path] = dataclasses.replace(found, alone=None if model is None else model.call)
    if culprits:
        problem, paths = next(iter(culprits.items()))
        more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
        raise ValueError(f"{problem.replace('LEAVES', ', '.join(paths[:5]) + more)}")
    return carried_out, resolved


def _check_axes(leaves: Mapping[str, Any], axes: object) -> None:
    """Raises an error if ``axes`` is not what kernel_axes returns, or of another model."""
    if axes is None:
        return
    if not isinstance(axes, Mapping) or not all(isinstance(a, KernelAxes) for a in axes.values()):
        raise TypeError(
            f"axes must be what lora_jax.kernel_axes returns, or a mapping of paths to KernelAxes; "
            f"got {type(axes).__name__}."
        )
    for path, one in axes.items():
        shape = getattr(leaves.get(path), "shape", None)
        if shape is None or len(shape) != one.ndim:
            there = "no such parameter" if shape is None else f"the shape {tuple(shape)}"
            raise ValueError(
                f"axes has {one.ndim} axes for {path!r}, but there is {there}. Is it of another "
                f"model? Paths are those of params, as 'encoder/query/kernel'."
            )


def _axes_of(
    path: str,
    shape: tuple[int, ...],
    rule: Rule,
    axes: Mapping[str, KernelAxes] | None,
    model: ModelAxes | None,
    where: str,
) -> KernelAxes | str:
    """The axes, or what is wrong, with ``LEAVES`` for all leaves with the same problem."""
    known = (axes or {}).get(path) if model is None else model.kernels.get(path)
    if known is not None and not rule.batch_axes and rule.input_axes is None:
        found: KernelAxes | str = known
    else:
        stacks = _in_range(rule.batch_axes, shape, f"{where}, of shape {shape}", "batch_axes")
        stacks = stacks or (() if model is None else model.batch.get(path, ()))
        found = _stated(rule, shape, stacks, where, axes is not None)
    if model is not None:
        problem = _unread(path, rule, model) or _unadaptable(path, rule, model)
        if problem:
            return problem
    if isinstance(found, str):
        return found
    if rule.fused > 1:
        found = dataclasses.replace(found, fused=rule.fused, parts=rule.parts or ())
    k = math.prod(shape[axis] for axis in found.outputs)
    if k % found.fused:
        raise ValueError(f"{where}, whose {k} outputs are not {found.fused} kernels side by side.")
    return found


def _stated(
    rule: Rule, shape: tuple[int, ...], stacks: tuple[int, ...], where: str, has_axes: bool
) -> KernelAxes | str:
    """The axes that the rule states, or a plain matrix."""
    left = [axis for axis in range(len(shape)) if axis not in stacks]
    if rule.input_axes is not None:
        inputs = _in_range(rule.input_axes, shape, f"{where}, of shape {shape}", "input_axes")
        if set(inputs) & set(stacks):
            raise ValueError(f"{where}: axes {inputs} are both in input_axes and stacks.")
    else:
        inputs = tuple(left[:1])
    outputs = tuple(axis for axis in left if axis not in inputs)
    if not inputs or not outputs or (rule.input_axes is None and len(left) != 2):
        find = (
            "Say"
            if has_axes
            else "Find the axes with axes = lora_jax.kernel_axes(model, variables, *args) and pass "
            "lora_init(..., axes=axes), or say"
        )
        return (
            f"Rule({rule.pattern!r}) matches what is not a matrix (d, k): LEAVES. {find} "
            f"input_axes and batch_axes in the rule; and where a leaf is not a kernel at all, such "
            f"as a bias or a scale, make the pattern narrower."
        )
    return KernelAxes(inputs, outputs, stacks)


def _in_range(
    axes: tuple[int, ...], shape: tuple[int, ...], where: str, name: str
) -> tuple[int, ...]:
    """The axes counted from 0."""
    in_range = all(-len(shape) <= axis < len(shape) for axis in axes)
    positive = tuple(axis % len(shape) for axis in axes) if in_range else ()
    if len(set(positive)) < len(axes):
        raise ValueError(f"{where}, which has no {name}={axes}.")
    return positive


def _unread(path: str, rule: Rule, model: ModelAxes) -> str | None:
    """That nobody reads the parameter."""
    if path in model.read or (path in model.layers and not rule.materialize):
        return None
    return f"Rule({rule.pattern!r}) matches LEAVES, {_UNREAD}"


def check_read(trainable: Iterable[str], axes: object) -> None:
    """Raises ValueError if a leaf that is to be fully trained is read by nobody."""
    for path in sorted(trainable):
        if isinstance(axes, ModelAxes) and path not in axes.read:
            raise ValueError(f"A trainable pattern matches {path!r}, {_UNREAD}")


def _unadaptable(path: str, rule: Rule, model: ModelAxes) -> str | None:
    """Why the layer of a parameter cannot be adapted."""
    if rule.materialize:
        return None
    matches = f"Rule({rule.pattern!r}) matches LEAVES"
    if path in model.refused:
        return (
            f"{matches}, which cannot be adapted in the layer: {model.refused[path]}. "
            f"Give it a rule with materialize=True."
        )
    if path in model.tied and rule.tied is None:
        return (
            f"{matches}, which the model also reads outside of the layer, as tied "
            f"embeddings are: an adapter in the layer would change one use only. Say in the rule "
            f"tied='materialize', so that all uses see W', or tied='untie'."
        )
    if path in model:
        return None
    if path not in model.layers:
        return (
            f"{matches}, which the model reads, but not as a parameter of a module "
            f"that it calls. Give it a rule with materialize=True, or make the pattern narrower."
        )
    return (
        f"{matches}, which is not a kernel of a layer that is known here: it belongs to "
        f"{model.layers[path]}. Register a handler for it with lora_jax.register, give it a rule "
        f"with materialize=True, or make the pattern narrower."
    )
