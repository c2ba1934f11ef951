"""Calling a model with its variables, and what it is that is called.

A model is a ``flax.linen`` module, or a Flax model of Hugging Face, which has one as
``model.module`` and is called as ``model(*args, params=..., **kwargs)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn


def check_model(model: Any, variables: Any, name: str) -> None:
    """Checks that the first two arguments are a model and its variables.

    Args:
      model: the first argument.
      variables: the second one.
      name: of the function that was called.

    Raises:
      TypeError: if ``model`` is neither a ``flax.linen`` module nor a model of Hugging Face.
      ValueError: if ``variables`` does not have the collection ``"params"``.
    """
    if not isinstance(model, nn.Module) and not _is_hugging_face(model):
        raise TypeError(
            f"{name} is for flax.linen modules, for Flax models of Hugging Face, which have one as "
            f"model.module, and for NNX models, by graphdef, state = nnx.split(model); got "
            f"{type(model).__name__}."
        )
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise ValueError(
            f"{name} takes the model's variables, which have the collection 'params' and others "
            f"beside it; got {type(variables).__name__}. Pass {{'params': params}}, where params "
            f"may be the frozen base."
        )


def call_model(
    model: Any, variables: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """``model.apply``; a model of Hugging Face takes its variables as ``params=``."""
    if isinstance(model, nn.Module):
        return model.apply(variables, *args, **kwargs)
    kwargs = dict(kwargs)
    method = kwargs.pop("method", None) or "__call__"
    bound = getattr(model, method if isinstance(method, str) else method.__name__)
    params = variables["params"] if set(variables) == {"params"} else variables
    return bound(*args, params=params, **kwargs)


def gives_variables(kwargs: Mapping[str, Any]) -> bool:
    """Whether ``apply`` gives a result and variables, by its arguments."""
    return kwargs.get("mutable", False) is not False or bool(kwargs.get("capture_intermediates"))


def _is_hugging_face(model: Any) -> bool:
    return callable(model) and isinstance(getattr(model, "module", None), nn.Module)
