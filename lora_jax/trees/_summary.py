"""What is trained and what is not, as a report: look at it before a long run."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import chex
import jax
import optax
from flax.traverse_util import empty_node

from lora_jax.core._axes import KernelAxes, ModelAxes
from lora_jax.core._config import LoraConfig, assign, check_config, matched_by
from lora_jax.core._node import Node
from lora_jax.trees._pair import pair
from lora_jax.trees._paths import path_of, unbox
from lora_jax.trees._table import text_table


@dataclasses.dataclass(frozen=True)
class Row:
    """One trained kernel or leaf.

    Attributes:
      path: where it is in the parameters.
      shape: shape of the kernel or leaf.
      variant: ``"lora"``, ``"dora"``, or ``"whole"`` for a fully trained leaf.
      rank: ``r``; ``None`` for a fully trained leaf.
      scale: ``s``; ``None`` for a fully trained leaf.
      trained: number of trained parameters.
      total: number of parameters of the kernel or leaf in the model.
      nbytes: bytes of the trained arrays.
      materialized: whether ``W'`` stands in place of the parameter itself.
      zero_columns: DoRA only: number of all-zero columns of the kernel, which have no direction;
        ``None`` for others, and for abstract arrays.
      product: how the layer computes its product: what the rule says; ``"auto"`` is decided for
        each call, by :func:`lora_jax.core._product.chosen`; ``None`` for a fully trained leaf.
    """

    path: str
    shape: tuple[int, ...]
    variant: str
    rank: int | None
    scale: float | None
    trained: int
    total: int
    nbytes: int
    materialized: bool = False
    zero_columns: int | None = None
    product: str | None = None


@dataclasses.dataclass(frozen=True)
class RuleReport:
    """What became of a rule.

    Attributes:
      pattern: its pattern.
      adapted: the kernels that it adapts.
      taken: the leaves that it matches but that others have, and who has them.
    """

    pattern: str
    adapted: tuple[str, ...]
    taken: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Summary:
    """The report as data; ``str`` of it is the report as text.

    Attributes:
      rows: one for each trained kernel or leaf.
      trained: number of trained parameters.
      total: number of parameters of the model, without the factors.
      nbytes: bytes to save for one use case.
      frozen_kernels: every leaf of two or more axes (without the stacks that ``axes`` knows) that
        is not adapted, with its shape, whether or not its layer is known.
      rules: what became of each rule; empty without ``config``.
      tied: adapted parameters that the model also reads outside of their layer; empty without
        ``axes``.
      optimizer_nbytes: bytes of the optimizer's state; ``None`` without ``tx``.
    """

    rows: tuple[Row, ...]
    trained: int
    total: int
    nbytes: int
    frozen_kernels: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    rules: tuple[RuleReport, ...] = ()
    tied: tuple[str, ...] = ()
    optimizer_nbytes: int | None = None

    @property
    def percent(self) -> float:
        """Trained parameters in per cent of the model's."""
        return 100.0 * self.trained / max(self.total, 1)

    def __str__(self) -> str:
        """The text: rows that differ in numbers of their path only are one line, with ``*``."""
        lines = _table(self.rows)
        for rule in self.rules:
            matched = f"{len(rule.adapted)} of {len(rule.adapted) + len(rule.taken)} matched"
            lines.append(f"Rule({rule.pattern!r}): {matched} leaves adapted")
            owners = _grouped(rule.taken.items(), key=lambda item: item[1])
            for owner, items in owners.items():
                lines.append(f"  not {_paths(path for path, _ in items)}: has {owner}")
        if self.frozen_kernels:
            lines.append(f"left frozen, of two or more axes: {_paths(self.frozen_kernels)}")
        if self.tied:
            lines.append(f"tied, so read outside of their layer too: {_paths(self.tied)}")
        forced = [row for row in self.rows if row.product not in (None, "auto")]
        for product, rows in _grouped(forced, key=lambda row: row.product).items():
            lines.append(f"{product} product: {_paths(row.path for row in rows)}")
        for row in self.rows:
            if row.zero_columns:
                lines.append(
                    f"{row.path} has {row.zero_columns} all-zero columns: DoRA keeps them at zero "
                    f"until U V gives them a direction"
                )
        if self.optimizer_nbytes is not None:
            lines.append(f"optimizer state: {_bytes(self.optimizer_nbytes)}")
        frozen = self.total - sum(row.total for row in self.rows if row.variant == "whole")
        sums = (
            f"trained {self.trained:,} of {self.total:,} parameters ({self.percent:.2f} %), "
            f"{frozen:,} frozen; {_bytes(self.nbytes)} to save"
        )
        return "\n".join([*lines, sums])


