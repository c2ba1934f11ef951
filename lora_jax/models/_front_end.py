"""Which library a model is of, and so which front end it has."""

from __future__ import annotations

from typing import Any

from lora_jax.layers._handlers import add_built_in
from lora_jax.linen._flax_layers import LAYERS as LINEN
from lora_jax.linen._model import LinenModel
from lora_jax.linen._third_party_layers import PACKAGES as LINEN_PACKAGES
from lora_jax.nnx._flax_layers import LAYERS as NNX
from lora_jax.nnx._model import NnxModel, is_nnx
from lora_jax.nnx._third_party_layers import PACKAGES as NNX_PACKAGES

add_built_in({**LINEN, **LINEN_PACKAGES, **NNX, **NNX_PACKAGES})


def front_end(model: Any, variables: Any, name: str) -> LinenModel | NnxModel:
    """The model and its variables, checked.

    Args:
      model: the model that a function was given.
      variables: its variables.
      name: of the function, for messages.

    Raises:
      TypeError: if the model is of neither library, or the variables are not of its own.
      ValueError: if the variables lack what the model needs.
    """
    if is_nnx(model) or is_nnx(variables):
        return NnxModel.of(model, variables, name)
    return LinenModel.of(model, variables, name)
