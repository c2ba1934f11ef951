"""DoRA (Liu et al. 2024, equation 5):

    W' = m (W + s U V) / ||W + s U V||_c

``m`` is ``(k,)`` and starts at ``||W||_c``, so that ``W'`` starts at ``W``. The norm ``||.||_c`` is
one norm for each column of ``W``, which is one for each *output feature*: axis ``-2`` here. PyTorch
stores weights ``(out, in)``, so that there the same norm reads ``dim=1``.

In each call of a model the norm is computed without forming ``U V`` (:func:`factored_norm`):

    ||W + s U V||_c^2 = ||W||_c^2 + 2 s sum_r (U^T W) * V + s^2 sum_r (U^T U V) * V.

Where the adapter removes most of a column these terms cancel, and leave their rounding errors. What
is computed once, and not in every step, therefore forms ``U V`` (:meth:`DoRA.exact_normal_form`).
"""  # noqa: D415

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core._numerics import column_norm, magnitude_ratio, product, safe_sqrt
from lora_jax.core._split_product import exact_product
from lora_jax.core.variants._variant import NormalForm, Variant

if TYPE_CHECKING:
    from lora_jax.core.rules._rule import Rule


@dataclasses.dataclass(frozen=True, eq=False)
class DoRA(Variant):
    """DoRA (Liu et al. 2024, equation 5): ``W' = m (W + s U V) / ||W + s U V||_c``.

    Attributes:
      detach_norm: whether the norm is a constant in the gradient (section 4.3 of the paper, and
        what PEFT does).
    """

    detach_norm: bool = False

    name: ClassVar[str] = "dora"
    takes_stacks: ClassVar[bool] = True
    takes_16_bits: ClassVar[bool] = True

    def shapes(self, d: int, k: int, r: int) -> dict[str, tuple[int, ...]]:
        """``U``, ``V`` and the magnitude ``m``."""
        return {"U": (d, r), "V": (r, k), "m": (k,)}

    def init(self, key: chex.PRNGKey, W: chex.Array, rule: Rule) -> dict[str, chex.Array]:
        """The factors of LoRA, and ``m = ||W||_c``."""
        U, V = self.init_factors(key, W, rule)
        return {"U": U, "V": V, "m": column_norm(W)}

    def kernel(  # type: ignore[override]
        self, W: chex.Array, s: float, U: chex.Array, V: chex.Array, m: chex.Array
    ) -> chex.Array:
        """``m (W + s U V) / ||W + s U V||_c``."""
        adapted = W + s * product(U, V)
        norm = self._in_gradient(column_norm(adapted))
        return magnitude_ratio(m, norm)[..., None, :] * adapted

    def normal_form(  # type: ignore[override]
        self, W: chex.Array, s: float, U: chex.Array, V: chex.Array, m: chex.Array
    ) -> NormalForm:
        """``(m / ||W + s U V||_c, U, V)``."""
        norm = self._in_gradient(factored_norm(W, U, V, s, m))
        return NormalForm(magnitude_ratio(m, norm), U, V)

    def exact_normal_form(  # type: ignore[override]
        self, W: chex.Array, s: float, U: chex.Array, V: chex.Array, m: chex.Array
    ) -> NormalForm:
        """The normal form with ``U V`` formed, which loses no digits where terms cancel."""
        norm = self._in_gradient(column_norm(W + s * product(U, V)))
        return NormalForm(magnitude_ratio(m, norm), U, V)

    def _in_gradient(self, norm: chex.Array) -> chex.Array:
        return jax.lax.stop_gradient(norm) if self.detach_norm else norm


def factored_norm(
    W: chex.Array, U: chex.Array, V: chex.Array, s: float, m: chex.Array | None = None
) -> chex.Array:
    """``||W + s U V||_c`` without the product ``U V``: ``(d, k), (d, r), (r, k) -> (k,)``.

    Leading axes may stack. The terms of its square are sums of ``d`` numbers, whose rounding errors
    grow as ``sqrt(d)``. Where the terms cancel, the norm is known no better than to these; and
    where ``m`` is as near as that, it is taken for the norm. So a LoRA that :func:`lora_jax.stack`
    has made a DoRA, with its own norm for ``m``, keeps ``m / norm = 1`` in every column.

    Args:
      W: the kernel, in any dtype.
      U: left factor, in float32 or more.
      V: right factor.
      s: the scale.
      m: the magnitude, if it may be the norm; it has no gradient here.

    Example:
      >>> W, U, V = jnp.ones((4, 3)), jnp.ones((4, 1)), jnp.ones((1, 3))
      >>> factored_norm(W, U, V, 0.5)
      Array([3., 3., 3.], dtype=float32)
    """
    transposed = U.swapaxes(-1, -2)
    squared = jnp.sum(jnp.square(W.astype(V.dtype)), axis=-2)
    cross = jnp.sum(exact_product(transposed, W) * V, axis=-2)
    quadratic = jnp.sum(product(product(transposed, U), V) * V, axis=-2)
    terms = squared + s**2 * quadratic
    total = terms + 2 * s * cross
    if m is not None:
        known = jnp.square(jax.lax.stop_gradient(m))
        error = W.shape[-2] ** 0.5 * np.finfo(V.dtype).eps * terms
        same = (total < terms / 2) & (jnp.abs(total - known) <= error)
        total = jnp.where(same, known + (total - jax.lax.stop_gradient(total)), total)
    return safe_sqrt(total)
