"""The functions of a variant, for kernels that are stacked, and its normal form at any shape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from lora_jax.core._numerics import float32_or_more
from lora_jax.core.variants._check_variant import check_form
from lora_jax.core.variants._variant import NormalForm, Variant


def of_matrices(
    variant: Variant,
    function: Callable[..., Any],
    W: chex.Array,
    s: Any,
    arrays: Mapping[str, chex.Array],
) -> Any:
    """``function(W, s, **arrays)`` of a variant, in float32 or more, for every kernel.

    Args:
      variant: whose function it is; where it takes stacks, it gets them.
      function: a method of the variant.
      W: ``(*stack, d, k)``.
      s: the scale.
      arrays: of the variant, ``(*stack, ...)``.
    """
    wide = float32_or_more(W.dtype)
    arrays = {name: jnp.asarray(array).astype(wide) for name, array in arrays.items()}

    def of_one(W: chex.Array, arrays: dict[str, Any]) -> Any:
        # What a product forms of parameters is exact, whatever the accelerator's default is.
        with jax.default_matmul_precision("highest"):
            return function(W, s, **arrays)

    if not variant.takes_stacks:
        for _ in range(W.ndim - 2):
            of_one = jax.vmap(of_one)
    return of_one(W, arrays)


class Known(NamedTuple):
    """What is known of a normal form without its numbers.

    Attributes:
      has_a: whether it has an ``a``.
      left: the array that ``L`` is, as it is; ``None`` where it is computed.
      right: likewise of ``R``.
      width: ``q``, the size between the factors.
    """

    has_a: bool
    left: str | None
    right: str | None
    width: int

    @property
    def forwards(self) -> bool:
        """Whether ``L`` and ``R`` are arrays of the variant as they are."""
        return self.left is not None and self.right is not None


@functools.lru_cache(maxsize=4096)
def known(variant: Variant, d: int, k: int, r: int, exact: bool = False) -> Known | None:
    """What is known of the normal form for these sizes; ``None`` where there is none.

    Args:
      variant: the variant.
      d: inputs of the kernel.
      k: outputs of the kernel.
      r: the rank.
      exact: whether it is the exact normal form.

    Raises:
      ValueError: if it is not one for a kernel ``(d, k)``.
    """
    found: list[Known | None] = []

    def look(W: chex.Array, arrays: dict[str, Any]) -> None:
        function = variant.exact_normal_form if exact else variant.normal_form
        form = function(W, 1.0, **arrays)
        if form is None:
            found.append(None)
            return
        check_form(form, (d, k), type(variant).__name__)
        names = [
            next((name for name, array in arrays.items() if array is factor), None)
            for factor in (form.L, form.R)
        ]
        width = 0 if form.L is None else form.L.shape[-1]
        found.append(Known(form.a is not None, names[0], names[1], width))

    shapes = variant.shapes(d, k, r)
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    jax.eval_shape(look, jax.ShapeDtypeStruct((d, k), jnp.float32), arrays)
    return found[-1]


def low_rank_form(
    variant: Variant, W: chex.Array, s: Any, arrays: Mapping[str, chex.Array], exact: bool = False
) -> NormalForm:
    """``(a, L, R)`` of every kernel; where the variant has no normal form, ``L R`` is ``W' - W``.

    Args:
      variant: the variant.
      W: ``(*stack, d, k)``, as it is stored.
      s: the scale.
      arrays: of the variant, ``(*stack, ...)``.
      exact: whether it is computed once, and no digits shall be lost.

    Returns:
      The normal form, whose ``L`` and ``R`` are not ``None``: ``W' = a (W + s L R)`` also where it
      is made of ``W' - W``.
    """
    function = variant.exact_normal_form if exact else variant.normal_form
    wide = W.astype(float32_or_more(W.dtype))
    if exact or not variant.takes_16_bits:
        W = wide
    form: NormalForm | None = of_matrices(variant, function, W, s, arrays)
    W = wide
    *stack, d, k = W.shape
    if form is None:
        D = of_matrices(variant, variant.kernel, W, s, arrays) - W
        eye = jnp.broadcast_to(jnp.eye(min(d, k), dtype=W.dtype), (*stack, *[min(d, k)] * 2))
        return NormalForm(None, D / s, eye) if k <= d else NormalForm(None, eye, D / s)
    if form.L is None:
        L, R = jnp.zeros((*stack, d, 1), W.dtype), jnp.zeros((*stack, 1, k), W.dtype)
        return NormalForm(form.a, L, R)
    return form
