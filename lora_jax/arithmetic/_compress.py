"""Adapters with a lower rank."""

from __future__ import annotations

import chex

from lora_jax._deprecated import renamed_arguments
from lora_jax.arithmetic._combine_trees import checked_trees, combine_trees
from lora_jax.arithmetic._options import Plan
from lora_jax.arithmetic._report import ApproximationReport


@renamed_arguments(energy="explained_variance")
def compress(
    adapters: chex.ArrayTree,
    *,
    rank: int | None = None,
    explained_variance: float | None = None,
    params: chex.ArrayTree | None = None,
    variant: str | None = None,
) -> tuple[chex.ArrayTree, ApproximationReport]:
    """The same adapters with a lower rank, by singular values.

    Args:
      adapters: a tree as :func:`lora_jax.lora_init` or :func:`lora_jax.load` return it.
      rank: as for :func:`lora_jax.combine`; or
      explained_variance: likewise. One of the two is needed.
      params: as for :func:`lora_jax.combine`; DoRA needs it.
      variant: ``"lora"`` makes every DoRA a LoRA, by the singular values of the dense ``W' - W``.
        It needs a far higher rank for the same error, as a change of magnitudes has all ranks.

    Returns:
      ``(adapters, report)``, as :func:`lora_jax.combine`.

    Raises:
      TypeError: if :func:`lora_jax.combine` refuses the types.
      ValueError: likewise; if there is neither a rank nor an explained_variance, or both.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=4)])
      >>> _, adapters = lora_jax.lora_init(jax.random.key(0), {"kernel": jnp.ones((8, 6))}, config)
      >>> adapters["kernel"] = adapters["kernel"].replace(U=jnp.eye(8, 4))
      >>> adapters, report = lora_jax.compress(adapters, explained_variance=0.9)
      >>> adapters["kernel"].rank, report["kernel"].error < 0.1**0.5
      (2, True)
    """
    if (rank is None) == (explained_variance is None):
        raise ValueError("compress needs either rank= or explained_variance=.")
    if variant not in (None, "lora"):
        raise ValueError(f"compress(variant=...) must be 'lora' or left out, got {variant!r}.")
    plan = Plan(rank=rank, explained_variance=explained_variance, as_lora=variant == "lora")
    return combine_trees(checked_trees([adapters]), [1.0], params, plan)
