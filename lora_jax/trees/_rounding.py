"""What merging loses in 16 bits: rounding to nearest or stochastically, and a report.

An update below half a unit in the last place of ``W`` is rounded away: in bfloat16, which has eight
bits, all that is smaller than about ``|W| / 512``.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core._adapter import Adapter
from lora_jax.core._boxes import content, is_quantized, unbox
from lora_jax.core._numerics import float32_or_more
from lora_jax.trees._pair import pair
from lora_jax.trees._paths import path_of
from lora_jax.trees._quantized_leaf import requantized_leaf
from lora_jax.trees._table import Report, text_table

MOST = 0.5  # an update is reported as lost where more than this share of it vanishes


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What rounding does to one merged parameter.

    Attributes:
      dtype: of the merged parameter; the kind of its codes where it is quantized again.
      largest: the largest error of an entry, against ``W'`` in float32.
      mean: the mean error of an entry.
      vanished: share of the entries that the adapter changes and that come out as the base has
        them; ``None`` for parameters that are fully trained, whose base is not kept.
    """

    dtype: str
    largest: float
    mean: float
    vanished: float | None


@dataclasses.dataclass(frozen=True)
class RoundingReport(Report[Rounding]):
    """The rounding of every merged parameter by its path; as text, a table.

    Attributes:
      rows: the same as a dict.
    """

    @property
    def lost(self) -> tuple[str, ...]:
        """The parameters whose update vanishes for the most part."""
        return tuple(p for p, one in self.rows.items() if (one.vanished or 0) > MOST)

    def __str__(self) -> str:
        """A table, and what to do where updates are lost."""
        body = [
            (
                path,
                one.dtype,
                f"{one.largest:.2g}",
                f"{one.mean:.2g}",
                "" if one.vanished is None else f"{100 * one.vanished:.1f}",
            )
            for path, one in self.rows.items()
        ]
        lines = text_table(
            ("path", "dtype", "largest error", "mean error", "vanished, %"), body, left=2
        )
        if self.lost:
            lines.append(
                f"Most of the update vanishes in {len(self.lost)} of {len(self)} parameters: keep "
                f"the adapters apart, merge into a float32 base, or round stochastically (key=...)."
            )
        return "\n".join(lines)


def round_to(x: chex.Array, dtype: Any, key: chex.PRNGKey | None = None) -> chex.Array:
    """An array in a dtype of less precision.

    Args:
      x: the array.
      dtype: the dtype.
      key: round stochastically: to one of the two neighbours, so that the mean is ``x``. Without
        it, to the nearest.

    Example:
      >>> x = jnp.full(10_000, 1.001)
      >>> float(round_to(x, jnp.bfloat16).astype(jnp.float32).mean())
      1.0
      >>> round(float(round_to(x, jnp.bfloat16, jax.random.key(0)).astype(jnp.float32).mean()), 4)
      1.001
    """
    near = x.astype(dtype)
    if key is None or jnp.dtype(dtype).itemsize >= x.dtype.itemsize:
        return near
    error = x - near.astype(x.dtype)
    most = jnp.finfo(dtype)  # type: ignore[no-untyped-call]  # some of 8 bits have no infinity
    toward = jnp.where(error > 0, most.max, most.min).astype(dtype)
    other = jnp.nextafter(near, toward)
    gap = jnp.abs(other.astype(x.dtype) - near.astype(x.dtype))
    chance = jnp.abs(error) / gap
    return jnp.where(jax.random.uniform(key, x.shape, x.dtype) < chance, other, near)


def key_for(key: chex.PRNGKey, path: str) -> chex.PRNGKey:
    """A key for every path."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def check_requantize(key: chex.PRNGKey | None, requantize: bool) -> None:
    """Raises ValueError if codes shall be rounded stochastically."""
    if requantize and key is not None:
        raise ValueError(
            "requantize=True rounds to the nearest codes, and key= is to round stochastically: "
            "pass one of the two."
        )


def measure(exact: chex.Array, rounded: chex.Array, base: chex.Array | None) -> Rounding:
    """The rounding of one parameter.

    Args:
      exact: ``W'`` in float32.
      rounded: ``W'`` as it comes out.
      base: ``W``, where it is known.
    """
    return measure_parts([(exact, rounded, base)])


def measure_parts(
    parts: Iterable[tuple[chex.Array, chex.Array, chex.Array | None]],
) -> Rounding:
    """The rounding of one parameter whose parts, all of one size, come one after another.

    Args:
      parts: of each, what :func:`measure` takes.
    """
    dtype, largest, means, vanished, changed = "", 0.0, [], 0, 0
    known = True
    for exact, rounded, base in parts:
        dtype = jnp.dtype(rounded.dtype).name
        most, mean, counts = _errors(exact, rounded, base)
        largest = float(np.maximum(largest, most))  # NaN stays
        means.append(float(mean))
        if counts is None:
            known = False
        else:
            vanished, changed = vanished + int(counts[0]), changed + int(counts[1])
    share = vanished / max(changed, 1) if known else None
    return Rounding(dtype, largest, sum(means) / len(means), share)


@jax.jit  # so that nothing of the parameter's size is made
def _errors(exact: chex.Array, rounded: chex.Array, base: chex.Array | None) -> Any:
    wide = float32_or_more(rounded.dtype)
    error = jnp.abs(rounded.astype(wide) - exact)
    counts = None
    if base is not None:
        changed = exact != base.astype(wide)
        counts = jnp.sum(changed & (rounded == base)), jnp.sum(changed)
    return jnp.max(error), jnp.mean(error), counts


def rounding(
    frozen: chex.ArrayTree,
    adapters: chex.ArrayTree,
    *,
    key: chex.PRNGKey | None = None,
    requantize: bool = False,
) -> RoundingReport:
    """What :func:`lora_jax.lora_merge` loses by rounding, parameter by parameter.

    Args:
      frozen: the base.
      adapters: the adapters, trained.
      key: as for :func:`lora_jax.lora_merge`.
      requantize: as for :func:`lora_jax.lora_merge`: the report is on what the new codes stand for.

    Returns:
      A report that prints as a table. Only one merged kernel is in memory at a time.

    Raises:
      TypeError: if a tree is not a nested dict, or if adapters are as a file has them, of arrays
        only.
      ValueError: if the adapters do not fit this base, if the base is of integers, or if a leaf is
        in both trees.

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
    check_requantize(key, requantize)
    base, nodes = pair(frozen, adapters)
    rows: dict[str, Rounding] = {}
    for key_, node in sorted(nodes.items(), key=lambda item: not item[1].in_base):
        path = path_of(key_)
        node.check_merges(path)
        W = jnp.asarray(unbox(base[key_])) if node.in_base else None
        exact, dtype = jnp.asarray(node.merge(W)), node.merged_dtype(W)
        if W is not None:
            path_key = None if key is None else key_for(key, path)
            rounded, leaf = round_to(exact, dtype, path_key), base[key_]
            kind = None
            if requantize and isinstance(node, Adapter) and is_quantized(content(leaf)):
                new = requantized_leaf(leaf, exact, node.axes)
                rounded, kind = unbox(new), content(new).quantization.kind
            row = measure(exact, rounded, W)
            rows[path] = row if kind is None else dataclasses.replace(row, dtype=kind)
        elif exact.dtype != dtype:  # lora_merge rounds it to the nearest, whatever the key
            rows[path] = measure(exact, exact.astype(dtype), None)
    return RoundingReport(rows)
