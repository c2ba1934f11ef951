"""The interceptor: ``model.apply`` of a Flax Linen model, with adapters as one more argument.

The adapters are placed inside the ``params`` collection, each next to the kernel that it adapts,
and the interceptor reads them from the scope of the module that is being called. So they go
through every lifted transform (``nn.scan``, ``nn.vmap``, ``nn.remat``, ``nn.jit``) just as the
kernels do, and all that decides what is computed is in the structure of the variables, where the
cache of ``nn.jit`` sees it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
import weakref
import zlib
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import _compat as compat
from lora_jax._compat import is_traced
from lora_jax.core._adapter import Adapter
from lora_jax.core._fully_trained import FullyTrained
from lora_jax.core._kernel import AdaptedKernel, Unseen
from lora_jax.core._mixed import BASE, Ids, checked_ids, taken
from lora_jax.core._product import normalized
from lora_jax.linen import (
    _layers,  # noqa: F401  (enters its handlers)
    _packages,  # noqa: F401
)
from lora_jax.linen._registry import entries_of, entry_of, known_layers
from lora_jax.tracing._liveness import arrays_in, live_inputs, read_inputs
from lora_jax.tracing._rows import gives_variables, over_rows
from lora_jax.trees._merge import join, merged_leaf
from lora_jax.trees._pair import base_of, nodes_of
from lora_jax.trees._paths import Key, flatten, path_of, unbox, unflatten
from lora_jax.trees._stack_size import stack_size

# The name of an adapter is that of its parameter and this.
SUFFIX = "@lora"

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


def lora_apply(
    model: Any,
    variables: Mapping[str, Any],
    adapters: chex.ArrayTree,
    /,
    *args: Any,
    adapter_ids: Any = None,
    in_axes: Any = ...,
    out_axes: Any = ...,
    variable_axes: Mapping[str, Any] | None = None,
    spmd_axis_name: Any = None,
    adapter_dropout: bool | None = None,
    allow_unused: bool = False,
    **kwargs: Any,
) -> Any:
    """``model.apply(variables, *args, **kwargs)`` of the adapted model.

    Every layer that has an adapter computes ``x W'`` in place of ``x W``, in its own dtype; the
    model's code is not changed and the base is not copied. (With ``Rule(materialize=True)`` the
    parameter itself is replaced by ``W'``.) Differentiate with respect to
    ``adapters``, and pass the base as an argument to the jitted function: what a jitted function
    closes over is compiled into it as a constant.

    Adapter dropout (``Rule(dropout=...)``) is active when the call passes a ``dropout`` rng,
    ``rngs={"dropout": key}``; ``adapter_dropout`` says whether it is. As a convenience it is off
    as well where the call evaluates in Flax's own words: ``deterministic=True``, ``train=False``,
    ``training=False``, ``is_training=False`` or ``enable_dropout=False``, as an argument or as the
    default of the model's method. (An rng by another name, on which Flax would fall back, is not
    one for adapters.)

    With ``adapter_ids`` every example of the batch has an adapter of its own, of a stack
    (:func:`lora_jax.stack`), or with the id -1 the base alone. By definition that is ``jax.vmap``
    of a call with one row, a batch of the size 1, over ``(id, row)``, so every row has what it
    would have alone, and the product with ``W`` is computed once for all of them. One array among
    the arguments has its rows in the first axis. Where there are several, or a cache, ``in_axes``
    and ``variable_axes`` say it. Numbers are for all rows, and each row has a key of its own of
    every one in ``rngs``. Ids may be traced: other ids, and other adapters of the same shapes, are
    no other program. An id that is of no adapter is an error, or, traced, gives NaN in its row.

    Args:
      model: the model; it need not know of this library. A ``flax.linen`` module, or a Flax model
        of Hugging Face, which is called as ``model(*args, params=..., **kwargs)``.
      variables: its variables, with the frozen base: ``{"params": frozen}``; other collections
        (``batch_stats``, ``cache``) as for ``model.apply``.
      adapters: the adapters from :func:`lora_jax.lora_init`.
      *args: for ``model.apply``.
      adapter_ids: integers, ``(batch,)`` for one adapter for each example, ``(batch, tokens)`` for
        one for each token, where these are the axes behind the batch of every adapted layer's
        input; or one number, for one adapter for all. With it ``adapters`` are stacked, and
        ``variables`` may have all parameters: a leaf that was fully trained is there for the rows
        with the base alone.
      in_axes: where arguments have the rows of ``adapter_ids``, as for ``jax.vmap``: an axis for
        all, with ``None`` for what is one for all rows; or a tuple with one for each of ``args``,
        and behind them a dict for keyword arguments; or that dict alone. In the place of an axis
        may be a tree of them.
      out_axes: where the result has the rows, as for ``jax.vmap``. Not said, it is the axis of the
        batch, for which the model is traced with two rows where it is not plainly the first one.
      variable_axes: where the other collections have them, as for ``flax.linen.vmap``:
        ``{"cache": 0}``, or ``None`` or a tree in the place of ``0``. Arrays that have no such axis
        are one for all rows. ``batch_stats`` has no rows. Those that the call makes have them in
        the axis of the batch, unless it is said.
      spmd_axis_name: the axis of a mesh that the rows are sharded by, as for ``jax.vmap``: for
        models that say how their activations are sharded, and leave the batch out of it.
      adapter_dropout: whether adapters have their dropout; by default as said above.
      allow_unused: allow adapters that this call does not use, for a ``method`` that runs a part
        of the model. Otherwise they are an error: they would not be trained.
      **kwargs: for ``model.apply``: ``rngs``, ``mutable``, ``method``,
        ``capture_intermediates``, and the model's own.

    Returns:
      What ``model.apply`` returns.

    Raises:
      TypeError: ``model`` is no ``flax.linen`` module, or a tree is no nested dict, or one as a
        file has it, of arrays only.
      ValueError: the adapters do not fit the base or the model, a base of integers, as the codes of
        a quantized one are, or adapters that were not used. The message names the culprit.

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
    check_model(model, variables, "lora_apply")
    dropout = (
        _dropout_is_active(model, args, kwargs) if adapter_dropout is None else adapter_dropout
    )
    one = functools.partial(_apply, model, dropout=dropout, allow_unused=allow_unused)
    if dropout and not _has_dropout_rng(kwargs):
        raise ValueError("adapter_dropout=True needs a key: pass rngs={'dropout': key}.")
    if adapter_ids is None:
        if any(axes is not Ellipsis for axes in (in_axes, out_axes)) or variable_axes:
            raise ValueError(
                "in_axes, out_axes and variable_axes say where the rows of adapter_ids are: pass "
                "adapter_ids too, or leave them out."
            )
        return one(variables, adapters, args, kwargs)
    base = base_of(variables["params"])
    nodes = nodes_of(adapters, base=base)
    count = stack_size(list(nodes.values()), "adapter_ids is")
    ids = checked_ids(adapter_ids, count)
    which = functools.partial(_Which, count=count, known=_check_base(base, nodes, ids))
    if ids.ndim == 0:
        return one(variables, adapters, args, kwargs, which(ids, mapped=False))

    def row(id_: chex.Array, rest: Any, args: Any, kwargs: Any) -> Any:
        row_variables = {**rest, "params": variables["params"]}
        ids = id_[None] if id_.ndim else id_  # (1, tokens)
        return one(row_variables, adapters, args, kwargs, which(ids, mapped=True))

    rest = {name: tree for name, tree in variables.items() if name != "params"}
    return over_rows(
        row,
        ids,
        rest,
        args,
        kwargs,
        in_axes=in_axes,
        out_axes=out_axes,
        variable_axes=variable_axes or {},
        spmd_axis_name=spmd_axis_name,
    )


