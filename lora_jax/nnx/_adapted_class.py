"""A class for the class of a layer, whose methods compute with adapters.

A layer is adapted where *the function in the class body* runs that has a handler. So between each
class that has such a function and the classes that derive from it comes one of ours:

    class Mine(nnx.Linear):                    Adapted
        def __call__(self, x):                   Mine
            return gelu(super().__call__(x))       ours, around nnx.Linear.__call__
                                                     nnx.Linear

A module gets the class by ``__class__``; it is a part of its graphdef, and so goes through every
transform of NNX.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from flax import nnx

from lora_jax._compat import nnx_class_options
from lora_jax.core.products._adapted_kernel import ComputesItself
from lora_jax.layers._handlers import Handlers, entry_of
from lora_jax.nnx._calls import Call, call_under_way

# The attribute of a layer that has its adapters itself, with a call that is always under way.
OWN_CALL = "lora_jax_adapters"
# A class, the name of one of its methods, and the function in its body.
_Method = tuple[type[Any], str, Callable[..., Any]]


def adapted_class(cls: type[nnx.Module], handlers: Handlers) -> type[nnx.Module] | None:
    """The class whose methods compute with adapters; ``None`` where there is no handler for one.

    It is the same for the same methods, so that a model that is made again has the same graphdef.

    Args:
      cls: of a layer.
      handlers: say which methods have a handler.
    """
    methods = tuple(
        (base, name, function)
        for base in cls.__mro__
        for name, function in vars(base).items()
        if callable(function) and entry_of(handlers, function) is not None
    )
    return _class_of(cls, methods) if methods else None


def set_class(module: nnx.Module, cls: type[nnx.Module]) -> None:
    """Gives a module another class."""
    object.__setattr__(module, "__class__", cls)


@functools.lru_cache(maxsize=4096)
def _class_of(cls: type[nnx.Module], methods: tuple[_Method, ...]) -> type[nnx.Module]:
    bases: list[type[nnx.Module]] = []
    for base in dict.fromkeys(base for base, _, _ in methods):
        own = {name: _hooked(name, method) for owner, name, method in methods if owner is base}
        bases.append(_subclass(base, (base,), own))
    if bases[0].__mro__[1] is not cls:
        bases.insert(0, cls)
    return _subclass(cls, tuple(bases), {"_lora_jax_adapted": cls})


def _subclass(
    cls: type[Any], bases: tuple[type[Any], ...], namespace: dict[str, Any]
) -> type[nnx.Module]:
    """A class that goes by the name of another."""
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    metaclass: Any = type(cls)
    new: type[nnx.Module] = metaclass(
        cls.__name__, bases, {**named, **namespace}, **nnx_class_options(cls)
    )
    return new


def _hooked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A method that computes with the handler of the function, where its layer has an adapter."""

    @functools.wraps(function)
    def method(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        call: Call | None = vars(self).get(OWN_CALL) or call_under_way()
        entry = None if call is None else entry_of(call.handlers, function)
        if call is None or entry is None:
            return function(self, *args, **kwargs)
        call.called(self, entry)
        kernels = tuple(call.kernel(self, name, entry, n) for n in entry.names(self))
        if all(kernel is None for kernel in kernels):
            return function(self, *args, **kwargs)
        try:
            return entry.output(self, kernels, function, args, kwargs)
        except ComputesItself:
            return function(self, *args, **kwargs)

    return method


def own_class(module: nnx.Module) -> type[Any]:
    """The class of a module as its author wrote it."""
    cls = type(module)
    return getattr(cls, "_lora_jax_adapted", cls)
