"""The adapted product ``x W'`` of a layer, and which of its computations is taken.

``W' = a (W + s U V)``, with ``a = m / ||W + s U V||_c`` for DoRA and ``a = 1`` for LoRA:
``core/variants/`` says so as the papers do. Three computations give it:

    factored    y = a (x W + s (x U) V)                _factored.py
    outer       y = a (x W + s sum_r (x U)_r V_r)      _factored.py
    dense       y = x K,   K = a (W + s U V)           _dense.py

Dense is better with many rows ``n``. But ``K`` is rounded: in 16 bits an update below half a unit
in the last place of ``W`` would vanish, and so it would on an accelerator that multiplies float32
numbers in less. So ``"auto"`` is dense where the product is computed in float32 or more and
``n >= d``, and else factored. ``_tuning.py`` has what that is chosen by on each platform,
``docs/benchmarks.md`` the numbers.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import Any, NoReturn

import chex
import jax
import jax.numpy as jnp

from lora_jax.core._axes import KernelAxes
from lora_jax.core._meshes import left_to_compiler
from lora_jax.core.products._dense import dense_product
from lora_jax.core.products._einsum_equation import Equation
from lora_jax.core.products._factored import (
    Product,
    factored_linear,
    factored_on,
    factored_product,
    scaled,
)
from lora_jax.core.products._layer_factors import LayerFactors
from lora_jax.core.products._platform import PLATFORMS, by_platform
from lora_jax.core.products._product_with_U import known_xU
from lora_jax.core.products._tuning import TUNING


def adapted_einsum(
    equation: Equation,
    x: chex.Array,
    W: chex.Array,
    factors: LayerFactors,
    *,
    base: Product | None = None,
    transposed: bool = False,
    precision: jax.lax.PrecisionLike = None,
    x_in: chex.Array | None = None,
    dropout: bool = False,
) -> chex.Array:
    """The einsum of ``x`` with ``W'`` for one layer, in the layer's own dtype.

    Args:
      equation: ``x,W->y``.
      x: the input.
      W: the kernel in the compute dtype.
      factors: of the adapter.
      base: the layer's own product of ``x`` and ``W``, if it is more than the einsum.
      transposed: the product is with the transposed matrix, ``x W'^T``, as where an embedding
        gives the logits: then ``y = (a x) W^T + s ((a x) V^T) U^T``.
      precision: of the products.
      x_in: the input of the factors, with their dropout; ``x`` by default.
      dropout: whether they have dropout.
    """
    reasons = {
        "the layer has a product of its own": base is not None,
        "the product is with the transposed kernel": transposed,
        "the adapter has dropout": dropout,
    }
    U, V, a = factors.U, factors.V, factors.a
    static: dict[str, Any] = {"equation": equation, "s": factors.s, "precision": precision}
    by_choice = factors.product == "auto"
    dtype = min(x.dtype, W.dtype, key=lambda dtype: dtype.itemsize)
    chosen = {
        platform: choose_product(
            factors, dtype, equation.rows, precision, reasons, platform=platform
        )
        for platform in PLATFORMS
    }
    dense_on = tuple(platform for platform in PLATFORMS if chosen[platform] == "dense")
    if dense_on:
        dense = functools.partial(_dense_on_some, dense_on=dense_on, **static)
        plain = functools.partial(equation.product, precision=precision)
        like = functools.partial(jax.eval_shape, plain, x, W)
        return left_to_compiler(dense, x, W, U, V, a, like=like)
    x_in = x if x_in is None else x_in
    if transposed:
        U, V = transposed_factors(U, V)
        if a is not None:

            def scale(a: chex.Array, x: chex.Array) -> chex.Array:
                return scaled(equation.on_x(a), x)

            x, x_in = (left_to_compiler(scale, a, x, like=x) for x in (x, x_in))
            a = None
    y = equation.product(x, W, precision) if base is None else base(x, W)
    factored = functools.partial(
        factored_product, outer="outer" in chosen.values(), from_result=by_choice, **static
    )
    return left_to_compiler(factored, y, x_in, U, V, a, like=y)


@functools.partial(jax.jit, static_argnames=("dense_on", "equation", "s", "precision"))
def _dense_on_some(
    x: chex.Array,
    W: chex.Array,
    U: chex.Array,
    V: chex.Array | None,
    a: chex.Array | None,
    *,
    dense_on: tuple[str, ...],
    equation: Equation,
    s: float,
    precision: jax.lax.PrecisionLike,
) -> chex.Array:
    """The dense product on some platforms, and the factored one on the others."""
    static: dict[str, Any] = {"equation": equation, "s": s, "precision": precision}

    def form(x: Any, W: Any, U: Any, V: Any, a: Any, xU: Any, *, platform: str) -> chex.Array:
        if platform in dense_on:
            return dense_product(x, W, U, V, a, xU, platform=platform, **static)
        y = equation.product(x, W, precision)
        return factored_on(platform, y, x, U, V, a, xU, **static)

    xU = None
    if V is not None:  # out here a policy sees its name; in the forms it has its derivative
        xU = known_xU(x, U, equation=equation, precision=precision, exact_on=dense_on)
    return by_platform(form, x, W, U, V, a, xU)


def adapted_linear(
    linear: Product,
    x: chex.Array,
    W: chex.Array,
    factors: LayerFactors,
    axes: KernelAxes,
    *,
    base: Product,
    groups: int = 1,
    precision: jax.lax.PrecisionLike = None,
    x_in: chex.Array | None = None,
) -> chex.Array:
    """``linear(x, W')`` for any product that is linear in the kernel, such as a convolution.

    ``linear(x, U)`` is the same product with ``r`` outputs, and its result times ``V`` is added.

    Args:
      linear: computes the layer's product; it takes kernels of any number of outputs.
      x: the input.
      W: the kernel in the compute dtype, with one output axis.
      factors: of the adapter.
      axes: how ``W`` is a matrix. The result's last axes are the batch axes and the outputs.
      base: the layer's own product of ``x`` and ``W``.
      groups: number of groups that the outputs are in, each with its own inputs.
      precision: of the product with ``V``; that of ``linear`` is its own.
      x_in: the input of the factors, with their dropout; ``x`` by default.
    """
    y = base(x, W)

    def add(y: chex.Array, x: chex.Array, U: chex.Array, V: Any, a: Any) -> chex.Array:
        inside = factors._replace(U=U, V=V, a=a)
        return factored_linear(linear, y, x, W, inside, axes, groups=groups, precision=precision)

    x = x if x_in is None else x_in
    return left_to_compiler(add, y, x, factors.U, factors.V, factors.a, like=y)


def transposed_factors(U: chex.Array, V: chex.Array | None) -> tuple[chex.Array, Any]:
    """The factors of the transposed matrix."""
    if V is None:
        return U.swapaxes(-1, -2), None
    return V.swapaxes(-1, -2), U.swapaxes(-1, -2)


# What a call may say of them.
PRODUCTS = ("auto", "factored", "outer", "dense")
# What a precision may be called that keeps float32 as it is.
_EXACT = (jax.lax.Precision.HIGHEST, "highest", "float32")


def choose_product(
    factors: LayerFactors,
    dtype: Any,
    rows: int,
    precision: jax.lax.PrecisionLike = None,
    reasons: Mapping[str, bool] = types.MappingProxyType({}),
    *,
    platform: str,
) -> str:
    """How a product is computed: as the call says, or else by whichever is exact and faster.

    Args:
      factors: of the adapter.
      dtype: that the layer computes in.
      rows: number of rows ``n`` of its input.
      precision: of its products.
      reasons: what would make a dense product impossible, and whether that is so.
      platform: that computes.

    Returns:
      ``"factored"``, ``"outer"`` or ``"dense"``.

    Raises:
      ValueError: if the call says what is not possible.

    Example:
      >>> factors = LayerFactors(jnp.zeros((512, 8)), jnp.zeros((8, 512)), None, 1.0)
      >>> choose_product(factors, jnp.bfloat16, rows=4096, platform="cpu")
      'factored'
    """
    if factors.product in ("factored", "outer"):
        return "factored" if factors.V is None else factors.product
    not_dense = [reason for reason, is_so in reasons.items() if is_so]
    if jnp.dtype(dtype).itemsize < 4:
        not_dense.append(f"in {jnp.dtype(dtype).name} a small update of W would be rounded away")
    if factors.product == "dense":
        if not_dense:
            refuse_product(factors, not_dense[0])
        return factors.product
    tuning = TUNING[platform]
    exact = tuning.exact_float32 or precision in _EXACT
    # A symbolic number of rows, as jax.export has, is not an int and cannot be compared.
    many = factors.V is None or (
        isinstance(rows, int) and rows >= tuning.dense_rows * factors.U.shape[-2]
    )
    return "dense" if exact and not not_dense and many else "factored"


def refuse_product(factors: LayerFactors, reason: str) -> NoReturn:
    """Raises ValueError where the call wants a product that is not possible."""
    raise ValueError(
        f"lora_apply(..., product={factors.product!r}) is not possible for {factors.path!r}, as "
        f"{reason}. Leave it out, or say product='factored'."
    )