@dataclasses.dataclass(frozen=True)
class _Which:
    """Which of several adapters a call has.

    Attributes:
      ids: of the adapter, or ``(1, tokens)`` of those of the tokens.
      count: number of adapters.
      known: whether it is known that no row needs a leaf of the base which is not there.
      mapped: whether the call is that of one of many rows.
    """

    ids: chex.Array
    count: int
    known: bool
    mapped: bool


def _apply(
    model: Any,
    variables: Mapping[str, Any],
    adapters: chex.ArrayTree,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    which: _Which | None = None,
    *,
    dropout: bool,
    allow_unused: bool,
) -> Any:
    """:func:`lora_apply` with one adapter, or of one row of the batch."""
    nodes: dict[Key, _Placed] = {}

    def place(key: Key, leaf: Any, node: Adapter) -> dict[Key, Any]:
        if not node.in_layer:
            return {key: _materialized(path_of(key), leaf, node, which)}
        nodes[key] = _placed(path_of(key), unbox(leaf), node, which, dropout)
        return {key: leaf, (*key[:-1], key[-1] + SUFFIX): nodes[key]}

    count, whole = None, None
    if which is not None:
        count, whole = which.count, functools.partial(_own_leaf, ids=which.ids, known=which.known)
    placed = join(variables["params"], adapters, place, count, whole)

    def call(placed: chex.ArrayTree, calls: _Calls) -> Any:
        _ACTIVE.stack = [*_ACTIVE.stack, calls]
        try:
            with nn.intercept_methods(calls.intercept):
                return call_model(model, {**variables, "params": placed}, args, kwargs)
        finally:
            _ACTIVE.stack = _ACTIVE.stack[:-1]

    calls = _Calls(nodes)
    out = call(placed, calls)
    unused = [] if allow_unused else [key for key in nodes if path_of(key) not in calls.used]
    if unused and (key := _without_use(call, placed, unused)):
        raise ValueError(calls.unused(key, len(unused), model, kwargs.get("method")))
    unknown = {
        key: node
        for key, node in nodes.items()
        if not (node.adapter.untied or node.adapter.axes.alone == name_of_call(kwargs))
    }
    if unknown:
        given = (placed, {**variables, "params": None}, args, kwargs)
        seen, this = _looked_at(model, given)
        if this not in seen:
            _check_ties(call, placed, unknown, gives_variables(kwargs))
            seen.add(this)
    if not gives_variables(kwargs):
        return out
    return _restored(out, variables["params"], placed)


