"""What a call did with its adapters: which it did not use, and which kernels it reads elsewhere.

An adapter that is not used would not be trained. A kernel that the model also reads outside of its
layer, as tied embeddings, would be adapted in one use of several, and the merged model would
compute something else.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import chex
import jax

from lora_jax.linen._handlers import Handlers, entries_of, known_layers
from lora_jax.linen._interceptor import Interceptor
from lora_jax.linen._model_call import name_of_call
from lora_jax.linen._place_adapters import Placed, key_of_adapter
from lora_jax.tracing._arrays_in import arrays_in
from lora_jax.tracing._liveness import live_inputs, read_inputs
from lora_jax.tracing._map_rows import gives_variables
from lora_jax.trees._paths import Key, flatten, path_of, unflatten

# Calls the model with parameters that have adapters in them, under an interceptor.
Call = Callable[[chex.ArrayTree, Interceptor], Any]

# What JAX raises where a model needs the numbers that it computes.
_UNTRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def check_used(
    call: Call, params: chex.ArrayTree, interceptor: Interceptor, model: Any, method: Any
) -> None:
    """Checks that a call has used every adapter that is next to a kernel.

    Args:
      call: the call.
      params: with the adapters in them.
      interceptor: of the call, which is over.
      model: for the message.
      method: of the model.

    Raises:
      ValueError: if one was not used.
    """
    unseen = [key for key in interceptor.placed if path_of(key) not in interceptor.used]
    if unseen and (key := _unread(call, params, unseen, interceptor.handlers)):
        raise ValueError(_not_used(key, len(unseen), interceptor, model, method))


def check_ties(
    call: Call,
    params: chex.ArrayTree,
    placed: Mapping[Key, Placed],
    model: Any,
    given: Any,
    kwargs: Mapping[str, Any],
) -> None:
    """Checks that a call reads the adapted kernels in their layers only.

    It is known where ``kernel_axes`` has found it for the same call, with the handlers that are
    registered. A call that was checked before, with arrays of the same shapes, is not traced again.

    Args:
      call: the call.
      params: with the adapters in them.
      placed: the adapters next to kernels.
      model: the model.
      given: all that the call depends on.
      kwargs: of the model and of ``apply``.

    Raises:
      ValueError: if a kernel is read elsewhere too.
    """
    name = name_of_call(kwargs)
    registered = Handlers.registered()
    unknown = {
        key: node
        for key, node in placed.items()
        if not (
            node.adapter.untied or (node.adapter.axes.alone == name and node.handlers == registered)
        )
    }
    if unknown:
        checked, this = _checked_calls(model, given)
        if this not in checked:
            _refuse_ties(call, params, unknown, gives_variables(kwargs))
            checked.add(this)


def _unread(call: Call, params: chex.ArrayTree, keys: list[Key], handlers: Handlers) -> Key | None:
    """The first of these adapters that the call does not read.

    No handler saw them. But ``nn.jit`` does not call a layer again that it has in its cache, so the
    call is traced: the trace has such layers in it, and what they read.
    """
    flat = flatten(params, "params")

    def results(nodes: dict[Key, Any]) -> list[Any]:
        given = {**flat, **{key_of_adapter(key): node for key, node in nodes.items()}}
        return list(arrays_in(call(unflatten(given, params), Interceptor(handlers))))

    nodes = {key: flat[key_of_adapter(key)] for key in keys}
    read = read_inputs(jax.make_jaxpr(results)(nodes).jaxpr)
    used = jax.tree.unflatten(jax.tree.structure(nodes), read)
    return next((key for key in keys if not any(jax.tree.leaves(used[key]))), None)


def _not_used(key: Key, count: int, interceptor: Interceptor, model: Any, method: Any) -> str:
    """The message for an adapter that the call did not use."""
    path = path_of(key)
    classes = interceptor.classes.get(key[:-1])
    others = f" (and {count - 1} more adapters)" if count > 1 else ""
    if classes is None:
        reached = f"{type(model).__name__}.{getattr(method, '__name__', method or '__call__')}"
        return (
            f"The adapter of {path!r}{others} was not used: {reached} did not call its "
            f"module. If this call runs a part of the model on purpose, pass "
            f"allow_unused=True; else narrow the rule, as the adapter would not be trained."
        )
    cls, handlers = classes[-1], interceptor.handlers
    name = f"{cls.__module__}.{cls.__qualname__}"
    entries = entries_of(handlers, cls)
    registered = [entry.kernels for entry in entries if not entry.built_in]
    if any(isinstance(names, tuple) and key[-1] not in names for names in registered):
        reason = f"the handler registered for {name} is for other parameters"
    elif entries:
        reason = (
            f"{name} has a handler for the method of a layer that it derives from, but did not "
            f"call it (super().__call__), or the handler did not compute with the kernel"
        )
    else:
        reason = f"there is no handler for {name}; there are handlers for {known_layers(handlers)}"
    add = "Register a handler with lora_jax.register"
    if handlers != Handlers.registered():
        add = "Add a handler to the handlers of the call, with_handler(...)"
    return (
        f"The adapter of {path!r}{others} was not used: {reason}. {add}, give the parameter a "
        f"rule with materialize=True, or narrow the rule."
    )


def _refuse_ties(
    call: Call, params: chex.ArrayTree, nodes: Mapping[Key, Placed], with_variables: bool
) -> None:
    """Refuses kernels that the model reads outside of their layers too.

    The call is traced with zeros for the kernels in their layers: what depends on one still is
    another use. In a model that looks at its numbers, and so cannot be traced, it is not known.
    """
    flat = flatten(params, "params")
    for key, node in nodes.items():
        flat[key_of_adapter(key)] = dataclasses.replace(node, cut=True)
    handlers = next(iter(nodes.values())).handlers

    def results(kernels: dict[Key, Any]) -> list[Any]:
        out = call(unflatten({**flat, **kernels}, params), Interceptor(handlers))
        if with_variables:  # that the parameters are given back is not a use of them
            out = out[0], {name: tree for name, tree in out[1].items() if name != "params"}
        return list(arrays_in(out))

    kernels = {key: flat[key] for key in nodes}
    try:
        jaxpr = jax.make_jaxpr(results)(kernels).jaxpr
    except _UNTRACEABLE:
        return
    read = live_inputs(jaxpr, [True] * len(jaxpr.outvars), effects=False)
    uses = jax.tree.unflatten(jax.tree.structure(kernels), read)
    tied = [path_of(key) for key in nodes if any(jax.tree.leaves(uses[key]))]
    if tied:
        more = f" (and {len(tied) - 1} more kernels)" if len(tied) > 1 else ""
        raise ValueError(
            f"The model also reads {tied[0]!r}{more} outside of its layer, as tied embeddings are, "
            f"where its adapter would not be: the merged model would compute something else. Say "
            f"in the rule tied='materialize', so that all uses see W', or tied='untie', and make "
            f"the adapters with lora_jax.lora_init_model."
        )


# The calls that were checked for ties, and had none that matter, by their models.
_CHECKED: dict[int, tuple[weakref.ref[Any], set[Any]]] = {}
_MOST = 1024


def _checked_calls(model: Any, given: Any) -> tuple[set[Any], Hashable]:
    """The calls of this model that were checked, and this one: with arrays of these shapes."""
    leaves, structure = jax.tree.flatten(given)
    each = tuple((x.shape, x.dtype) if hasattr(x, "dtype") else x for x in leaves)
    try:
        hash(this := (structure, each))
    except TypeError:  # an argument has none
        return set(), None
    checked = _CHECKED.get(id(model))
    if checked is None or checked[0]() is not model:  # models may have no hash
        if len(_CHECKED) >= _MOST:
            _CHECKED.clear()
        checked = _CHECKED[id(model)] = (weakref.ref(model), set())
    if len(checked[1]) >= _MOST:
        checked[1].clear()
    return checked[1], this
