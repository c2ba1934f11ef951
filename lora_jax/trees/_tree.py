"""Pure functions over parameter trees: split into base and adapters, join, merge."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax.traverse_util import empty_node

from lora_jax.core._adapter import Adapter, FullyTrained, LoraBias, init_adapter
from lora_jax.core._axes import KernelAxes, ModelAxes
from lora_jax.core._config import LoraConfig, assign, check_config
from lora_jax.core._hints import key_comes_first, look_first
from lora_jax.trees._checks import (
    base_of,
    check_merges,
    check_trainable,
    is_finite,
    nodes_of,
    pair_of,
)
from lora_jax.trees._paths import Key, path_of, rebox, unbox, unflatten
from lora_jax.trees._resolve import check_read, resolve_axes
from lora_jax.trees._rounding import Rounding, RoundingReport, key_for, measure, round_to


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
      params: the ``params`` collection of a Flax model: nested dicts or a ``FrozenDict``, of
        arrays, which may be boxed (``nn.Partitioned``).
      config: which leaves are adapted and how, and which are fully trained.
      axes: which axes of each kernel are inputs, outputs and stacks, from
        :func:`lora_jax.kernel_axes`; :func:`lora_jax.lora_init_model` finds them for you. Without
        it every matched leaf must be a matrix ``(d, k)``, but for what its rule says, and it is not
        checked here whether the model reads a leaf, and only in its layer, but by ``lora_apply``.

    Returns:
      ``(frozen, adapters)``, both nested like ``params``. Where a kernel is adapted,
      ``adapters`` has an :class:`Adapter`, with ``U`` of shape ``(d, r)``, ``V`` of shape
      ``(r, k)`` and, for DoRA, ``m`` of shape ``(k,)``, in float32; ``m`` of a float64
        kernel is float64, as its norm is.

    Raises:
      TypeError: ``params`` is no nested dict of arrays, arguments in another order, or a pattern is
        for a list in ``params``.
      ValueError: a pattern that matches nothing, a rule that never wins, a matched leaf that is
        no floating-point matrix, a rank above ``min(d, k)``, a kernel that is not finite. The
        message names the culprit.

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
    arrays = {key_: leaf for key_, leaf in flat.items() if leaf is not empty_node}
    paths = {path_of(key_): key_ for key_ in arrays}
    rules, whole = assign(config, list(paths), axes)
    if len(paths) < len(arrays):
        twice = next(path_of(k) for k in arrays if paths[path_of(k)] != k)
        raise ValueError(
            f"Two parameters have the path {twice!r}, as the name of one has a '/' in it; patterns "
            f"could not tell them apart."
        )
    if rules and not hasattr(key, "dtype"):
        raise TypeError(f"key must be a JAX random key, as jax.random.key(0), got {key!r}.")
    leaves = {path: unbox(arrays[key_]) for path, key_ in paths.items()}
    rules, resolved = resolve_axes(leaves, rules, axes)
    tied = axes.tied if isinstance(axes, ModelAxes) else frozenset()
    check_read(whole, axes)

    frozen: dict[Key, Any] = dict(flat)
    adapters: dict[Key, Any] = {}
    for path, key_ in paths.items():
        if path in rules:
            adapter_key = key_for(key, path)
            kernel = jnp.asarray(leaves[path])
            untied = path in tied and not rules[path].materialize
            adapter = init_adapter(adapter_key, kernel, rules[path], resolved[path], untied)
            _check_finite(path, kernel, adapter.m)
            adapters[key_] = adapter
        elif path in whole:
            adapters[key_] = raise_precision(path, frozen.pop(key_))
    return unflatten(frozen, params), unflatten(adapters, params)


def lora_merge(
    frozen: chex.ArrayTree, adapters: chex.ArrayTree, *, key: chex.PRNGKey | None = None
) -> chex.ArrayTree:
    """Merges adapters into the base: plain parameters for the plain model.

    ``W'`` is formed in float32 by the formula of the variant and cast once, to the
    dtype of the kernel. Nothing is changed in place, so there is nothing to unmerge. It can be
    jitted and differentiated. In 16 bits small updates are rounded away:
    :func:`lora_jax.rounding` says how many.

    Args:
      frozen: the base, as :func:`lora_init` returned it.
      adapters: the adapters, trained.
      key: round stochastically, up or down, so that the mean of many entries is right; by default
        to the nearest.

    Returns:
      Parameters with the structure, shapes and dtypes that ``lora_init`` was given.

    Raises:
      TypeError: a tree that is no nested dict; adapters as a file has them, of arrays only.
      ValueError: adapters, or shifts, that do not fit this base; a base of integers, as the codes
        of a quantized one are; leaves that are in both trees.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=1)])
      >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}
      >>> frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config)
      >>> lora_jax.lora_merge(frozen, adapters)["kernel"]
      Array([[1., 1.],
             [1., 1.]], dtype=float32)
    """

    def merge(key_: Key, kernel: Any, adapter: Adapter | LoraBias) -> dict[Key, Any]:
        path = path_of(key_)
        check_merges(path, adapter)
        return {key_: merged_kernel(kernel, adapter, None if key is None else key_for(key, path))}

    return join(frozen, adapters, merge)


def rounding(
    frozen: chex.ArrayTree, adapters: chex.ArrayTree, *, key: chex.PRNGKey | None = None
) -> RoundingReport:
    """What :func:`lora_merge` loses by rounding, parameter by parameter.

    Args:
      frozen: the base.
      adapters: the adapters, trained.
      key: as for :func:`lora_merge`.

    Raises:
      TypeError, ValueError: as :func:`lora_merge`.

    Returns:
      A report that prints as a table. Only one merged kernel is in memory at a time.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=1)])
      >>> frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config)
      >>> adapters = jax.tree.map(lambda x: jnp.full_like(x, 0.03), adapters)
      >>> print(lora_jax.rounding(frozen, adapters))  # doctest: +ELLIPSIS
      path    dtype     largest error  mean error  vanished, %
      ------  --------  -------------  ----------  -----------
      kernel  bfloat16         0.0009      0.0009        100.0
      ------  --------  -------------  ----------  -----------
      Most of the update vanishes in 1 of 1 parameters: keep the adapters apart, merge ...
    """
    rows: dict[str, Rounding] = {}

    def look(key_: Key, kernel: Any, adapter: Adapter | LoraBias) -> dict[Key, Any]:
        path, W = path_of(key_), jnp.asarray(unbox(kernel))
        check_merges(path, adapter)
        exact = adapter.effective_kernel(W)
        own = None if key is None else key_for(key, path)
        rows[path] = measure(exact, round_to(exact, W.dtype, own), W)
        return {}

    join(frozen, adapters, look)
    for key_, node in nodes_of(adapters).items():
        if isinstance(node, FullyTrained):
            value = jnp.asarray(unbox(node.value))
            rows[path_of(key_)] = measure(value, value.astype(node.dtype), None)
    return RoundingReport(rows)


def merged_kernel(kernel: Any, adapter: Adapter | LoraBias, key: chex.PRNGKey | None = None) -> Any:
    """``W'`` in the dtype and the box of the kernel; of a shift, the leaf with it."""
    W = jnp.asarray(unbox(kernel))
    return rebox(kernel, round_to(adapter.effective_kernel(W), W.dtype, key))