def _own_leaf(
    key: Key, leaf: Any, node: FullyTrained, ids: chex.Array, *, known: bool
) -> dict[Key, Any]:
    """A leaf that was fully trained, such as a head or a bias: that of the id.

    Args:
      key: of the parameter.
      leaf: the base's own, or ``None``.
      node: the leaves of all adapters, on an axis in front.
      ids: of one row.
      known: whether it is known that no row has the base alone which the leaf is missing for.

    Raises:
      ValueError: ids of tokens, a stack of another model.
    """
    path = path_of(key)
    if ids.ndim > 0:
        raise ValueError(
            f"{path!r} was fully trained, so that adapter_ids must be one number for each example, "
            f"not for each token."
        )
    dtype, box, shape = node.merged_dtype(), node.value, jnp.shape(node.array)
    if leaf is not None and jnp.shape(unbox(leaf)) != shape[1:]:
        raise ValueError(
            f"{path!r} was fully trained: its stack is {shape}, but the base has "
            f"{jnp.shape(unbox(leaf))} there. Was it made for another model?"
        )
    base = (0.0 if known else jnp.nan) if leaf is None else unbox(leaf)
    return {key: jax.tree.map(lambda array: taken(array, ids, base).astype(dtype), box)}


def _materialized(path: str, kernel: Any, adapter: Adapter, which: _Which | None) -> Any:
    """``W'`` in the place of the parameter."""
    if which is None:
        return merged_leaf(kernel, adapter)
    if which.ids.ndim > 0:
        raise ValueError(
            f"The adapters of {path!r} have materialize=True, and W' cannot be another one for "
            f"every token: give one id for each row."
        )
    adapter = jax.tree.map(lambda array: taken(array, which.ids, 0.0), adapter)
    merged = merged_leaf(kernel, adapter)
    return jax.tree.map(lambda W_, W: jnp.where(which.ids == BASE, W, W_), merged, kernel)