def _table(rows: tuple[Row, ...]) -> list[str]:
    head = ("path", "shape", "variant", "rank", "scale", "trained", "total", "%")
    body = []
    for (pattern, *_), group in _grouped(rows, key=_alike).items():
        row, count = group[0], len(group)
        trained, total = (sum(getattr(r, name) for r in group) for name in ("trained", "total"))
        body.append(
            (
                row.path if count == 1 else f"{pattern} ({count})",
                " x ".join(map(str, row.shape)),
                row.variant + (", materialized" if row.materialized else ""),
                "" if row.rank is None else str(row.rank),
                "" if row.scale is None else f"{row.scale:g}",
                f"{trained:,}",
                f"{total:,}",
                f"{100 * trained / max(total, 1):.2f}",
            )
        )
    return text_table(head, body, left=3)


def _alike(row: Row) -> tuple[Any, ...]:
    kind = row.shape, row.variant, row.rank, row.scale, row.materialized
    return (re.sub(r"\d+", "*", row.path), *kind)


def _grouped(items: Iterable[Any], key: Any) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _paths(paths: Iterable[str]) -> str:
    groups = _grouped(paths, key=lambda path: re.sub(r"\d+", "*", path))
    return ", ".join(
        same[0] if len(same) == 1 else f"{pattern} ({len(same)})"
        for pattern, same in groups.items()
    )


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
      TypeError: a tree that is no nested dict.
      ValueError: adapters, or a config, of another model.

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
      0/bias    32       whole                      32     32  100.00
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
    base = {path_of(k): unbox(leaf) for k, leaf in flat.items() if leaf is not empty_node}
    nodes = {path_of(key): node for key, node in sorted(found.items())}
    rows = tuple(_row(path, node, base.get(path)) for path, node in nodes.items())
    whole = sum(row.total for row in rows if row.variant == "whole")
    stacks = axes.batch if isinstance(axes, ModelAxes) else {}
    frozen_kernels = {
        path: tuple(leaf.shape)
        for path, leaf in base.items()
        if path not in nodes and len(getattr(leaf, "shape", ())) - len(stacks.get(path, ())) > 1
    }
    adapted = [path for path, node in nodes.items() if node.rank is not None]
    tied = axes.tied if isinstance(axes, ModelAxes) else frozenset()
    state = None if tx is None else jax.eval_shape(tx.init, adapters)
    return Summary(
        rows=rows,
        trained=sum(row.trained for row in rows),
        total=sum(_size(leaf) for leaf in base.values()) + whole,
        nbytes=sum(row.nbytes for row in rows),
        frozen_kernels=frozen_kernels,
        rules=() if config is None else _rules(config, sorted({*base, *nodes}), nodes, axes),
        tied=tuple(path for path in adapted if path in tied),
        optimizer_nbytes=None if state is None else _nbytes(state),
    )


def _rules(
    config: LoraConfig, paths: list[str], nodes: Mapping[str, Node], axes: object
) -> tuple[RuleReport, ...]:
    rules, whole = assign(config, paths, axes)
    adapted_now = {path for path, node in nodes.items() if node.rank is not None}
    for path in sorted(rules.keys() ^ adapted_now | whole ^ (nodes.keys() - adapted_now)):
        raise ValueError(
            f"The adapters were made with another config: they and this one differ in {path!r}."
        )
    reports = []
    for rule in config.rules:
        matched = matched_by(rule, paths, axes)
        taken = {
            path: "a trainable pattern" if path in whole else f"Rule({rules[path].pattern!r})"
            for path in matched
            if rules.get(path) is not rule
        }
        adapted = tuple(path for path in matched if path not in taken)
        reports.append(RuleReport(rule.pattern, adapted, taken))
    return tuple(reports)


def _row(path: str, node: Node, leaf: Any) -> Row:
    """The row of a node; a leaf that the base lacks is the node's own."""
    leaf = unbox(leaf) if node.in_base else node.merge(None)
    return Row(
        path,
        tuple(leaf.shape),
        node.variant,
        node.rank,
        node.scale,
        trained=_size(node.arrays),
        total=_size(leaf),
        nbytes=_nbytes(node.arrays),
        materialized=node.materialize,
        zero_columns=node.zero_columns(leaf),
        product=node.product,
    )


def _size(tree: Any) -> int:
    return sum(math.prod(array.shape) for array in jax.tree.leaves(tree))


def _nbytes(tree: Any) -> int:
    return sum(_size(a) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
