"""Calling a model with its variables, and what the arguments of the call say.

A model is a ``flax.linen`` module, or a Flax model of Hugging Face, which has one as
``model.module`` and is called as ``model(*args, params=..., **kwargs)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from lora_jax.tracing._rows import gives_variables

# Arguments by which Flax models are told that they are evaluated, with the value that says so.
_EVALUATES = {
    "deterministic": True,
    "train": False,
    "training": False,
    "is_training": False,
    "enable_dropout": False,
}
# Arguments of ``apply`` itself.
_OF_APPLY = ("rngs", "mutable", "method", "capture_intermediates")


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
            f"{name} is for flax.linen modules, and for Flax models of Hugging Face, which have "
            f"one as model.module; got {type(model).__name__}."
        )
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise ValueError("variables must have the collection 'params': pass {'params': frozen}.")


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


def name_of_call(kwargs: Mapping[str, Any]) -> str:
    """What is called, as far as what a model reads depends on it.

    Example:
      >>> name_of_call({}), name_of_call({"method": "encode", "mutable": ["cache"]})
      ('__call__', 'encode, with variables')
    """
    method = kwargs.get("method") or "__call__"
    name = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
    return f"{name}, with variables" if gives_variables(kwargs) else name


def has_dropout_rng(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call passes a key for dropout."""
    rngs = kwargs.get("rngs")
    has_rng = isinstance(rngs, Mapping) and "dropout" in rngs
    return has_rng or kwargs.get("dropout_rng") is not None


def dropout_is_active(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call passes a key for dropout, and does not say that it evaluates.

    It may say so by an argument, or by the default of the model's method.
    """
    if not has_dropout_rng(kwargs):
        return False
    method = kwargs.get("method") or "__call__"
    function = getattr(type(model), method, None) if isinstance(method, str) else method
    function = getattr(function, "__func__", function)
    given = dict(kwargs)
    of_model = {name: value for name, value in kwargs.items() if name not in _OF_APPLY}
    try:
        bound = inspect.signature(function).bind_partial(model, *args, **of_model)  # type: ignore[arg-type]
        bound.apply_defaults()
        given |= bound.arguments
    except (TypeError, ValueError):  # the call itself will say what is wrong with it
        pass
    return not any(
        isinstance(given.get(name), bool | np.bool_) and bool(given[name]) is value
        for name, value in _EVALUATES.items()
    )


def _is_hugging_face(model: Any) -> bool:
    return callable(model) and isinstance(getattr(model, "module", None), nn.Module)