def _placed(path: str, W: Any, adapter: Adapter, which: _Which | None, dropout: bool) -> _Placed:
    """An adapter as it stands beside its kernel."""
    if dropout and adapter.dropout is None:
        raise ValueError(
            f"The adapters of {path!r} have several rates of dropout, so that it cannot be "
            f"active: train them apart, or call without the 'dropout' rng."
        )
    one_id = None if which is None or which.mapped else which.ids
    if one_id is not None:
        adapter = jax.tree.map(lambda array: taken(array, one_id, 0.0), adapter)
    adapter = normalized(W, adapter)
    if one_id is not None and adapter.m is not None:
        adapter = adapter.replace(m=jnp.where(one_id == BASE, 1.0, adapter.m))  # type: ignore[attr-defined]
    arrays = {name: x for name in ("U", "V", "m") if (x := getattr(adapter, name)) is not None}
    ids = None
    if which is not None and which.mapped:
        # All adapters are there, and each layer takes the row's own from them.
        ids = Ids.beside(which.ids, which.count, adapter.axes, W.shape)
        behind = len(adapter.axes.batch_shape(W.shape))
        arrays = {name: jnp.moveaxis(x, 0, behind) for name, x in arrays.items()}
    arrays = {name: adapter.axes.place(x, 1 if name == "m" else 2) for name, x in arrays.items()}
    # With dropout off it is off in the tree's structure, so that nn.jit traces again.
    rate = adapter.dropout if dropout else 0.0
    return _Placed(adapter.replace(dropout=rate, **arrays), path, ids)  # type: ignore[attr-defined]


def _check_base(base: Mapping[Key, Any], nodes: Mapping[Key, Any], ids: Any) -> bool:
    """Whether it is known that no row needs a leaf of the base that is not there.

    Raises:
      ValueError: it is known that one does.
    """
    if is_traced(ids) or not ids.is_fully_addressable:
        return False
    for key, node in nodes.items():
        if not node.in_base and key not in base and bool((np.asarray(ids) == BASE).any()):
            raise ValueError(
                f"{path_of(key)!r} was fully trained, and the base lacks it, so no row can have "
                f"the base alone (id {BASE}): pass all of the model's parameters as "
                f"{{'params': params}}."
            )
    return True


def _without_use(call: Callable[..., Any], placed: chex.ArrayTree, keys: list[Key]) -> Key | None:
    """Which of these adapters, of whose use nothing was seen, is not read by the call.

    ``nn.jit`` does not call a layer again that it has in its cache. So the call is traced, with the
    layers as ``nn.jit`` has them, and what is in the trace was used.
    """
    flat = flatten(placed, "params")
    own = {key: (*key[:-1], key[-1] + SUFFIX) for key in keys}

    def results(nodes: dict[Key, Any]) -> list[Any]:
        given = {**flat, **{own[key]: node for key, node in nodes.items()}}
        return list(arrays_in(call(unflatten(given, placed), _Calls({}))))

    nodes = {key: flat[own[key]] for key in keys}
    read = read_inputs(jax.make_jaxpr(results)(nodes).jaxpr)
    used = jax.tree.unflatten(jax.tree.structure(nodes), read)
    return next((key for key in keys if not any(jax.tree.leaves(used[key]))), None)


def _check_ties(
    call: Callable[..., Any],
    placed: chex.ArrayTree,
    nodes: Mapping[Key, _Placed],
    with_variables: bool,
) -> None:
    """Errors where the model reads one of these kernels outside of its layer too.

    An adapter in the layer would change one use only, and the merged model all. So the call is
    traced with zeros for the kernels in their layers: what depends on one still is another use. In
    a model that looks at its numbers, and so cannot be traced, nobody knows.
    """
    flat = flatten(placed, "params")
    for key, node in nodes.items():
        flat[(*key[:-1], key[-1] + SUFFIX)] = dataclasses.replace(node, cut=True)

    def results(kernels: dict[Key, Any]) -> list[Any]:
        out = call(unflatten({**flat, **kernels}, placed), _Calls({}))
        if with_variables:  # that the parameters are given back is no use of them
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


def _looked_at(model: Any, given: Any) -> tuple[set[Any], Hashable]:
    """The calls of this model that were looked at, and this one: with arrays of these shapes."""
    leaves, structure = jax.tree.flatten(given)
    each = tuple((x.shape, x.dtype) if hasattr(x, "dtype") else x for x in leaves)
    try:
        hash(this := (structure, each))
    except TypeError:  # an argument has none
        return set(), None
    seen = _LOOKED_AT.get(id(model))
    if seen is None or seen[0]() is not model:  # models may have no hash
        if len(_LOOKED_AT) >= 1024:
            _LOOKED_AT.clear()
        seen = _LOOKED_AT[id(model)] = (weakref.ref(model), set())
    if len(seen[1]) >= 1024:
        seen[1].clear()
    return seen[1], this


