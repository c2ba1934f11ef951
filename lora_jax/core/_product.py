"""The adapted product and its gradient, and which way of computing it is taken.

:mod:`lora_jax.core._variants` says what ``x W'`` is. With ``a = m / ||W + s U V||_c`` for DoRA and
``a = 1`` for LoRA there are two ways to compute it:

    factored    y = a (x W + s (x U) V)
    dense       y = x K,   K = a (W + s U V)

and in both the gradient has the skinny products only, never ``x^T g``:

    dU = s x^T (g (a V)^T)    dV = s a (x U)^T g    dx = g K^T    da = sum_n g y / a

**factored** reads and writes the activations once more, ``n (d + k)`` numbers, which costs more
than its arithmetic. **dense** reads and writes the kernel instead, ``d k`` numbers, so it is
better with many rows ``n``. (Without rematerialisation ``K`` is kept for the gradient.) But ``K``
is rounded: in 16 bits an update below half a unit in the last place of ``W`` would vanish, and so
it would on an accelerator that multiplies float32 numbers in less. So ``"auto"`` is dense where the
product is computed in float32 or more and ``n >= d``. ``docs/benchmarks.md`` has the numbers.

**outer** is factored with ``(x U) V`` written as a sum of ``r`` outer products, which a compiler
can fuse into the product with ``W``, so that ``x W`` is not written and read once more. It accesses
fewer bytes by the TPU's compiler; no one has timed it on one, so it is taken only where asked for.

DoRA's norm depends on parameters only, so it is computed once for a call of the model, outside of
its layers and of what rematerialises them (:func:`normalized`), and never with ``U V`` formed:

    ||W + s U V||_c^2 = ||W||_c^2 + 2 s sum_r (U^T W) * V + s^2 sum_r (U^T U V) * V.

Where the adapter removes most of a column these terms cancel, and leave their rounding errors. What
is computed once, and not in every step, therefore forms ``U V`` (:func:`dense_norm`).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lora_jax._compat import barrier
from lora_jax.core._adapter import Adapter
from lora_jax.core._axes import KernelAxes
from lora_jax.core._equation import Equation
from lora_jax.core._meshes import left_to_compiler, spec_of
from lora_jax.core._variants import (
    along,
    column_norm,
    float32_or_more,
    magnitude_ratio,
    product,
    safe_sqrt,
)

Product = Callable[[chex.Array, chex.Array], chex.Array]


class Factors(NamedTuple):
    """What an adapter adds to one layer, with any fused kernels as one matrix.

    Attributes:
      U: ``(*stack, d, r)``.
      V: ``(*stack, r, k)``.
      a: ``(*stack, k)``, or ``None`` for LoRA.
      s: the scale.
      way: what the rule says of the product.
      path: of the kernel, for messages.
    """

    U: chex.Array
    V: chex.Array
    a: chex.Array | None
    s: float
    way: str = "auto"
    path: str = ""


def factors_of(adapter: Adapter, path: str = "") -> Factors:
    """The factors of one layer, of an adapter that is :func:`normalized`, and the kernel's path.

    Those of fused kernels side by side, ``r`` for each part.

    With parts ``b`` and ``c`` of three fused kernels it is
    ``U = [U_b | U_c]`` and ``V = [[V_b, 0, 0], [0, 0, V_c]]``.
    """
    axes, U, V, a = adapter.axes, adapter.U, adapter.V, adapter.m
    if axes.fused > 1:
        *lead, _, d, _ = spec_of(U)
        of_a = None if a is None else PartitionSpec(*lead, None)
        like = PartitionSpec(*lead, d, None), PartitionSpec(*lead, None, None), of_a
        U, V, a = left_to_compiler(functools.partial(_one_matrix, axes), U, V, a, like=like)
    return Factors(U, V, a, adapter.scale, adapter.product, path)


def _one_matrix(axes: KernelAxes, U: chex.Array, V: chex.Array, a: Any) -> tuple[Any, Any, Any]:
    """The factors of fused kernels as those of one."""
    *lead, count, r, k = V.shape
    parts = np.array(axes.parts)
    U = jnp.moveaxis(U, -3, -2)
    U = jnp.reshape(U, (*U.shape[:-2], count * r))
    blocks = jnp.zeros((count, *lead, r, axes.fused, k), V.dtype)
    blocks = blocks.at[np.arange(count), ..., parts, :].set(jnp.moveaxis(V, -3, 0))
    V = jnp.reshape(jnp.moveaxis(blocks, 0, -4), (*lead, count * r, axes.fused * k))
    if a is not None:
        ones = jnp.ones((*lead, axes.fused, k), a.dtype)
        a = jnp.reshape(ones.at[..., parts, :].set(a), (*lead, axes.fused * k))
    return U, V, a


def adapted_einsum(
    equation: Equation,
    x: chex.Array,
    W: chex.Array,
    factors: Factors,
    *,
    base: Product | None = None,
    transposed: bool = False,
    precision: jax.lax.PrecisionLike = None,
    dropped_x: chex.Array | None = None,
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
      dropped_x: the input of the factors where they have dropout; ``x`` by default.
    """
    reasons = {
        "the layer has a product of its own": base is not None,
        "the product is with the transposed kernel": transposed,
        "the adapter has dropout": dropped_x is not None,
    }
    U, V, a = factors.U, factors.V, factors.a
    static = {"equation": equation, "s": factors.s, "precision": precision, "on_cpu": on_cpu()}
    dtype = min(x.dtype, W.dtype, key=lambda dtype: dtype.itemsize)
    way = chosen(factors, dtype, equation.rows, precision, reasons)
    if way == "dense":
        dense = functools.partial(_dense_product, **static)
        plain = functools.partial(equation.product, precision=precision)
        like = functools.partial(jax.eval_shape, plain, x, W)
        return left_to_compiler(dense, x, W, U, V, a, like=like)
    dropped_x = x if dropped_x is None else dropped_x
    if transposed:
        U, V = V.swapaxes(-1, -2), U.swapaxes(-1, -2)
        if a is not None:

            def scale(a: chex.Array, x: chex.Array) -> chex.Array:
                return scaled(equation.on_x(a), x)

            x, dropped_x = (left_to_compiler(scale, a, x, like=x) for x in (x, dropped_x))
            a = None
    y = equation.product(x, W, precision) if base is None else base(x, W)
    factored = functools.partial(factored_product, outer=way == "outer", **static)
    return left_to_compiler(factored, y, dropped_x, U, V, a, like=y)


