"""Which layers can be adapted, and by which handlers: those of a call, or those registered."""

from __future__ import annotations

import dataclasses
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any

from lora_jax._compat import is_module_class
from lora_jax.layers._entry import Entry, Handler, MethodKey, body, keys_of

# The layers that this library knows: each front end adds its own when it is imported.
_BUILT_IN: dict[MethodKey, Entry] = {}


@dataclasses.dataclass(frozen=True, repr=False)
class Handlers:
    """Which layers can be adapted, and by which handlers.

    ``Handlers()`` has those of this library, :meth:`registered` also those that
    :func:`lora_jax.register` has added. It is immutable: :meth:`with_handler` and :meth:`without`
    return another one. A call of :func:`lora_jax.lora_apply`, :func:`lora_jax.kernel_axes` or
    :func:`lora_jax.lora_init_model` with ``handlers=`` looks at nothing else.

    The handler of a layer computes what the layer's method does, with an :class:`AdaptedKernel` in
    the place of each kernel (``None`` where the module does not have it). It is called instead of
    the method, in this class and in subclasses that call ``super()``, and gets the module, the
    kernels, and the arguments of the call.

    Two are equal if they have the same functions for the same methods. So one that a training step
    makes anew from the same functions does not make ``nn.jit`` trace again.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lora_jax
      >>> class Experts(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):  # (experts, tokens, d)
      ...         w = self.param("w", nn.initializers.normal(), (8, x.shape[-1], 16))
      ...         return nn.relu(jnp.einsum("etd,edk->etk", x, w))
      >>> def experts(layer, w, x):
      ...     return nn.relu(w.einsum("etd,edk->etk", x))
      >>> handlers = lora_jax.Handlers().with_handler(Experts, "w", handler=experts)
      >>> model, x = Experts(), jnp.ones((8, 3, 6))
      >>> variables = model.init(jax.random.key(0), x)
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("w", rank=2)])
      >>> frozen, adapters = lora_jax.lora_init_model(
      ...     jax.random.key(1), model, variables, config, x, handlers=handlers
      ... )
      >>> lora_jax.lora_apply(model, {"params": frozen}, adapters, x, handlers=handlers).shape
      (8, 3, 16)
    """

    _entries: Mapping[MethodKey, Entry] = dataclasses.field(
        default_factory=lambda: types.MappingProxyType(_BUILT_IN), init=False
    )

    @staticmethod
    def registered() -> Handlers:
        """The handlers that are registered now: what a call without ``handlers=`` uses.

        Example:
          >>> import flax.linen as nn, lora_jax
          >>> handlers = lora_jax.Handlers.registered().without(nn.Embed, method="attend")
          >>> handlers == lora_jax.Handlers.registered()
          False
        """
        return _registered

    def with_handler(
        self,
        cls: type[Any],
        *kernels: str,
        handler: Handler,
        method: str = "__call__",
        override: bool = False,
    ) -> Handlers:
        """These handlers and one more.

        Args:
          cls: the module class; ``method`` must be defined in its own body.
          *kernels: names of its parameters that can be adapted.
          handler: computes what the method does, ``handler(module, *kernels, *args, **kwargs)``.
          method: the method that uses them; each method that does needs a handler.
          override: replace a handler that is there for the method. (The same function may be added
            again without it.)

        Returns:
          Other handlers; these are as they were.

        Raises:
          TypeError: if ``cls`` is not a module class of ``flax.linen`` or ``flax.nnx``, or
            ``handler`` not callable.
          ValueError: if there are no kernels, if the class inherits the method or does not have
            it, or if the method has a handler already.
        """
        return self._with("with_handler", cls, kernels, handler, method, override)

    def without(self, cls: type[Any], *, method: str = "__call__") -> Handlers:
        """These handlers without that of a method, whose layer then cannot be adapted.

        Args:
          cls: the module class; ``method`` must be defined in its own body.
          method: the method.

        Raises:
          TypeError: if ``cls`` is not a module class of ``flax.linen`` or ``flax.nnx``.
          ValueError: if the class inherits the method or does not have it, or if the method has no
            handler.

        Example:
          >>> import flax.linen as nn, jax, jax.numpy as jnp, lora_jax
          >>> handlers = lora_jax.Handlers().without(nn.Dense)
          >>> model, x = nn.Dense(3), jnp.ones((2, 5))
          >>> variables = model.init(jax.random.key(0), x)
          >>> list(lora_jax.kernel_axes(model, variables, x, handlers=handlers))
          []
        """
        _check_class("without", cls)
        function = _own_method("without", cls, method)
        if entry_of(self, function) is None:
            raise ValueError(f"without({cls.__name__}, ...): its {method} has no handler.")
        gone = keys_of(function)
        return _handlers({key: entry for key, entry in self._entries.items() if key not in gone})

    def __repr__(self) -> str:
        return f"Handlers({known_layers(self)})"

    def __hash__(self) -> int:
        return hash(frozenset(self._entries))  # handlers that are callable objects may have none

    def __deepcopy__(self, memo: dict[int, Any]) -> Handlers:
        return self  # immutable

    def _with(
        self,
        caller: str,
        cls: type[Any],
        kernels: tuple[str, ...],
        handler: Handler,
        method: str,
        override: bool,
    ) -> Handlers:
        function = self._check_free(caller, cls, kernels, method, override)
        if not callable(handler):
            raise TypeError(
                f"{caller}({cls.__name__}, ...): the handler must be a function, got {handler!r}."
            )
        there = entry_of(self, function)
        if there is not None and there.handler is not handler and not override:
            name = getattr(there.handler, "__qualname__", repr(there.handler))
            raise ValueError(
                f"{caller}({cls.__name__}, ...): its {method} has the handler {name} for "
                f"{there.kernels} already. To replace it, pass override=True."
            )
        entry = Entry(cls.__qualname__, kernels, handler, built_in=False)
        return _handlers({**self._entries, function: entry})

    def _check_free(
        self,
        caller: str,
        cls: type[Any],
        kernels: tuple[str, ...],
        method: str,
        override: bool,
    ) -> Callable[..., Any]:
        """The method as a function, which has no handler that is for other kernels."""
        _check_class(caller, cls)
        if not kernels or not all(isinstance(name, str) for name in kernels):
            raise ValueError(
                f"{caller}({cls.__name__}, ...): name the parameters that are kernels."
            )
        function = _own_method(caller, cls, method)
        there = entry_of(self, function)
        if there is not None and (there.built_in or there.kernels != kernels) and not override:
            what = "of this library" if there.built_in else f"for {there.kernels}"
            raise ValueError(
                f"{caller}({cls.__name__}, ...): its {method} has a handler {what}. One handler "
                f"gets all kernels of a method: name them all, {caller}({cls.__name__}, 'a', 'b'). "
                f"To replace the handler, pass override=True."
            )
        return function