# The calls that were looked at for ties, and had none that matter, by their models.
_LOOKED_AT: dict[int, tuple[weakref.ref[Any], set[Any]]] = {}
# What JAX raises where a model needs the numbers that it computes.
_UNTRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def check_model(model: Any, variables: Any, name: str) -> None:
    """Errors where the first two arguments are not a model and its variables."""
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


def _is_hugging_face(model: Any) -> bool:
    return callable(model) and isinstance(getattr(model, "module", None), nn.Module)


def _has_dropout_rng(kwargs: Mapping[str, Any]) -> bool:
    rngs = kwargs.get("rngs")
    has_rng = isinstance(rngs, Mapping) and "dropout" in rngs
    return has_rng or kwargs.get("dropout_rng") is not None


def _dropout_is_active(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    if not _has_dropout_rng(kwargs):
        return False
    method = kwargs.get("method") or "__call__"
    function = getattr(type(model), method, None) if isinstance(method, str) else method
    function = getattr(function, "__func__", function)
    given = dict(kwargs)
    own = {name: value for name, value in kwargs.items() if name not in _OF_APPLY}
    try:
        bound = inspect.signature(function).bind_partial(model, *args, **own)  # type: ignore[arg-type]
        bound.apply_defaults()
        given |= bound.arguments
    except (TypeError, ValueError):  # the call itself will say what is wrong with it
        pass
    return not any(
        isinstance(given.get(name), bool | np.bool_) and bool(given[name]) is value
        for name, value in _EVALUATES.items()
    )


def _restored(out: Any, frozen: chex.ArrayTree, placed: chex.ArrayTree) -> Any:
    """The result of a call with ``mutable``, with the base in ``params`` as it was given."""
    y, variables = out
    if "params" not in variables:
        return out
    base, given = flatten(frozen, "frozen"), flatten(placed, "params")
    params = {}
    for key, leaf in flatten(variables["params"], "params").items():
        if not key[-1].endswith(SUFFIX):
            # Where W' stood in place of the parameter, and still does.
            params[key] = base[key] if key in base and leaf is given.get(key) else leaf
    return y, {**variables, "params": unflatten(params, variables["params"])}


# --- what a call did ---


@flax.struct.dataclass
class _Placed:
    """An adapter beside its kernel.

    The path is that of the parameter in the whole tree, also where the layer is applied on its own
    inside the model. As a part of the structure it makes ``nn.jit`` trace each layer, and not use
    for one what it has traced for another. If it is cut, the layer computes with zeros.
    """

    adapter: Adapter
    path: str = flax.struct.field(pytree_node=False)
    ids: Ids | None = None
    cut: bool = flax.struct.field(pytree_node=False, default=False)


class _Active(threading.local):
    """The calls of lora_apply that are under way: of one inside another, the inner one adapts."""

    stack: list[_Calls] = []  # noqa: RUF012  (replaced, never changed)


_ACTIVE = _Active()


@dataclasses.dataclass(eq=False)
class _Calls:
    """The interceptor of one ``lora_apply``, and what it saw."""

    nodes: Mapping[Key, _Placed]
    classes: dict[Key, list[type[nn.Module]]] = dataclasses.field(default_factory=dict)
    used: set[str] = dataclasses.field(default_factory=set)
    draws: dict[str, int] = dataclasses.field(default_factory=dict)
    maps: compat.Maps = dataclasses.field(default_factory=compat.Maps)

    def intercept(
        self,
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        """Adapts the layers that have an adapter."""
        module = context.module
        adapts = _ACTIVE.stack[-1] is self and not isinstance(module, compat.Probe)
        if module.scope is None or not adapts:
            return next_fun(*args, **kwargs)
        if isinstance(module, nn.WeightNorm | nn.SpectralNorm):
            _refuse_mapped(module.layer_instance)
        classes = self.classes.setdefault(module.path, [])
        if type(module) not in classes:
            classes.append(type(module))
        entry = entry_of(context.orig_method)
        names = entry.names(module) if entry else ()
        if entry is None or not any(module.has_variable("params", n + SUFFIX) for n in names):
            return next_fun(*args, **kwargs)
        kernels = tuple(self._kernel(module, name) for name in names)
        return entry.handler(module, kernels, next_fun, *args, **kwargs)

    def _kernel(self, module: nn.Module, name: str) -> AdaptedKernel | None:
        if not module.has_variable("params", name):
            return None
        value = unbox(module.get_variable("params", name))
        if not module.has_variable("params", name + SUFFIX):
            return AdaptedKernel(path_of((*module.path, name)), value)
        placed: _Placed = module.get_variable("params", name + SUFFIX)
        path, adapter = placed.path, placed.adapter
        if placed.cut:
            return AdaptedKernel(path, value, observer=Unseen())
        if id(adapter.U) not in self._as_placed and self.maps.may_be_of_params(module):
            _refuse_mapped(module)

        rng = self._dropout_rng(module, path) if adapter.dropout else None
        use = functools.partial(self.used.add, path)
        return AdaptedKernel(path, value, adapter, rng, use=use, ids=placed.ids)

    @functools.cached_property
    def _as_placed(self) -> set[int]:
        """The factors that no transform has replaced."""
        return {id(node.adapter.U) for node in self.nodes.values()}

    def _dropout_rng(self, module: nn.Module, path: str) -> chex.PRNGKey:
        """A key from the module's own stream, which then goes on as if it had not been asked."""
        if not module.has_rng("dropout"):
            raise ValueError(
                f"The adapter of {path!r} has dropout, but its module has no 'dropout' rng. If an "
                f"nn.scan or nn.vmap around it does not pass it on, add "
                f"split_rngs={{'dropout': True}} there; else set dropout=0 in the rule."
            )
        rng = compat.key_aside(module, "dropout")
        self.draws[path] = self.draws.get(path, 0) + 1
        return jax.random.fold_in(rng, zlib.crc32(f"{path}{SUFFIX}{self.draws[path]}".encode()))

    def unused(self, key: Key, count: int, model: nn.Module, method: Any) -> str:
        """What to say of an adapter that had no part in the call."""
        path = path_of(key)
        classes = self.classes.get(key[:-1])
        others = f" (and {count - 1} more adapters)" if count > 1 else ""
        if classes is None:
            reached = f"{type(model).__name__}.{getattr(method, '__name__', method or '__call__')}"
            return (
                f"The adapter of {path!r}{others} was not used: {reached} did not call its "
                f"module. If this call runs a part of the model on purpose, pass "
                f"allow_unused=True; else narrow the rule, as the adapter would not be trained."
            )
        cls = classes[-1]
        name = f"{cls.__module__}.{cls.__qualname__}"
        entries = entries_of(cls)
        if any(entry.registered and key[-1] not in entry.registered for entry in entries):
            reason = f"the handler registered for {name} is for other parameters"
        elif entries:
            reason = (
                f"{name} has a handler for the method of a layer that it derives from, but did not "
                f"call it (super().__call__), or the handler did not compute with the kernel"
            )
        else:
            reason = f"there is no handler for {name}; there are handlers for {known_layers()}"
        return (
            f"The adapter of {path!r}{others} was not used: {reason}. Register a handler with "
            f"lora_jax.register, give the parameter a rule with materialize=True, or narrow the "
            f"rule."
        )


MAPPED = (
    "its parameters are mapped by nn.map_variables, as nn.WeightNorm and nn.SpectralNorm do, and "
    "an adapter would be mapped as well"
)


def _refuse_mapped(module: nn.Module) -> None:
    """Errors where a layer whose parameters are mapped has an adapter."""
    params = flatten(module.variables.get("params", {}), "params")
    found = [key for key in params if key[-1].endswith(SUFFIX)]
    if found:
        path = path_of((*module.path, *found[0])).removesuffix(SUFFIX)
        raise ValueError(
            f"The adapter of {path!r} cannot be used: {MAPPED}. Give it a rule with "
            f"materialize=True, so that W' is mapped."
        )
