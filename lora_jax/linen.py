"""The interceptor: ``model.apply`` of a Flax Linen model, with adapters as one more argument.

The adapters are placed inside the ``params`` collection, each next to the kernel that it adapts,
and the interceptor reads them from the scope of the module that is being called. So they go
through every lifted transform (``nn.scan``, ``nn.vmap``, ``nn.remat``, ``nn.jit``) just as the
kernels do, and all that decides what is computed is in the structure of the variables, where the
cache of ``nn.jit`` sees it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter import Adapter
from lora_jax.product import adapted_product
from lora_jax.tree import Key, flatten, join, path_of, unbox, unflatten

# The name of an adapter is that of its parameter and this.
SUFFIX = "@lora"

# Arguments by which Flax models are told that they are evaluated, with the value that says so.
_EVALUATES = {"deterministic": True, "train": False, "training": False, "is_training": False}


def lora_apply(
    model: nn.Module,
    variables: Mapping[str, Any],
    adapters: chex.ArrayTree,
    *args: Any,
    allow_unused: bool = False,
    **kwargs: Any,
) -> Any:
    """``model.apply(variables, *args, **kwargs)`` of the adapted model.

    Every layer that has an adapter computes ``x W'`` in place of ``x W``, in its own dtype; the
    model's code is not changed and the base is not copied. Differentiate with respect to
    ``adapters``, and pass the base as an argument to the jitted function: what a jitted function
    closes over is compiled into it as a constant.

    Adapter dropout (``Rule(dropout=...)``) is active when the call passes a ``dropout`` rng,
    ``rngs={"dropout": key}``, and does not say that it evaluates: with a keyword argument
    ``deterministic=True``, ``train=False``, ``training=False`` or ``is_training=False``. So
    leave out the rng to switch it off in evaluation, or pass such an argument *by keyword*.

    Args:
      model: the model; it need not know of this library.
      variables: its variables, with the frozen base: ``{"params": frozen}``; other collections
        (``batch_stats``, ``cache``) as for ``model.apply``.
      adapters: the adapters from :func:`lora_jax.lora_init`.
      *args: for ``model.apply``.
      allow_unused: allow adapters that this call does not use, for a ``method`` that runs a part
        of the model. Otherwise they are an error: they would not be trained.
      **kwargs: for ``model.apply``: ``rngs``, ``mutable``, ``method``,
        ``capture_intermediates``, and the model's own.

    Returns:
      What ``model.apply`` returns.

    Raises:
      TypeError: ``model`` is no ``flax.linen`` module, or a tree is no nested dict.
      ValueError: the adapters do not fit the base or the model, or some were not used. The
        message names the culprit.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lora_jax
      >>> model, x = nn.Dense(3), jnp.ones((2, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=2)])
      >>> frozen, adapters = lora_jax.lora_init(jax.random.key(1), params, config)
      >>> def loss(adapters, frozen):
      ...     return jnp.mean(lora_jax.lora_apply(model, {"params": frozen}, adapters, x) ** 2)
      >>> grads = jax.grad(loss)(adapters, frozen)
      >>> grads["kernel"].U.shape
      (5, 2)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"lora_apply is for flax.linen modules, got {type(model).__name__}. A Hugging Face "
            f"Flax model has its Linen module as model.module."
        )
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise ValueError("variables must have the collection 'params': pass {'params': frozen}.")
    dropout = _dropout_is_active(kwargs)
    nodes: dict[Key, Adapter] = {}

    def place(key: Key, kernel: Any, adapter: Adapter) -> dict[Key, Any]:
        # With dropout off it is off in the tree's structure, so that nn.jit traces again.
        nodes[key] = adapter if dropout else adapter.replace(dropout=0.0)  # type: ignore[attr-defined]
        return {key: kernel, _beside(key): nodes[key]}

    placed = join(variables["params"], adapters, place)
    calls = _Calls(nodes, kwargs.get("method"))
    with nn.intercept_methods(calls.intercept):
        out = model.apply({**variables, "params": placed}, *args, **kwargs)
    if not allow_unused:
        calls.check_used(model)
    return out if kwargs.get("mutable", False) is False else _without_adapters(out)