def adapted_linear(
    linear: Product,
    x: chex.Array,
    W: chex.Array,
    factors: Factors,
    axes: KernelAxes,
    *,
    base: Product,
    groups: int = 1,
    precision: jax.lax.PrecisionLike = None,
    dropped_x: chex.Array | None = None,
) -> chex.Array:
    """``linear(x, W')`` for any product that is linear in the kernel, such as a convolution.

    ``linear(x, U)`` is the same product with ``r`` outputs, and its result times ``V`` is added.

    Args:
      linear: computes the layer's product; it takes kernels of any number of outputs.
      x: the input.
      W: the kernel in the compute dtype, with one output axis.
      factors: of the adapter.
      axes: how ``W`` is a matrix. The result's last axes are the stacks and the outputs.
      base: the layer's own product of ``x`` and ``W``.
      groups: number of groups that the outputs are in, each with inputs of its own.
      precision: of the product with ``V``; that of ``linear`` is its own.
      dropped_x: the input of the factors where they have dropout; ``x`` by default.
    """
    refuse_ways(factors)
    y = base(x, W)

    def add(y: chex.Array, x: chex.Array, U: chex.Array, V: chex.Array, a: Any) -> chex.Array:
        own = factors._replace(U=U, V=V, a=a)
        return low_rank_linear(linear, y, x, W, own, axes, groups=groups, precision=precision)

    x = x if dropped_x is None else dropped_x
    return left_to_compiler(add, y, x, factors.U, factors.V, factors.a, like=y)