_registered = Handlers()
_REGISTERING = threading.Lock()  # two threads that register at once both count


def register(
    cls: type[Any],
    *kernels: str,
    method: str = "__call__",
    override: bool = False,
) -> Callable[[Handler], Handler]:
    """Teaches the library a layer of your own: a decorator for its handler.

    It adds to the handlers that every later call uses which is not given ``handlers=``; what
    ``jax.jit`` has traced before is as it was. To say it for some calls only, see
    :class:`lora_jax.Handlers`, which also says what a handler is.
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
      TypeError: if ``cls`` is not a module class of ``flax.linen`` or ``flax.nnx``.
      ValueError: if there are no kernels, if the class inherits the method or does not have it,
        or if the method has a handler already.

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
    _registered._check_free("register", cls, kernels, method, override)

    def decorate(handler: Handler) -> Handler:
        global _registered
        with _REGISTERING:
            _registered = _registered._with("register", cls, kernels, handler, method, override)
        return handler

    return decorate


def handlers_of_call(handlers: Any) -> Handlers:
    """The handlers that a call is given, or those that are registered.

    Raises:
      TypeError: if it is given something else.
    """
    if handlers is None:
        return _registered
    if not isinstance(handlers, Handlers):
        raise TypeError(
            f"handlers must be lora_jax.Handlers, got {type(handlers).__name__}. (An argument "
            f"of the model with this name can be passed by position only.)"
        )
    return handlers


def entry_of(handlers: Handlers, method: Callable[..., Any]) -> Entry | None:
    """The entry for a method of a module."""
    function, name = keys_of(method)
    return handlers._entries.get(function) or handlers._entries.get(name)


def entries_of(handlers: Handlers, cls: type[Any]) -> list[Entry]:
    """The entries for methods of a class and of those that it derives from."""
    methods = [value for base in cls.__mro__ for value in vars(base).values()]
    entries = [entry_of(handlers, method) for method in methods if callable(method)]
    return [entry for entry in entries if entry is not None]


def known_layers(handlers: Handlers, *, other_than: str = "") -> str:
    """The layers that have a handler, for messages.

    Args:
      handlers: the handlers.
      other_than: the prefix of the layers of the other front end.
    """
    names = dict.fromkeys(entry.layer for entry in handlers._entries.values())
    return ", ".join(name for name in names if not (other_than and name.startswith(other_than)))


def add_built_in(layers: Mapping[MethodKey, Entry]) -> None:
    """Adds the layers of a front end to those that this library knows."""
    _BUILT_IN.update(layers)


def _handlers(entries: Mapping[MethodKey, Entry]) -> Handlers:
    handlers = Handlers()
    object.__setattr__(handlers, "_entries", types.MappingProxyType(entries))
    return handlers


def _check_class(caller: str, cls: Any) -> None:
    if not is_module_class(cls):
        raise TypeError(f"{caller} is for classes of flax.linen and flax.nnx modules, got {cls!r}.")


def _own_method(caller: str, cls: type[Any], method: str) -> Callable[..., Any]:
    """The function of a method that a class defines itself."""
    if method not in vars(cls):
        owners = [base.__name__ for base in cls.__mro__ if method in vars(base)]
        inherited = f"It inherits it from {owners[0]}: pass that class." if owners else ""
        raise ValueError(
            f"{caller}({cls.__name__}, method={method!r}): the class does not define {method} "
            f"itself. {inherited}"
        )
    return body(getattr(cls, method))
