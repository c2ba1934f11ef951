"""The type of the variables that are trained in a model that has its adapters in it."""

from __future__ import annotations

from typing import Any

from flax import nnx


class AdapterParam(nnx.LoRAParam[Any]):
    """A variable that is trained, in a model of :func:`lora_jax.lora_model`.

    It is an array of an adapter, or a leaf that is fully trained. It is a kind of
    ``nnx.LoRAParam``, so trainers that look for that find it.

    Example:
      >>> import optax
      >>> from flax import nnx
      >>> import lora_jax
      >>> optimizer_of = lambda model: nnx.Optimizer(
      ...     model, optax.adam(1e-3), wrt=lora_jax.AdapterParam
      ... )
    """

    is_of_lora_model = True
