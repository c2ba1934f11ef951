"""Splits parameters into a frozen base and the adapters to train."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax.traverse_util import empty_node

from lora_jax._compat import is_module
from lora_jax.core._adapter import Adapter, base_at_start, init_adapter
from lora_jax.core._axes import KernelAxes
from lora_jax.core._boxes import content, is_quantized, rebox, unbox
from lora_jax.core._fully_trained import raise_precision
from lora_jax.core._model_axes import ModelAxes
from lora_jax.core.quantized._array import QuantizedArray, scale_of
from lora_jax.core.rules._config import LoraConfig, check_config
from lora_jax.core.rules._hints import key_comes_first, look_first
from lora_jax.core.rules._match_paths import assign
from lora_jax.core.rules._rule import Rule
from lora_jax.core.variants._dora import DoRA
from lora_jax.core.variants._lora import LoRA
from lora_jax.trees._base_hash import UNKNOWN, base_hash
from lora_jax.trees._leaves import is_finite
from lora_jax.trees._pair import base_of
from lora_jax.trees._paths import Key, path_of, unflatten, unflatten_adapters
from lora_jax.trees._resolve_axes import check_read, resolve_axes
from lora_jax.trees._rounding import key_for
from lora_jax.trees._shardings import follow
from lora_jax.trees._states import parameters_in


@look_first(key_comes_first("lora_init(key, params, config)"))
def lora_init(
    key: chex.PRNGKey,
    params: chex.ArrayTree,
    config: LoraConfig,
    *,
    axes: Mapping[str, KernelAxes] | None = None,
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """Splits parameters into a frozen base and the adapters to train.

    Together the two trees hold every leaf of ``params`` exactly once: an adapted kernel and all
    that is not trained is in ``frozen``, a fully trained leaf is only in ``adapters``. At the
    start the adapters change nothing.

    Args:
      key: a JAX random key. The start of an adapter depends on it and on the kernel's path only.
      params: the ``params`` collection of a Flax Linen model: nested dicts or a ``FrozenDict``, of
        arrays, which may be boxed (``nn.Partitioned``). Or the ``nnx.State`` of an NNX model: its
        ``nnx.Param`` are the parameters, and its other variables are left as they are.
      config: which leaves are adapted and how, and which are fully trained.
      axes: which axes of each kernel are inputs, outputs and stacks, from
        :func:`lora_jax.kernel_axes`; :func:`lora_jax.lora_init_model` finds them for you. Without
        it every matched leaf must be a matrix ``(d, k)``, but for what its rule says, and it is not
        checked here whether the model reads a leaf, and only in its layer, but by ``lora_apply``.

    Returns:
      ``(frozen, adapters)``, both nested like ``params``; for a state, a state and nested dicts.
      Where a kernel is adapted,
      ``adapters`` has an :class:`Adapter`, with ``U`` of shape ``(d, r)``, ``V`` of shape
      ``(r, k)`` and, for DoRA, ``m`` of shape ``(k,)``, in float32; ``m`` of a float64
      kernel is float64, as its norm is. They are where :func:`lora_jax.shardings` has them, if
      the kernel is on a mesh.

    Raises:
      TypeError: if ``params`` is not a nested dict of arrays, if arguments are in another order, or
        if a pattern is for a list in ``params``.
      ValueError: if a pattern matches nothing, a rule never wins, a matched leaf is not a
        floating-point matrix, a rank is above ``min(d, k)``, or a kernel is not finite. The message
        names the culprit.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lora_jax
      >>> model, x = nn.Dense(3), jnp.ones((2, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=2, variant="dora")])
      >>> frozen, adapters = lora_jax.lora_init(jax.random.key(1), params, config)
      >>> jax.tree.map(jnp.shape, (adapters["kernel"].U, adapters["kernel"].V))
      ((5, 2), (2, 3))
    """
    check_config(config)
    if is_module(params):
        raise TypeError(
            f"params must be parameters, got the model itself, {type(params).__name__}: of an NNX "
            f"model pass its state, graphdef, state = nnx.split(model), of a Linen model "
            f"variables['params']."
        )
    if not isinstance(params, Mapping) and hasattr(params, "params"):
        raise TypeError(
            f"params must be a nested dict of arrays, got {type(params).__name__}: pass its "
            f".params."
        )
    flat = base_of(params, "params")
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        raise TypeError(
            "params has jax.ShapeDtypeStruct for arrays. To see the adapters without computing "
            "them: jax.eval_shape(lambda params: lora_jax.lora_init(key, params, config), params)."
        )
    _check_lists(flat, config)
    _check_parameters(flat, config)
    arrays = {k: leaf for k, leaf in parameters_in(flat).items() if leaf is not empty_node}
    paths = {path_of(key_): key_ for key_ in arrays}
    rules, trainable = assign(config, list(paths), axes)
    if len(paths) < len(arrays):
        twice = next(path_of(k) for k in arrays if paths[path_of(k)] != k)
        raise ValueError(
            f"Two parameters have the path {twice!r}, as the name of one has a '/' in it; patterns "
            f"could not tell them apart."
        )
    if rules and not hasattr(key, "dtype"):
        raise TypeError(f"key must be a JAX random key, as jax.random.key(0), got {key!r}.")
    leaves = {path: content(arrays[key_]) for path, key_ in paths.items()}
    rules, resolved = resolve_axes(leaves, rules, axes)
    tied = axes.tied if isinstance(axes, ModelAxes) else frozenset()
    check_read(trainable, axes)

    frozen: dict[Key, Any] = dict(flat)
    adapters: dict[Key, Any] = {}
    for path, key_ in paths.items():
        if path in rules:
            adapter_key = key_for(key, path)
            untied = path in tied and not rules[path].materialize
            given = adapter_key, leaves[path], rules[path], resolved[path], untied
            if is_quantized(leaves[path]) and type(rules[path].as_variant()) in (LoRA, DoRA):
                kernel, adapter = scale_of(leaves[path]), _of_quantized(*given)
            else:
                kernel = jnp.asarray(unbox(leaves[path]))
                adapter = init_adapter(adapter_key, kernel, *given[2:])
            _check_finite(path, kernel, adapter)
            if adapter.changes_base and untied:
                raise ValueError(
                    f"{path!r} is tied, and its variant {adapter.kind!r} changes the base, which "
                    f"the other readers of the parameter would see too: tied='untie' is not "
                    f"possible. Give it a rule with tied='materialize'."
                )
            if adapter.changes_base and is_quantized(leaves[path]):
                raise ValueError(
                    f"{path!r} is quantized, and its variant {adapter.kind!r} changes the base, "
                    f"which codes cannot hold: make the adapters on the parameters in floats, or "
                    f"give it 'lora' or 'dora', which lora_jax.loftq starts near to them."
                )
            if adapter.changes_base:
                base = base_at_start(adapter, kernel)
                frozen[key_] = rebox(frozen[key_], follow(base, kernel))
                adapter = adapter.replace(base_hash=base_hash(base) or UNKNOWN)
            adapters[key_] = follow(adapter, frozen[key_])
        elif path in trainable:
            adapters[key_] = raise_precision(path, frozen.pop(key_))
    return unflatten(frozen, params), unflatten_adapters(adapters, params)


@functools.partial(jax.jit, static_argnames=("rule", "axes", "untied"))
def _of_quantized(
    key: chex.PRNGKey, leaf: QuantizedArray, rule: Rule, axes: KernelAxes, untied: bool
) -> Adapter:
    """The adapter of a quantized kernel, of which nothing of its size is made in floats."""
    return init_adapter(key, leaf.dequantize(), rule, axes, untied)


def _check_lists(flat: Mapping[Key, Any], config: LoraConfig) -> None:
    """Raises TypeError if a pattern is for a list of layers, or for something in it."""
    lists = [path_of(key) for key, leaf in flat.items() if type(leaf) in (list, tuple)]
    arrays = [path_of(key) for key in flat if path_of(key) not in lists]
    patterns = (*(rule.pattern for rule in config.rules), *config.trainable)
    for pattern in patterns if lists else ():
        fits = re.compile(pattern).fullmatch
        if any(map(fits, lists)) or not any(map(fits, arrays)):
            raise TypeError(
                f"params has a list at {lists[0]!r}, and {pattern!r} cannot reach into it: paths "
                f"go through dicts. Make dicts of lists, params = "
                f"flax.serialization.to_state_dict(params), where the path is "
                f"{lists[0] + '/0/...'!r}."
            )


def _check_parameters(flat: Mapping[Key, Any], config: LoraConfig) -> None:
    """Raises ValueError if a pattern is for statistics, caches or keys of a state only."""
    of_model = parameters_in(flat)
    parameters = [path_of(key) for key in of_model]
    others = {path_of(k): type(leaf).__name__ for k, leaf in flat.items() if k not in of_model}
    patterns = (*(rule.pattern for rule in config.rules), *config.trainable)
    for pattern in patterns if others else ():
        fits = re.compile(pattern).fullmatch
        found = next(filter(fits, others), None)
        if found is not None and not any(map(fits, parameters)):
            raise ValueError(
                f"{pattern!r} matches {found!r}, which is {others[found]}, and no "
                f"parameter: what is trained is an nnx.Param. Make another pattern."
            )


def _check_finite(path: str, kernel: chex.Array, adapter: Adapter) -> None:
    """Raises ValueError if a kernel, or an array that is made of it, has NaN or infinity."""
    if not is_finite(kernel):
        raise ValueError(
            f"The kernel {path!r} has NaN or infinite values: check how the checkpoint was loaded."
        )
    for name, array in adapter.arrays.items():
        if name not in ("U", "V") and not is_finite(array):
            raise ValueError(
                f"The adapter of the kernel {path!r} starts with NaN or infinite values in {name}, "
                f"as where column norms overflow: check how the checkpoint was loaded, and init() "
                f"of the variant if it is your own."
            )
