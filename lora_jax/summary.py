"""What is trained, as a table: look at it before a long run."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax.traverse_util import empty_node

from lora_jax.adapter import Adapter, Whole
from lora_jax.tree import flatten, path_of, unbox


@dataclasses.dataclass(frozen=True)
class Row:
    """One trained kernel or leaf.

    Attributes:
      path: where it is in the parameters.
      shape: shape of the kernel or leaf.
      variant: ``"lora"``, ``"dora"``, or ``"whole"`` for a leaf trained whole.
      rank: ``r``; ``None`` for a leaf trained whole.
      scale: ``s``; ``None`` for a leaf trained whole.
      trained: number of trained parameters.
      total: number of parameters of the kernel or leaf in the model.
      nbytes: bytes of the trained arrays.
    """

    path: str
    shape: tuple[int, ...]
    variant: str
    rank: int | None
    scale: float | None
    trained: int
    total: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """The rows, and the sums over the model; ``str`` of it is a table.

    Attributes:
      rows: one for each trained kernel or leaf.
      trained: number of trained parameters.
      total: number of parameters of the model, without the factors.
      nbytes: bytes to save for one use case.
    """

    rows: tuple[Row, ...]
    trained: int
    total: int
    nbytes: int

    @property
    def percent(self) -> float:
        """Trained parameters in per cent of the model's."""
        return 100.0 * self.trained / max(self.total, 1)

    def __str__(self) -> str:
        """The table."""
        head = ("path", "shape", "variant", "rank", "scale", "trained", "total", "%")
        body = [
            (
                row.path,
                " x ".join(map(str, row.shape)),
                row.variant,
                "" if row.rank is None else str(row.rank),
                "" if row.scale is None else f"{row.scale:g}",
                f"{row.trained:,}",
                f"{row.total:,}",
                f"{100 * row.trained / max(row.total, 1):.2f}",
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        left = {0, 1, 2}

        def line(cells: tuple[str, ...]) -> str:
            padded = (
                cell.ljust(width) if i in left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            return "  ".join(padded).rstrip()

        rule = "  ".join("-" * width for width in widths)
        frozen = self.total - sum(row.total for row in self.rows if row.variant == "whole")
        sums = (
            f"trained {self.trained:,} of {self.total:,} parameters ({self.percent:.2f} %), "
            f"{frozen:,} frozen; {_bytes(self.nbytes)} to save"
        )
        return "\n".join([line(head), rule, *map(line, body), rule, sums])


def summary(frozen: chex.ArrayTree, adapters: chex.ArrayTree) -> Summary:
    """Counts what is trained and what is frozen.

    Args:
      frozen: the base, of arrays or ``jax.ShapeDtypeStruct``.
      adapters: the adapters, likewise.

    Returns:
      A :class:`Summary`, which prints as a table.

    Raises:
      TypeError: a tree that is no nested dict.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=2)], trainable=["bias"])
      >>> params = {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)}
      >>> print(lora_jax.summary(*lora_jax.lora_init(jax.random.key(0), params, config)))
      path    shape    variant  rank  scale  trained  total       %
      ------  -------  -------  ----  -----  -------  -----  ------
      bias    32       whole                      32     32  100.00
      kernel  64 x 32  lora        2      1      192  2,048    9.38
      ------  -------  -------  ----  -----  -------  -----  ------
      trained 224 of 2,080 parameters (10.77 %), 2,048 frozen; 896 bytes to save
    """
    base = {
        key: unbox(leaf)
        for key, leaf in flatten(frozen, "frozen").items()
        if leaf is not empty_node
    }
    rows = tuple(
        _row(path_of(key), node, base.get(key))
        for key, node in sorted(flatten(adapters, "adapters").items())
        if node is not empty_node
    )
    whole = sum(row.total for row in rows if row.variant == "whole")
    return Summary(
        rows=rows,
        trained=sum(row.trained for row in rows),
        total=sum(_size(leaf) for leaf in base.values()) + whole,
        nbytes=sum(row.nbytes for row in rows),
    )


def _row(path: str, node: Any, kernel: Any) -> Row:
    arrays = jax.tree.leaves(node)
    trained = sum(map(_size, arrays))
    nbytes = sum(_size(array) * jnp.dtype(array.dtype).itemsize for array in arrays)
    if isinstance(node, Adapter):
        if kernel is None:
            raise ValueError(f"There is an adapter for {path!r}, but no such kernel in the base.")
        shape = tuple(kernel.shape)
        total = _size(kernel)
        return Row(path, shape, node.variant, node.rank, node.scale, trained, total, nbytes)
    shape = tuple(unbox(node.value if isinstance(node, Whole) else node).shape)
    return Row(path, shape, "whole", None, None, trained, trained, nbytes)


def _size(array: Any) -> int:
    return math.prod(array.shape)


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
