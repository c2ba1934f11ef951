"""What a call did with its adapters: which it did not use, and which kernels it reads elsewhere.

An adapter that is not used would not be trained. A kernel that the model also reads outside of its
layer, as tied embeddings, would be adapted in one use of several, and the merged model would
compute something else.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import jax

from lora_jax.layers._abstract_inputs import dequantized_abstractly
from lora_jax.layers._entry import Entry
from lora_jax.layers._handlers import Handlers, entries_of, known_layers
from lora_jax.layers._place_adapters import Placed
from lora_jax.tracing._liveness import live_inputs, read_inputs
from lora_jax.trees._paths import Key, path_of

# Calls the model once more, with these parameters and adapters, by their keys: the arrays in what
# it gives, without parameters that are given back.
Call = Callable[[Mapping[Key, Any], Mapping[Key, Placed]], list[jax.Array]]

# What JAX raises where a model needs the numbers that it computes.
_UNTRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def check_used(
    call: Call,
    params: Mapping[Key, Any],
    placed: Mapping[Key, Placed],
    used: Collection[str],
    message: Callable[[Key, str], str],
) -> None:
    """Checks that a call has used every adapter that is next to a kernel.

    Args:
      call: the call.
      params: the parameters.
      placed: the adapters next to kernels.
      used: the paths of the kernels that a handler has computed with.
      message: for an adapter that was not used, from its key, and words for how many more there
        are.

    Raises:
      ValueError: if one was not used.
    """
    unseen = [key for key in placed if path_of(key) not in used]
    if unseen and (key := _unread(call, params, placed, unseen)):
        more = f" (and {len(unseen) - 1} more adapters)" if len(unseen) > 1 else ""
        raise ValueError(message(key, more))


def check_ties(
    call: Call,
    params: Mapping[Key, Any],
    placed: Mapping[Key, Placed],
    name: Callable[[], str | None],
    model: Any,
    given: Any,
    look: Callable[[Any, Mapping[Key, Any]], None] | None = None,
) -> None:
    """Checks that a call reads the adapted kernels in their layers only.

    It is known where ``kernel_axes`` has found it for the same call, with the handlers that are
    registered. A call that was checked before, with arrays of the same shapes, is not traced again.

    Args:
      call: the call.
      params: the parameters.
      placed: the adapters next to kernels.
      name: gives that of the call, as :class:`lora_jax.ModelAxes` has it; ``None`` for none.
      model: the model.
      given: all that the call depends on.
      look: gets the jaxpr of a call that is not known, with zeros for the kernels in their layers,
        and the kernels, which are its first inputs. It may refuse them.

    Raises:
      ValueError: if a kernel is read elsewhere too.
    """
    registered = Handlers.registered()
    found = {node.adapter.axes.alone for node in placed.values()} - {None}
    this_call = name() if found else None
    known = found & {this_call}
    unknown = {
        key: node
        for key, node in placed.items()
        if not (
            node.adapter.untied
            or (node.adapter.axes.alone in known and node.handlers == registered)
        )
    }
    if unknown:
        checked, this = _checked_calls(model, given)
        if this not in checked:
            _refuse_ties(call, params, placed, unknown, look)
            checked.add(this)


def name_of_call(
    model: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    method: Any,
    with_variables: bool,
) -> str | None:
    """What is called, as far as what a model reads depends on it; ``None`` where it has no name.

    That is the model, the method, and all of the arguments that is no array: a flag may choose
    another way through the model.

    Args:
      model: the model, or its graphdef.
      args: those of the call.
      kwargs: those of the call; ``method`` and ``mutable`` do not count here.
      method: its name, or the function; ``None`` for ``__call__``.
      with_variables: whether the call gives variables too.

    Example:
      >>> import functools
      >>> name = functools.partial(name_of_call, "model", method=None, with_variables=False)
      >>> x = jax.numpy.ones(3)
      >>> name([x], {}) == name([2 * x], {}), name([x], {}) == name([x], {"train": True})
      (True, False)
      >>> name([x], {}).startswith(name_of_method("model", None, False))
      True
    """
    options = {name: value for name, value in kwargs.items() if name not in ("method", "mutable")}
    leaves, structure = jax.tree.flatten((tuple(args), options))
    of_method = name_of_method(model, method, with_variables)
    static = structure, tuple(None if hasattr(x, "dtype") else x for x in leaves)
    return None if of_method is None else f"{of_method}, {_digest(static)}"


def name_of_method(model: Any, method: Any, with_variables: bool) -> str | None:
    """What the names of all calls of a method begin with; ``None`` where it has no name.

    A method of a class has one. Other functions do not: two may be called alike.

    Example:
      >>> name_of_method("model", lambda model: model, False)
    """
    name: str | None = method or "__call__"
    if not isinstance(name, str):
        of_class = "." in getattr(method, "__qualname__", "").rpartition("<locals>.")[2]
        name = getattr(method, "__name__", "<") if of_class else "<"
        if name.startswith("<"):  # <lambda>
            return None
    return f"{name}{', with variables' * with_variables} of {_digest(model)}"


def _digest(static: Any) -> str:
    """A hash of what is static, also where something in it, such as a list, has none."""
    try:
        return f"{hash(static):x}"
    except TypeError:
        return f"{hash(repr(static)):x}"


def not_called(key: Key, more: str, reached: str) -> str:
    """The message for an adapter whose module was not called.

    Args:
      key: of the kernel.
      more: words for how many more there are.
      reached: what was called.
    """
    return (
        f"The adapter of {path_of(key)!r}{more} was not used: {reached} did not call its "
        f"module. If this call runs a part of the model on purpose, pass "
        f"allow_unused=True; else narrow the rule, as the adapter would not be trained."
    )


def not_computed(
    key: Key, more: str, cls: type[Any], handlers: Handlers, other_than: str = ""
) -> str:
    """The message for an adapter whose module was called, and did not compute with it.

    Args:
      key: of the kernel.
      more: words for how many more there are.
      cls: of the module.
      handlers: of the call.
      other_than: as for :func:`known_layers`.
    """
    name = f"{cls.__module__}.{cls.__qualname__}"
    entries: Sequence[Entry] = entries_of(handlers, cls)
    registered = [entry.kernels for entry in entries if not entry.built_in]
    if any(isinstance(names, tuple) and key[-1] not in names for names in registered):
        reason = f"the handler registered for {name} is for other parameters"
    elif entries:
        reason = (
            f"{name} has a handler for the method of a layer that it derives from, but did not "
            f"call it (super().__call__), or the handler did not compute with the kernel"
        )
    else:
        known = known_layers(handlers, other_than=other_than)
        reason = f"there is no handler for {name}; there are handlers for {known}"
    add = "Register a handler with lora_jax.register"
    if handlers != Handlers.registered():
        add = "Add a handler to the handlers of the call, with_handler(...)"
    return (
        f"The adapter of {path_of(key)!r}{more} was not used: {reason}. {add}, give the parameter "
        f"a rule with materialize=True, or narrow the rule."
    )


def _unread(
    call: Call, params: Mapping[Key, Any], placed: Mapping[Key, Placed], keys: list[Key]
) -> Key | None:
    """The first of these adapters that the call does not read.

    No handler saw them. But a layer that Flax has in the cache of a transform is not called again,
    so the call is traced: the trace has such layers in it, and what they read.
    """
    nodes = {key: placed[key] for key in keys}
    jaxpr = jax.make_jaxpr(lambda nodes: call(params, {**placed, **nodes}))(nodes).jaxpr
    used = jax.tree.unflatten(jax.tree.structure(nodes), read_inputs(jaxpr))
    return next((key for key in keys if not any(jax.tree.leaves(used[key]))), None)


def _refuse_ties(
    call: Call,
    params: Mapping[Key, Any],
    placed: Mapping[Key, Placed],
    unknown: Mapping[Key, Placed],
    look: Callable[[Any, Mapping[Key, Any]], None] | None,
) -> None:
    """Refuses kernels that the model reads outside of their layers too.

    The call is traced with zeros for the kernels in their layers: what depends on one still is
    another use. In a model that looks at its numbers, and so cannot be traced, it is not known.
    """
    cut = {key: dataclasses.replace(node, cut=True) for key, node in unknown.items()}
    kernels = {key: dequantized_abstractly(params[key]) for key in unknown}
    try:
        jaxpr = jax.make_jaxpr(lambda kernels: call({**params, **kernels}, {**placed, **cut}))(
            kernels
        ).jaxpr
    except _UNTRACEABLE:
        return
    if look is not None:
        look(jaxpr, kernels)
    read = live_inputs(jaxpr, [True] * len(jaxpr.outvars), effects=False)
    uses = jax.tree.unflatten(jax.tree.structure(kernels), read)
    tied = [path_of(key) for key in kernels if any(jax.tree.leaves(uses[key]))]
    if tied:
        more = f" (and {len(tied) - 1} more kernels)" if len(tied) > 1 else ""
        raise ValueError(
            f"The model also reads {tied[0]!r}{more} outside of its layer, as tied embeddings are, "
            f"where its adapter would not be: the merged model would compute something else. Say "
            f"in the rule tied='materialize', so that all uses see W', or tied='untie', and make "
            f"the adapters with lora_jax.lora_init_model."
        )


# The calls that were checked for ties, and had none that matter, by their models: by the identity
# of one that can be referred to, which may have no hash, or else by the model, as a graphdef.
_CHECKED: dict[Any, tuple[weakref.ref[Any] | None, set[Any]]] = {}
_MOST = 1024


def _checked_calls(model: Any, given: Any) -> tuple[set[Any], Hashable]:
    """The calls of this model that were checked, and this one: with arrays of these shapes."""
    leaves, structure = jax.tree.flatten(given)
    each = tuple((x.shape, x.dtype) if hasattr(x, "dtype") else x for x in leaves)
    key: Any = id(model)
    reference: weakref.ref[Any] | None = None
    try:
        reference = weakref.ref(model)
    except TypeError:
        key = model
    try:
        hash(this := (structure, each))
        checked = _CHECKED.get(key)
    except TypeError:  # an argument has none, or something in the graphdef
        return set(), None
    if checked is None or (checked[0] is not None and checked[0]() is not model):
        if len(_CHECKED) >= _MOST:
            _CHECKED.clear()
        checked = _CHECKED[key] = (reference, set())
    if len(checked[1]) >= _MOST:
        checked[1].clear()
    return checked[1], this