def low_rank_linear(
    linear: Product,
    y: chex.Array,
    x: chex.Array,
    W: chex.Array,
    factors: Factors,
    axes: KernelAxes,
    *,
    groups: int = 1,
    mask: chex.Array | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> chex.Array:
    """``a (y + s linear(x, U) V)``, and with a mask ``(r,)`` ``a (y + s (mask linear(x, U)) V)``.

    Args:
      linear: as for :func:`adapted_linear`, and so the others.
      y: the layer's own product.
      x: the input of the factors.
      W: the kernel.
      factors: of the adapter.
      axes: how ``W`` is a matrix.
      groups: number of groups.
      mask: of the columns of ``U``.
      precision: of the product with ``V``.
    """
    (out,) = axes.outputs
    U, V = factors.U.astype(W.dtype), factors.V.astype(W.dtype)
    rank = U.shape[-1]
    shape = [rank if axis == out else size for axis, size in enumerate(W.shape)]
    kernel = axes.as_kernel(U, shape)
    if groups > 1:
        kernel = jnp.concatenate([kernel] * groups, axis=out)
    xU = factors.s * linear(x, kernel)
    if y.shape[-1:] != (W.shape[out],) or xU.shape != (*y.shape[:-1], groups * rank):
        raise ValueError(
            f"The result of a linear product must have its outputs last: with a kernel {W.shape} "
            f"it is {y.shape}, with {kernel.shape} it is {xU.shape}."
        )
    if groups > 1:
        xU = jnp.reshape(xU, (*xU.shape[:-1], groups, rank))
    if mask is not None:
        xU = xU * along(mask, xU).astype(xU.dtype)
    if groups > 1:
        V = jnp.reshape(V, (rank, groups, -1))
        delta = jnp.einsum("...gr,rgk->...gk", xU, V, precision=precision)
    elif axes.batch:
        stacks = "abcdefgh"[: len(axes.batch)]
        equation = f"...{stacks}r,{stacks}rk->...{stacks}k"
        delta = jnp.einsum(equation, xU, V, precision=precision)
    else:
        delta = _dot(_rows(xU, 0, on_cpu()), V, -2, precision)
    y = y + jnp.reshape(delta, y.shape).astype(y.dtype)
    return y if factors.a is None else scaled(factors.a, y)


def scaled(a: chex.Array, y: chex.Array) -> chex.Array:
    """``a * y``, whose last axes ``a`` has. It is close to 1, and 1 in 16 bits: so not cast."""
    dtype = float32_or_more(y.dtype)
    return (along(a, y).astype(dtype) * y.astype(dtype)).astype(y.dtype)


# --- which way ---


def chosen(
    factors: Factors,
    dtype: Any,
    rows: int,
    precision: jax.lax.PrecisionLike = None,
    reasons: Mapping[str, bool] = types.MappingProxyType({}),
) -> str:
    """How a product is computed: what the rule says, or else whichever is exact and faster.

    Args:
      factors: of the adapter.
      dtype: that the layer computes in.
      rows: number of rows ``n`` of its input.
      precision: of its products.
      reasons: why the layer can be factored only, and whether that is so.

    Raises:
      ValueError: the rule says what is not possible.

    Example:
      >>> factors = Factors(jnp.zeros((512, 8)), jnp.zeros((8, 512)), None, 1.0)
      >>> chosen(factors, jnp.bfloat16, rows=4096)
      'factored'
    """
    if factors.way in ("factored", "outer"):
        return factors.way
    wrong = [reason for reason, is_so in reasons.items() if is_so]
    if jnp.dtype(dtype).itemsize < 4:
        wrong.append(f"in {jnp.dtype(dtype).name} a small update of W would be rounded away")
    if factors.way == "dense":
        if wrong:
            refuse(factors, wrong[0])
        return factors.way
    exact = on_cpu() or precision in _EXACT
    # A symbolic number of rows, of jax.export, is no int and cannot be compared.
    many = isinstance(rows, int) and rows >= factors.U.shape[-2]
    return "dense" if exact and not wrong and many else "factored"


def refuse_ways(factors: Factors) -> None:
    """Errors where the rule wants a way that is for products of two matrices only."""
    if factors.way in ("dense", "outer"):
        refuse(factors, "the layer is no product of two matrices")


def refuse(factors: Factors, reason: str) -> NoReturn:
    """Errors for a rule that wants what is not possible."""
    raise ValueError(
        f"The rule of {factors.path!r} says product={factors.way!r}, which is not possible, as "
        f"{reason}. Give it a rule with product='factored' or 'auto'."
    )


def on_cpu() -> bool:
    """Whether it is a CPU that computes."""
    return jax.default_backend() == "cpu"


# Of all that may be said of precision: the names of float32 as it is.
_EXACT = (jax.lax.Precision.HIGHEST, "highest", "float32")


# --- factored and outer ---

# Under jax.jit, layers alike are traced, differentiated and transposed once.
_STATIC = ("equation", "s", "precision", "on_cpu")


@functools.partial(jax.jit, static_argnames=("outer", *_STATIC))
def factored_product(
    y: chex.Array,
    x: chex.Array,
    U: chex.Array,
    V: chex.Array,
    a: chex.Array | None,
    *,
    outer: bool,
    equation: Equation,
    s: float,
    precision: jax.lax.PrecisionLike,
    on_cpu: bool,
    mask: chex.Array | None = None,
) -> chex.Array:
    """``a (y + s (x U) V)``; with a mask ``(r,)``, ``a (y + s (mask (x U)) V)``."""
    U, V = U.astype(x.dtype), V.astype(x.dtype)
    x = _rows(equation.operand(x), len(equation.axes.batch), on_cpu)
    xU = _skinny(x, U, precision, on_cpu)
    if mask is not None:
        xU = xU * along(mask, xU).astype(xU.dtype)
    # The scale is where it moves the fewest bytes: that is how compilers fuse it.
    if outer:
        delta = _outer(s * xU, V, precision)
    elif on_cpu:
        delta = _dot(s * xU, V, -2, precision)
    else:
        delta = s * _dot(xU, V, -2, precision)
    y = y + equation.result(delta).astype(y.dtype)
    return y if a is None else scaled(equation.on_y(a), y)


def _rows(x: chex.Array, stacks: int, on_cpu: bool) -> chex.Array:
    """``(*stack, *free, d)`` as ``(*stack, n, d)``, where that is good.

    On CPUs XLA copies ``x`` in the gradient of ``U`` if there are two axes to contract; on TPUs
    the reshape is a copy, and in a mesh that shards two of the axes it gathers.
    """
    if x.ndim <= stacks + 2 or not on_cpu:
        return x
    return jnp.reshape(x, (*x.shape[:stacks], -1, x.shape[-1]))


def _skinny(
    x: chex.Array, U: chex.Array, precision: jax.lax.PrecisionLike, on_cpu: bool
) -> chex.Array:
    """``x U``, such that on CPUs the gradient of ``U`` is ``(g^T x)^T`` and not ``x^T g``.

    XLA would make the one of the other, and there the second is four times slower: it reads a
    large matrix by its columns. Hence the barrier.
    """
    if not on_cpu or U.ndim > 2:
        return _dot(x, U, -2, precision)
    Ut = barrier(U.swapaxes(-1, -2))
    return _dot(x, Ut, -1, precision)


def _dot(x: chex.Array, W: chex.Array, axis: int, precision: jax.lax.PrecisionLike) -> chex.Array:
    """Contracts the last axis of ``x`` with an axis of ``W``, which has all stacks in front."""
    stacks = tuple(range(W.ndim - 2))
    dims = (((x.ndim - 1,), (W.ndim + axis,)), (stacks, stacks))
    return jax.lax.dot_general(x, W, dims, precision=precision)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _outer(xU: chex.Array, V: chex.Array, precision: jax.lax.PrecisionLike) -> chex.Array:
    """``sum_r (x U)_r V_r``, whose derivative is that of the product ``(x U) V``."""
    dtype = float32_or_more(xU.dtype)
    stack, free = V.shape[:-2], (1,) * (xU.ndim - V.ndim + 1)
    total = jnp.zeros((), dtype)
    for r in range(V.shape[-2]):
        V_r = jnp.reshape(V[..., r, :], (*stack, *free, V.shape[-1]))
        total = total + xU[..., r : r + 1].astype(dtype) * V_r.astype(dtype)
    return total.astype(xU.dtype)


@_outer.defjvp
def _outer_jvp(
    precision: jax.lax.PrecisionLike,
    primals: tuple[chex.Array, chex.Array],
    tangents: tuple[chex.Array, chex.Array],
) -> tuple[chex.Array, chex.Array]:
    (xU, V), (dxU, dV) = primals, tangents
    derivative = _dot(dxU, V, -2, precision) + _dot(xU, dV, -2, precision)
    return _outer(xU, V, precision), derivative


# --- dense ---


@functools.partial(jax.jit, static_argnames=_STATIC)
def _dense_product(
    x: chex.Array,
    W: chex.Array,
    U: chex.Array,
    V: chex.Array,
    a: chex.Array | None,
    *,
    equation: Equation,
    s: float,
    precision: jax.lax.PrecisionLike,
    on_cpu: bool,
) -> chex.Array:
    U, V = U.astype(W.dtype), V.astype(W.dtype)
    if a is not None:  # Its gradient divides by it. No output feels that it is not 0.
        tiny = jnp.where(jnp.abs(a) < 1e-20, 1e-20 - a, 0)
        a = (a + jax.lax.stop_gradient(tiny)).astype(W.dtype)
    # Not all backends multiply float32 numbers as such unless they are told to.
    precision = jax.lax.Precision.HIGHEST if precision is None else precision
    return _dense(x, W, U, V, a, s, equation, precision, on_cpu)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6, 7, 8))
