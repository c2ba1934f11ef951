"""LoRA (Hu et al. 2021, equation 3):

    W' = W + s U V

``U`` is ``(d, r)`` and starts at zero, ``V`` is ``(r, k)`` and starts Gaussian.
"""  # noqa: D415

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import chex

from lora_jax.core._numerics import product
from lora_jax.core.variants._variant import NormalForm, Variant

if TYPE_CHECKING:
    from lora_jax.core.rules._rule import Rule


@dataclasses.dataclass(frozen=True, eq=False)
class LoRA(Variant):
    """LoRA (Hu et al. 2021, equation 3): ``W' = W + s U V``."""

    name: ClassVar[str] = "lora"
    takes_stacks: ClassVar[bool] = True

    def shapes(self, d: int, k: int, r: int) -> dict[str, tuple[int, ...]]:
        """``U`` and ``V``."""
        return {"U": (d, r), "V": (r, k)}

    def init(self, key: chex.PRNGKey, W: chex.Array, rule: Rule) -> dict[str, chex.Array]:
        """One factor at zero, the other one Gaussian."""
        U, V = self.init_factors(key, W, rule)
        return {"U": U, "V": V}

    def kernel(self, W: chex.Array, s: float, U: chex.Array, V: chex.Array) -> chex.Array:  # type: ignore[override]
        """``W + s U V``."""
        return W + s * product(U, V)

    def normal_form(self, W: chex.Array, s: float, U: chex.Array, V: chex.Array) -> NormalForm:  # type: ignore[override]
        """``(1, U, V)``."""
        return NormalForm(None, U, V)
