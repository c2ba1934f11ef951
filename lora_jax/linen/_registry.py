"""Which layers can be adapted, and by which handler."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from lora_jax.core._kernel import AdaptedKernel

# Computes the layer's output: of the layer, its kernels, Flax's own call, and its arguments.
Handler = Callable[..., Any]
Names = Callable[[nn.Module], tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """How a method is adapted.

    Attributes:
      layer: what the layer is called in messages.
      names: the names of its kernels.
      handler: computes the output.
      registered: the names that a user has registered it for; ``None`` for a built-in one.
      given: the user's own function.
    """

    layer: str
    names: Names
    handler: Handler
    registered: tuple[str, ...] | None = None
    given: Callable[..., Any] | None = None


# By the function in the class body: a subclass that calls super().__call__ reaches it once,
# where the product is, and a lifted class reaches it inside its transform. By the name of that
# function, for layers of packages that are not imported here.
_ENTRIES: dict[Callable[..., Any] | str, Entry] = {}


def body(method: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it stands in the class body, below what Flax wraps around it."""
    function: Callable[..., Any] = inspect.unwrap(getattr(method, "func", method))
    return function


def enter(key: Callable[..., Any] | str, layer: str, names: str | Names, handler: Handler) -> None:
    """Enters a built-in handler, which also gets Flax's own call of the layer."""
    one = names if callable(names) else lambda _: (names,)
    _ENTRIES[key if isinstance(key, str) else body(key)] = Entry(layer, one, handler)


def entry_of(method: Callable[..., Any]) -> Entry | None:
    """The entry for a method of a module."""
    function = body(method)
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
    return _ENTRIES.get(function) or _ENTRIES.get(name)


def entries_of(cls: type[nn.Module]) -> list[Entry]:
    """The entries for methods of a class and of those that it derives from."""
    methods = (value for base in cls.__mro__ for value in vars(base).values() if callable(value))
    return [entry for method in methods if (entry := entry_of(method)) is not None]


def known_layers() -> str:
    """The layers that have a handler, for messages."""
    return ", ".join(dict.fromkeys(entry.layer for entry in _ENTRIES.values()))


def register(
    cls: type[nn.Module],
    *kernels: str,
    method: str = "__call__",
    override: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Teaches the library a layer of your own: a decorator for its handler.

    The handler is the layer's method once more, with an :class:`AdaptedKernel` in the place of
    each kernel (``None`` where the module does not have it). It is called instead of the method,
    in this and in subclasses that call ``super()``, and gets the module, the kernels, and the
    arguments of the call.
    :func:`lora_jax.kernel_axes` learns from it which axes of the kernel are what.

    Args:
      cls: the module class; ``method`` must be defined in its own body.
      *kernels: names of its parameters that can be adapted.
      method: the method that uses them; register each one that does.
      override: replace a handler that this library has for the layer itself, or one that was
        registered before. (The same function may be registered again without it.)

    Returns:
      A decorator, which returns the handler unchanged.

    Raises:
      TypeError: ``cls`` is no ``flax.linen`` module class.
      ValueError: no kernels, a method that the class inherits or does not have, or one that has
        a handler already.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lora_jax
      >>> class Experts(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):  # (experts, tokens, d)
      ...         w = self.param("w", nn.initializers.normal(), (8, x.shape[-1], 16))
      ...         return nn.relu(jnp.einsum("etd,edk->etk", x, w))
      >>> @lora_jax.register(Experts, "w")
      ... def experts(layer, w, x):
      ...     return nn.relu(w.einsum("etd,edk->etk", x))
      >>> model, x = Experts(), jnp.ones((8, 3, 6))
      >>> variables = model.init(jax.random.key(0), x)
      >>> axes = lora_jax.kernel_axes(model, variables, x)
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("w", rank=2, variant="dora")])
      >>> frozen, adapters = lora_jax.lora_init(
      ...     jax.random.key(1), variables["params"], config, axes=axes
      ... )
      >>> adapters["w"].U.shape, adapters["w"].V.shape, adapters["w"].m.shape
      ((8, 6, 2), (8, 2, 16), (8, 16))
      >>> lora_jax.lora_apply(model, {"params": frozen}, adapters, x).shape
      (8, 3, 16)
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register is for flax.linen module classes, got {cls!r}.")
    if not kernels or not all(isinstance(name, str) for name in kernels):
        raise ValueError(f"register({cls.__name__}, ...): name the parameters that are kernels.")
    if method not in vars(cls):
        owners = [base.__name__ for base in cls.__mro__ if method in vars(base)]
        inherited = f"It inherits it from {owners[0]}: register that." if owners else ""
        raise ValueError(
            f"register({cls.__name__}, method={method!r}): the class does not define {method} "
            f"itself. {inherited}"
        )
    function = body(getattr(cls, method))
    there = _ENTRIES.get(function)
    if there is not None and there.registered != kernels and not override:
        what = "of this library" if there.registered is None else f"for {there.registered}"
        raise ValueError(
            f"register({cls.__name__}, ...): its {method} has a handler {what}. One handler gets "
            f"all kernels of a method: name them all, register({cls.__name__}, 'a', 'b'). To "
            f"replace the handler, pass override=True."
        )

    def decorate(handler: Callable[..., Any]) -> Callable[..., Any]:
        def without_call(
            layer: nn.Module,
            kernels: tuple[AdaptedKernel, ...],
            call: Callable[..., Any],
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            del call
            return handler(layer, *kernels, *args, **kwargs)

        there = _ENTRIES.get(function)
        if there is not None and there.given is not handler and not override:
            name = getattr(there.given, "__qualname__", repr(there.given))
            raise ValueError(
                f"register({cls.__name__}, ...): its {method} has the handler {name} for "
                f"{there.registered} already. To replace it, pass override=True."
            )
        _ENTRIES[function] = Entry(
            cls.__qualname__, lambda _: kernels, without_call, kernels, handler
        )
        return handler

    return decorate