def _dense(
    x: chex.Array,
    W: chex.Array,
    U: chex.Array,
    V: chex.Array,
    a: chex.Array | None,
    s: float,
    equation: Equation,
    precision: jax.lax.PrecisionLike,
    on_cpu: bool,
) -> chex.Array:
    """``x K`` with ``K = a (W + s U V)``."""
    return equation.product(x, _kernel(W, U, V, a, s, equation), precision)


def _kernel(
    W: chex.Array,
    U: chex.Array,
    V: chex.Array,
    a: chex.Array | None,
    s: float,
    equation: Equation,
) -> chex.Array:
    K = equation.axes.as_matrix(W) + product(s * U, V)
    return equation.axes.as_kernel(_times(a, K), W.shape)


def _times(a: chex.Array | None, K: chex.Array) -> chex.Array:
    return K if a is None else a[..., None, :] * K


def _dense_jvp(
    s: float,
    equation: Equation,
    precision: jax.lax.PrecisionLike,
    on_cpu: bool,
    primals: Sequence[Any],
    tangents: Sequence[Any],
) -> tuple[chex.Array, chex.Array]:
    """The derivative; JAX transposes it to the gradient at the top of this file."""
    x, W, U, V, a = primals
    dx, dW, dU, dV, da = (_known(t) for t in tangents)
    y = _dense(x, W, U, V, a, s, equation, precision, on_cpu)
    rows = _rows(equation.operand(x), len(equation.axes.batch), on_cpu)
    terms, low_rank = [], []
    if dx is not None:
        K = _kernel(W, U, V, a, s, equation)
        terms.append(equation.product(dx, K, precision))
    if dW is not None:
        dK = _times(a, equation.axes.as_matrix(dW))
        dK = equation.axes.as_kernel(dK, W.shape)
        terms.append(equation.product(x, dK, precision))
    if dU is not None:
        xdU = _skinny(rows, dU, precision, on_cpu)
        low_rank.append(_dot(xdU, _times(a, s * V), -2, precision))
    if dV is not None:
        xU = _skinny(rows, U, precision, on_cpu)
        low_rank.append(_dot(xU, _times(a, s * dV), -2, precision))
    if low_rank:
        terms.append(equation.result(functools.reduce(jnp.add, low_rank)))
    if da is not None:
        terms.append(y * equation.on_y(da / a))
    return y, functools.reduce(jnp.add, terms) if terms else jnp.zeros_like(y)


