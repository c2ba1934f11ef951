"""Calling an NNX model, and what it is that is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def call_model(model: Any, method: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """``model(*args, **kwargs)``, or another method by its name or as a function."""
    function: Callable[..., Any]
    if method is None or isinstance(method, str):
        function = getattr(model, method or "__call__")
        return function(*args, **kwargs)
    function = getattr(method, "__func__", method)
    return function(model, *args, **kwargs)
