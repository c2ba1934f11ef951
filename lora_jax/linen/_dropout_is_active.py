"""Whether adapters have their dropout in a call, as its arguments say."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

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