_dense.defjvp(_dense_jvp, symbolic_zeros=True)


def _known(tangent: Any) -> Any:
    """The tangent, or ``None`` where it is zero."""
    zero = isinstance(tangent, jax.custom_derivatives.SymbolicZero)
    return None if zero or tangent is None else tangent


# --- DoRA's norm ---


def normalized(kernel: chex.Array, adapter: Adapter) -> Adapter:
    """The adapter as its layer has it: with ``a = m / ||W + s U V||_c`` in the place of ``m``.

    Args:
      kernel: as it is stored.
      adapter: its adapter, or several on an axis in front.
    """
    if adapter.variant != "dora":
        return adapter
    ratio = functools.partial(
        _ratio, axes=adapter.axes, s=adapter.scale, detach_norm=adapter.detach_norm
    )
    if adapter.count is not None:
        ratio = jax.vmap(ratio, in_axes=(None, 0, 0, 0))
    arrays = kernel, adapter.U, adapter.V, adapter.m
    a = left_to_compiler(ratio, *arrays, like=adapter.m)
    return adapter.replace(m=a)  # type: ignore[attr-defined, no-any-return]


@functools.partial(jax.jit, static_argnames=("axes", "s", "detach_norm"))
def _ratio(
    kernel: chex.Array,
    U: chex.Array,
    V: chex.Array,
    m: chex.Array,
    *,
    axes: KernelAxes,
    s: float,
    detach_norm: bool,
) -> chex.Array:
    W = axes.as_matrix(kernel)
    dtype = float32_or_more(W.dtype)
    W, U, V, m = (array.astype(dtype) for array in (W, U, V, m))
    norm = factored_norm(W, U, V, s, m)
    if detach_norm:
        norm = jax.lax.stop_gradient(norm)
    return magnitude_ratio(m, norm)