def _dropout_is_active(kwargs: Mapping[str, Any]) -> bool:
    rngs = kwargs.get("rngs")
    if not isinstance(rngs, Mapping) or "dropout" not in rngs:
        return False
    return not any(
        isinstance(kwargs.get(name), bool | np.bool_) and bool(kwargs[name]) is value
        for name, value in _EVALUATES.items()
    )


def _beside(key: Key) -> Key:
    return (*key[:-1], key[-1] + SUFFIX)


def _without_adapters(out: Any) -> Any:
    """Takes the adapters out of the variables that a call with ``mutable`` returned."""
    y, variables = out
    if "params" not in variables:
        return out
    flat = flatten(variables["params"], "params")
    params = {key: leaf for key, leaf in flat.items() if not key[-1].endswith(SUFFIX)}
    return y, {**variables, "params": unflatten(params, variables["params"])}


# --- which module has which product ---


Handler = Callable[[nn.Module, Mapping[str, Adapter]], contextlib.AbstractContextManager[None]]


def _body(method: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it stands in the class body, below what Flax wraps around it."""
    body: Callable[..., Any] = inspect.unwrap(getattr(method, "func", method))
    return body


@contextlib.contextmanager
def _dense(module: nn.Module, adapters: Mapping[str, Adapter]) -> Iterator[None]:
    """``nn.Dense`` computes all but its product itself: promotion of dtypes, bias, precision."""
    assert isinstance(module, nn.Dense)
    adapter = adapters["kernel"]
    stored_W = unbox(module.get_variable("params", "kernel"))
    _check_layer((*module.path, "kernel"), stored_W, adapter)
    rng = module.make_rng("dropout") if adapter.dropout else None
    own_dot_cls = module.dot_general_cls
    own_dot = module.dot_general or jax.lax.dot_general

    def with_adapter(own_dot: Callable[..., chex.Array]) -> Callable[..., chex.Array]:
        def dot_general(
            x: chex.Array, W: chex.Array, dimension_numbers: Any, **kwargs: Any
        ) -> chex.Array:
            # An injected dot_general quantizes, as a rule: it is for the base, not the factors.
            return adapted_product(
                x,
                W,
                adapter,
                base_product=lambda x, W: own_dot(x, W, dimension_numbers, **kwargs),
                precision=kwargs.get("precision"),
                stored_W=stored_W,
                dropped_x=None if rng is None else _drop(rng, adapter.dropout, x),
            )

        return dot_general

    overrides: dict[str, Any] = {"dot_general": with_adapter(own_dot)}
    if own_dot_cls is not None:
        overrides = {"dot_general_cls": lambda: with_adapter(own_dot_cls())}
    with _override(module, overrides):
        yield


def _check_layer(key: Key, W: chex.Array, adapter: Adapter) -> None:
    """Errors where a transform has sliced the adapter along other axes than the kernel."""
    U, V = jnp.shape(adapter.U), jnp.shape(adapter.V)
    if len(U) != 2 or len(V) != 2 or (U[0], V[1]) != W.shape or U[1] != V[0]:
        raise ValueError(
            f"In the layer of {path_of(key)!r} the kernel is {W.shape}, but U is {U} and V is "
            f"{V}. The rule's stack_axes={adapter.axes.stacks} must name the axes on which "
            f"nn.scan or nn.vmap stack the kernel (variable_axes={{'params': ...}})."
        )


def _drop(rng: chex.PRNGKey, rate: float, x: chex.Array) -> chex.Array:
    keep = jax.random.bernoulli(rng, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


@contextlib.contextmanager
def _override(module: nn.Module, fields: Mapping[str, Any]) -> Iterator[None]:
    """Sets fields of a bound module for the time of one call.

    A bound module lives for one ``apply``, so nothing of this is seen outside. Python's own
    ``object.__setattr__``, since a Flax module refuses its own.
    """
    before = {name: getattr(module, name) for name in fields}
    for name, value in fields.items():
        object.__setattr__(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """How a method is adapted: the names of its kernels, and the handler."""

    kernels: tuple[str, ...]
    handler: Handler


# By the function in the class body: a subclass that calls super().__call__ reaches it once,
# where the product is, and a lifted class reaches it inside its transform.
_HANDLERS: dict[Callable[..., Any], _Entry] = {
    _body(nn.Dense.__call__): _Entry(("kernel",), _dense),
}
_KNOWN = (nn.Dense,)


# --- what a call did ---


# Uses inside a lifted transform, of any call: (class of an enclosing module, path below it,
# structure of the adapter). nn.jit does not trace again what it has in its cache, not even
# for another layer of the same kind, so that a use in there is seen by the first call only.
_SEEN_IN_TRANSFORMS: set[tuple[Any, ...]] = set()


@dataclasses.dataclass
class _Calls:
    """The interceptor of one ``lora_apply``, and what it saw."""

    nodes: Mapping[Key, Adapter]
    method: Any
    classes: dict[Key, list[type[nn.Module]]] = dataclasses.field(default_factory=dict)
    used: set[Key] = dataclasses.field(default_factory=set)

    def intercept(
        self,
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        """Adapts the layers that have an adapter."""
        module = context.module
        if module.scope is None:
            return next_fun(*args, **kwargs)
        classes = self.classes.setdefault(module.path, [])
        if type(module) not in classes:
            classes.append(type(module))
        entry = _HANDLERS.get(_body(context.orig_method))
        if entry is None:
            return next_fun(*args, **kwargs)
        adapters: dict[str, Adapter] = {
            name: module.get_variable("params", name + SUFFIX)
            for name in entry.kernels
            if module.has_variable("params", name + SUFFIX)
        }
        if not adapters:
            return next_fun(*args, **kwargs)
        for name, adapter in adapters.items():
            self._use((*module.path, name), adapter)
        if any(adapter.dropout for adapter in adapters.values()) and not module.has_rng("dropout"):
            raise ValueError(
                f"The adapter of {path_of(module.path)!r} has dropout, but a transform around it "
                f"does not pass on the 'dropout' rng. Add split_rngs={{'dropout': True}} to that "
                f"nn.scan or nn.vmap, or set dropout=0 in the rule."
            )
        with entry.handler(module, adapters):
            return next_fun(*args, **kwargs)

    def _use(self, key: Key, adapter: Adapter) -> None:
        self.used.add(key)
        # Through a lifted transform come other arrays than those that were placed.
        if key in self.nodes and adapter.U is not self.nodes[key].U:
            _SEEN_IN_TRANSFORMS.update(self._enclosed(key))

    def check_used(self, model: nn.Module) -> None:
        """Errors where an adapter had no part in the call."""
        unused = [
            key
            for key in self.nodes
            if key not in self.used and _SEEN_IN_TRANSFORMS.isdisjoint(self._enclosed(key))
        ]
        if unused:
            raise ValueError(self._unused(unused, model))

    def _enclosed(self, key: Key) -> set[tuple[Any, ...]]:
        structure = jax.tree.structure(self.nodes[key])
        return {
            (cls, key[depth:], structure)
            for depth in range(len(key))
            for cls in self.classes.get(key[:depth], ())
        }

    def _unused(self, unused: list[Key], model: nn.Module) -> str:
        key, method = unused[0], self.method
        path = path_of(key)
        classes = self.classes.get(key[:-1])
        others = f" (and {len(unused) - 1} more adapters)" if len(unused) > 1 else ""
        known = ", ".join(f"nn.{cls.__name__}" for cls in _KNOWN)
        if classes is None:
            reached = f"{type(model).__name__}.{getattr(method, '__name__', method or '__call__')}"
            return (
                f"The adapter of {path!r}{others} was not used: {reached} did not call its "
                f"module. If this call runs a part of the model on purpose, pass "
                f"allow_unused=True; else narrow the rule, as the adapter would not be trained."
            )
        cls = classes[-1]
        if issubclass(cls, _KNOWN):
            return (
                f"The adapter of {path!r}{others} was not used: {cls.__module__}."
                f"{cls.__qualname__} does not call the __call__ of the layer that it derives "
                f"from ({known}), so the product with its kernel cannot be adapted. Narrow the "
                f"rule, or let it call super().__call__."
            )
        return (
            f"The adapter of {path!r}{others} was not used: there is no handler for "
            f"{cls.__module__}.{cls.__qualname__}. There are handlers for {known}. Narrow the "
            f"rule so that it does not match {path!r}."
        )
