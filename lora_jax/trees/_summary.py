"""What is trained and what is not, as a report: look at it before a long run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import empty_node

from lora_jax._compat import is_traced
from lora_jax.core._adapter import Adapter
from lora_jax.core._axes import KernelAxes
from lora_jax.core._boxes import content, is_quantized, unbox
from lora_jax.core._model_axes import ModelAxes
from lora_jax.core._node import Node
from lora_jax.core._numerics import column_norm
from lora_jax.core.rules._config import LoraConfig, check_config
from lora_jax.core.rules._match_paths import assign, matched_by
from lora_jax.core.variants._dora import DoRA
from lora_jax.trees._pair import pair
from lora_jax.trees._paths import path_of
from lora_jax.trees._states import parameters_in
from lora_jax.trees._summary_report import Row, RuleReport, Summary


def summary(
    frozen: chex.ArrayTree,
    adapters: chex.ArrayTree,
    *,
    config: LoraConfig | None = None,
    axes: Mapping[str, KernelAxes] | None = None,
    tx: optax.GradientTransformation | None = None,
) -> Summary:
    """Reports what is trained and what is frozen.

    Args:
      frozen: the base, of arrays or ``jax.ShapeDtypeStruct``.
      adapters: the adapters, likewise.
      config: the config that they were made with, to report on its rules.
      axes: from :func:`lora_jax.kernel_axes`, to know which are tied, and which axes stack.
      tx: the optimizer, to count the bytes of its state.

    Returns:
      A :class:`Summary`, which prints as a table.

    Raises:
      TypeError: if a tree is not a nested dict.
      ValueError: if the adapters, or the config, are of another model.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax, optax
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("0/kernel", rank=2)], trainable=[".*bias"])
      >>> params = {
      ...     "0": {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)},
      ...     "1": {"kernel": jnp.ones((32, 4))},
      ... }
      >>> split = lora_jax.lora_init(jax.random.key(0), params, config)
      >>> print(lora_jax.summary(*split, config=config, tx=optax.adam(1e-3)))
      path      shape    variant  rank  scale  trained  total       %
      --------  -------  -------  ----  -----  -------  -----  ------
      0/bias    32       full                       32     32  100.00
      0/kernel  64 x 32  lora        2      1      192  2,048    9.38
      --------  -------  -------  ----  -----  -------  -----  ------
      Rule('0/kernel'): 1 of 1 matched leaves adapted
      left frozen, of two or more axes: 1/kernel
      optimizer state: 1.8 KiB
      trained 224 of 2,208 parameters (10.14 %), 2,176 frozen; 896 bytes to save
    """
    if config is not None:
        check_config(config)
    if tx is not None and not hasattr(tx, "init"):
        raise TypeError(f"tx must be an optax optimizer, got {tx!r}.")
    flat, found = pair(frozen, adapters)
    base = {
        path_of(key): content(leaf)
        for key, leaf in parameters_in(flat).items()
        if leaf is not empty_node
    }
    nodes = {path_of(key): node for key, node in sorted(found.items())}
    rows = tuple(_row(path, node, base.get(path)) for path, node in nodes.items())
    batch_axes = axes.batch if isinstance(axes, ModelAxes) else {}
    frozen_kernels = {
        path: tuple(leaf.shape)
        for path, leaf in base.items()
        if path not in nodes and len(getattr(leaf, "shape", ())) - len(batch_axes.get(path, ())) > 1
    }
    adapted = [path for path, node in nodes.items() if isinstance(node, Adapter)]
    tied = axes.tied if isinstance(axes, ModelAxes) else frozenset()
    state = None if tx is None else jax.eval_shape(tx.init, adapters)
    return Summary(
        rows=rows,
        trained=sum(row.trained for row in rows),
        total=sum(_size(leaf) for leaf in base.values())
        + sum(row.total for path, row in zip(nodes, rows, strict=True) if not nodes[path].in_base),
        nbytes=sum(row.nbytes for row in rows),
        frozen_kernels=frozen_kernels,
        rules=() if config is None else _rules(config, sorted({*base, *nodes}), nodes, axes),
        tied=tuple(path for path in adapted if path in tied),
        optimizer_nbytes=None if state is None else _nbytes(state),
    )


def _rules(
    config: LoraConfig, paths: list[str], nodes: Mapping[str, Node], axes: object
) -> tuple[RuleReport, ...]:
    rules, trainable = assign(config, paths, axes)
    adapted_now = {path for path, node in nodes.items() if isinstance(node, Adapter)}
    for path in sorted(rules.keys() ^ adapted_now | trainable ^ (nodes.keys() - adapted_now)):
        raise ValueError(
            f"The adapters were made with another config: they and this one differ in {path!r}."
        )
    reports = []
    for rule in config.rules:
        matched = matched_by(rule, paths, axes)
        taken = {
            path: "a trainable pattern" if path in trainable else f"Rule({rules[path].pattern!r})"
            for path in matched
            if rules.get(path) is not rule
        }
        adapted = tuple(path for path in matched if path not in taken)
        reports.append(RuleReport(rule.pattern, adapted, taken))
    return tuple(reports)


def _row(path: str, node: Node, leaf: Any) -> Row:
    """The row of a node: what a kind of node has no field for is not in it."""
    leaf = content(leaf) if node.in_base else node.merge(None)
    return Row(
        path,
        tuple(leaf.shape),
        node.kind,
        getattr(node, "rank", None),
        getattr(node, "scale", None),
        trained=_size(node.arrays),
        total=_size(leaf),
        nbytes=_nbytes(node.arrays),
        materialized=getattr(node, "materialize", False),
        zero_columns=_zero_columns(node, leaf),
    )


def _zero_columns(node: Node, kernel: Any) -> int | None:
    """How many columns of the kernel DoRA has no direction for; ``None`` where unknown."""
    arrays = jax.tree.leaves(kernel)
    abstract = any(isinstance(a, jax.ShapeDtypeStruct) or is_traced(a) for a in arrays)
    if not (isinstance(node, Adapter) and isinstance(node.variant, DoRA)) or abstract:
        return None
    matrix = node.axes.as_matrix(jnp.asarray(unbox(kernel)))
    return int(jnp.sum(column_norm(matrix.astype(jnp.float32)) == 0))


def _size(tree: Any) -> int:
    return sum(math.prod(array.shape) for array in jax.tree.leaves(tree, is_leaf=is_quantized))


def _nbytes(tree: Any) -> int:
    return sum(_size(a) * a.dtype.itemsize for a in jax.tree.leaves(tree))
