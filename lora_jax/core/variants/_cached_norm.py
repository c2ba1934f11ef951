"""DoRA whose norm is computed already, ``a = m / ||W + s U V||_c``, for inference:

    W' = a (W + s U V)

:func:`lora_jax.cache_norm` makes it. It trains otherwise than DoRA, and no rule asks for it.
"""  # noqa: D415

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import chex
import jax.numpy as jnp

from lora_jax.core.variants._variant import NormalForm, Variant

if TYPE_CHECKING:
    from lora_jax.core.rules._rule import Rule


@dataclasses.dataclass(frozen=True, eq=False)
class CachedNorm(Variant):
    """``W' = a (W + s U V)``, where ``a`` has the place of ``m``."""

    name: ClassVar[str] = "scaled"
    takes_stacks: ClassVar[bool] = True

    def shapes(self, d: int, k: int, r: int) -> dict[str, tuple[int, ...]]:
        """``U``, ``V``, and ``a`` by the name of ``m``."""
        return {"U": (d, r), "V": (r, k), "m": (k,)}

    def init(self, key: chex.PRNGKey, W: chex.Array, rule: Rule) -> dict[str, chex.Array]:
        """The factors of LoRA, and 1."""
        U, V = self.init_factors(key, W, rule)
        return {"U": U, "V": V, "m": jnp.ones((*W.shape[:-2], W.shape[-1]), W.dtype)}

    def normal_form(  # type: ignore[override]
        self, W: chex.Array, s: float, U: chex.Array, V: chex.Array, m: chex.Array
    ) -> NormalForm:
        """``(a, U, V)``."""
        return NormalForm(m, U, V)