def factored_norm(
    W: chex.Array, U: chex.Array, V: chex.Array, s: float, m: chex.Array | None = None
) -> chex.Array:
    """``||W + s U V||_c`` without the product ``U V``: ``(d, k), (d, r), (r, k) -> (k,)``.

    Leading axes may stack. The terms of its square are sums of ``d`` numbers, whose rounding errors
    grow as ``sqrt(d)``. Where the terms cancel, the norm is known no better than to these; and
    where ``m`` is as near as that, it is taken for the norm. So a LoRA that :func:`lora_jax.stack`
    has made a DoRA, with its own norm for ``m``, keeps ``m / norm = 1`` in every column.

    Args:
      W: the kernel.
      U: left factor.
      V: right factor.
      s: the scale.
      m: the magnitude, if it may be the norm; it has no gradient here.

    Example:
      >>> W, U, V = jnp.ones((4, 3)), jnp.ones((4, 1)), jnp.ones((1, 3))
      >>> factored_norm(W, U, V, 0.5)
      Array([3., 3., 3.], dtype=float32)
    """
    transposed = U.swapaxes(-1, -2)
    squared = jnp.sum(jnp.square(W), axis=-2)
    cross = jnp.sum(product(transposed, W) * V, axis=-2)
    quadratic = jnp.sum(product(product(transposed, U), V) * V, axis=-2)
    terms = squared + s**2 * quadratic
    total = terms + 2 * s * cross
    if m is not None:
        known = jnp.square(jax.lax.stop_gradient(m))
        error = W.shape[-2] ** 0.5 * np.finfo(W.dtype).eps * terms
        same = (total < terms / 2) & (jnp.abs(total - known) <= error)
        total = jnp.where(same, known + (total - jax.lax.stop_gradient(total)), total)
    return safe_sqrt(total)


@jax.jit
def dense_norm(kernel: chex.Array, adapter: Adapter) -> chex.Array:
    """``||W + s U V||_c`` with ``U V`` formed, which loses no digits where they cancel.

    Args:
      kernel: as it is stored.
      adapter: its adapter, or several on an axis in front, of which one after another is formed.

    Returns:
      ``(*stack, k)`` in float32 or more.

    Example:
      >>> dense_norm(jnp.ones((4, 3)), Adapter(jnp.ones((4, 1)), -jnp.ones((1, 3))))
      Array([0., 0., 0.], dtype=float32)
    """
    if adapter.count is not None:
        norms: chex.Array = jax.lax.map(functools.partial(dense_norm, kernel), adapter)
        return norms

    def norm(kernel: chex.Array, U: chex.Array, V: chex.Array) -> chex.Array:
        W = adapter.axes.as_matrix(kernel)
        W = W.astype(float32_or_more(W.dtype))
        U, V = U.astype(W.dtype), V.astype(W.dtype)
        return column_norm(W + adapter.scale * product(U, V))

    *stack, _, k = spec_of(adapter.V)
    like = PartitionSpec(*stack, k)
    one: chex.Array = left_to_compiler(norm, kernel, adapter.U, adapter.V, like=like)
    return one
