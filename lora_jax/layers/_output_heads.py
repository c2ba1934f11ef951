"""Which layers are the output heads of a model: what ``"all-linear"`` leaves frozen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import jax.numpy as jnp

Shape = tuple[int, ...]


def output_heads(
    results: Sequence[tuple[Shape, jnp.dtype]],
    behind: Callable[[int], set[str]],
    feeding: Collection[str] | None,
    widths: Mapping[str, Collection[int]],
    matrices: Collection[str],
) -> tuple[frozenset[str], frozenset[str]]:
    """The kernels of the output heads, and those that may be, where it cannot be known.

    A layer is an output head if a result is computed behind it without another layer, and if it
    feeds no other layer. Where a result is also computed behind layers that do feed others, it is
    a residual stream, to which the last layers add, if it is as wide as they are; if not, such as
    a loss of logits and of a router, the logits' layer may be a head. So may every last layer where
    all results are integers.

    Args:
      results: shape and dtype of each.
      behind: says of the ``i``-th result behind which parameters it is, no layer between.
      feeding: the parameters behind which the input of a layer is; ``None`` if that is not known.
      widths: of each kernel of a layer, the sizes that its output may have in the last axis.
      matrices: parameters of no layer, which may be multiplied all the same.
    """
    heads: set[str] = set()
    unsure: set[str] = set()
    inexact = [i for i, (_, dtype) in enumerate(results) if jnp.issubdtype(dtype, jnp.inexact)]
    if not inexact:  # as of tokens that were chosen by their logits
        return frozenset(), frozenset(widths.keys() - set(feeding or ()))
    for i in inexact:
        shape, _ = results[i]
        reaching = behind(i)
        layers = reaching & widths.keys()
        if feeding is None:
            (heads if len(layers) == 1 else unsure).update(layers)
            continue
        last = layers.difference(feeding)
        as_wide = {path for path in last if shape and shape[-1] in widths[path]}
        stream, raw = last != layers, not reaching.isdisjoint(matrices)
        if not stream and not raw:
            heads |= last
        elif raw and not stream:
            unsure |= as_wide
        elif stream and not raw:
            unsure |= last - as_wide
    return frozenset(heads), frozenset(unsure - heads)
