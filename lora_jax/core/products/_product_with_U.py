"""``x U`` of a layer: what its gradient needs of the adapter, and so what has a name.

With ``nn.remat`` or ``jax.checkpoint`` a layer is computed again for its gradient. ``x U`` has only
``r`` numbers for each row, so it costs little to keep; a policy finds it by the name that
``jax.ad_checkpoint.checkpoint_name`` gives it. Forms for platforms are branches of a condition, and
what one of its branches keeps all of them must. So ``x U`` is computed, and named, in front of it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.core._numerics import known_tangent
from lora_jax.core.products._einsum_equation import Equation
from lora_jax.core.products._platform import by_platform
from lora_jax.core.products._skinny_matmul import merge_free_axes, times_U

NAME = "lora_xU"
_saveable = jax.checkpoint_policies.save_only_these_names(NAME)


def save_only_xU(prim: Any, *avals: Any, **params: Any) -> Any:
    """A policy of ``jax.checkpoint``: of a layer only ``x U`` of its adapters is kept.

    All else is computed again for the gradient, as without a policy. ``x U`` is ``r`` numbers for
    each token and adapted kernel, in the layer's dtype; kept, it is not computed again. It is for
    LoRA, DoRA and every other variant that computes with ``U`` and ``V``, in Linen and NNX, and for
    every layer but in mixed batches.

    Its name is ``"lora_xU"``, for policies of your own:
    ``jax.checkpoint_policies.save_only_these_names("lora_xU", "attention")``.

    Args:
      prim: the primitive, as ``jax.checkpoint`` gives it to a policy.
      *avals: the types of its operands.
      **params: its parameters.

    Returns:
      Whether its result is kept.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lora_jax
      >>> layer = nn.remat(nn.Dense, policy=lora_jax.save_only_xU)
      >>> model, x = nn.Sequential([layer(8), nn.tanh, layer(3)]), jnp.ones((4, 8))
      >>> variables = model.init(jax.random.key(0), x)
      >>> config = lora_jax.LoraConfig([lora_jax.Rule(".*kernel", rank=2)])
      >>> frozen, adapters = lora_jax.lora_init(jax.random.key(1), variables["params"], config)
      >>> def loss(adapters):
      ...     return lora_jax.lora_apply(model, {"params": frozen}, adapters, x).sum()
      >>> jax.grad(loss)(adapters)["layers_0"]["kernel"].U.shape
      (8, 2)
    """
    return _saveable(prim, *avals, **params)


def named_xU(xU: chex.Array) -> chex.Array:
    """``x U`` by its name."""
    named: chex.Array = checkpoint_name(xU, NAME)
    return named


def product_with_U(
    x: chex.Array,
    U: chex.Array,
    *,
    equation: Equation,
    precision: jax.lax.PrecisionLike,
    exact_on: Sequence[str] = (),
) -> chex.Array:
    """``x U`` by its name, ``(*batch, *free, r)``.

    Args:
      x: the input.
      U: left factor.
      equation: of ``x``, the kernel and the result.
      precision: of the product.
      exact_on: platforms on which it is at full precision unless another one is asked for.
    """

    def form(x: chex.Array, U: chex.Array, *, platform: str) -> chex.Array:
        exact = precision is None and platform in exact_on
        own = jax.lax.Precision.HIGHEST if exact else precision
        return _product_with_U(x, U, equation=equation, precision=own, platform=platform)

    return named_xU(by_platform(form, x, U))


def known_xU(x: chex.Array, U: chex.Array, **static: Any) -> chex.Array:
    """The same without a derivative, which :func:`with_derivative` gives it.

    So it can be computed outside of forms of which some need it for their derivative only.
    """
    x, U = map(jax.lax.stop_gradient, (x, U))
    return product_with_U(x, U, **static)


def _product_with_U(
    x: chex.Array,
    U: chex.Array,
    *,
    equation: Equation,
    precision: jax.lax.PrecisionLike,
    platform: str,
) -> chex.Array:
    x = equation.operand(x)
    rows = merge_free_axes(x, len(equation.axes.batch), platform)
    form: dict[str, Any] = {"platform": platform, "W_is_transposed": equation.is_transposed}
    xU = times_U(rows, U.astype(x.dtype), precision, **form)
    return jnp.reshape(xU, (*x.shape[:-1], U.shape[-1]))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def with_derivative(
    xU: chex.Array,
    x: chex.Array,
    U: chex.Array,
    equation: Equation,
    precision: jax.lax.PrecisionLike,
    platform: str,
) -> chex.Array:
    """``x U`` that is known, with the derivative of the product."""
    return xU


def _with_derivative_jvp(
    equation: Equation,
    precision: jax.lax.PrecisionLike,
    platform: str,
    primals: Sequence[Any],
    tangents: Sequence[Any],
) -> tuple[chex.Array, chex.Array]:
    xU, x, U = primals
    _, dx, dU = map(known_tangent, tangents)
    product = functools.partial(
        _product_with_U, equation=equation, precision=precision, platform=platform
    )
    terms = [] if dx is None else [product(dx, U)]
    if dU is not None:
        terms.append(product(x, dU))
    out = with_derivative(xU, x, U, equation, precision, platform)
    return out, functools.reduce(jnp.add, terms) if terms else jnp.zeros_like(xU)


with_derivative.defjvp(_with_derivative_jvp, symbolic_zeros=True)