def join(
    frozen: chex.ArrayTree,
    adapters: chex.ArrayTree,
    adapt: Callable[[Key, Any, Adapter | LoraBias], Mapping[Key, Any]],
    count: int | None = None,
    whole: Callable[[Key, Any, Any], Mapping[Key, Any]] | None = None,
) -> chex.ArrayTree:
    """Puts base and adapters together into one tree of parameters.

    Args:
      frozen: the base.
      adapters: the adapters.
      adapt: gives the leaves for an adapted kernel, or a shifted leaf, from its key, the leaf and
        the node of the adapters.
      count: how many adapters there are, where they are stacked.
      whole: gives the leaves for a stack of leaves that were fully trained, from their key, the
        base's own leaf, if there is one, and the node.

    Raises:
      TypeError: a tree that is no nested dict, a node that is neither adapter nor array.
      ValueError: adapters that do not fit this base.
    """
    flat, nodes = pair_of(frozen, adapters, count, either=whole is not None)
    for key, node in nodes.items():
        if isinstance(node, Adapter | LoraBias):
            flat |= adapt(key, flat[key], node)
        elif whole is not None:
            flat |= whole(key, flat.get(key), node)
        else:
            flat[key] = _lower_precision(node)
    return unflatten(flat, frozen)


def _check_lists(flat: Mapping[Key, Any], config: LoraConfig) -> None:
    """Errors where a pattern is for a list of layers, or for something in it."""
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


def _check_finite(path: str, *arrays: Any) -> None:
    """Errors where a kernel, or its norm, has NaN or infinity."""
    if not all(is_finite(array) for array in arrays if array is not None):
        raise ValueError(
            f"The kernel {path!r} has NaN or infinite values, or its column norms overflow: "
            f"check how the checkpoint was loaded."
        )


def raise_precision(path: str, leaf: Any) -> Any:
    """A leaf to train fully: at least float32, its own dtype kept in the structure.

    It is a copy, so that a train step may donate it and ``params`` stays whole.
    """
    check_trainable(path, leaf)
    dtype = jnp.dtype(unbox(leaf).dtype)
    if dtype.itemsize >= 4:
        return jax.tree.map(jnp.array, leaf)
    return FullyTrained(jax.tree.map(lambda x: jnp.array(x, jnp.float32), leaf), dtype.name)


def _lower_precision(node: Any) -> Any:
    """The inverse of :func:`raise_precision`."""
    if isinstance(node, FullyTrained):
        return jax.tree.map(lambda x: x.astype(node.dtype), node.value)
    return node
