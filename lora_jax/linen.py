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
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import empty_node

from lora_jax import compat
from lora_jax import layers as _layers  # noqa: F401  (enters its handlers)
from lora_jax import packages as _packages  # noqa: F401
from lora_jax.adapter import Adapter, Shift
from lora_jax.kernel import AdaptedKernel
from lora_jax.mixed import BASE, MAP_ROWS, Rows, checked_ids, taken
from lora_jax.product import normalized
from lora_jax.registry import entries_of, entry_of, known_layers
from lora_jax.rowwise import OwnLeaves, beside, call_by_rows, own_leaves
from lora_jax.tree import Key, flatten, join, merged_kernel, path_of, unbox, unflatten

# The name of an adapter is that of its parameter and this.
SUFFIX = "@lora"

# Arguments by which Flax models are told that they are evaluated, with the value that says so.
_EVALUATES = {"deterministic": True, "train": False, "training": False, "is_training": False}
# Arguments of ``apply`` itself.
_OF_APPLY = ("rngs", "mutable", "method", "capture_intermediates")


def lora_apply(
    model: Any,
    variables: Mapping[str, Any],
    adapters: chex.ArrayTree,
    /,
    *args: Any,
    adapter_ids: Any = None,
    allow_unused: bool = False,
    **kwargs: Any,
) -> Any:
    """``model.apply(variables, *args, **kwargs)`` of the adapted model.

    Every layer that has an adapter computes ``x W'`` in place of ``x W``, in its own dtype; the
    model's code is not changed and the base is not copied. (With ``Rule(substitute=True)`` the
    parameter itself is replaced by ``W'``.) Differentiate with respect to
    ``adapters``, and pass the base as an argument to the jitted function: what a jitted function
    closes over is compiled into it as a constant.

    Adapter dropout (``Rule(dropout=...)``) is active when the call passes a ``dropout`` rng,
    ``rngs={"dropout": key}``, and does not evaluate: ``deterministic=True``, ``train=False``,
    ``training=False`` or ``is_training=False``, as an argument or as the default of the model's
    method. So leave out the rng to switch it off in evaluation, or pass such an argument. (An rng
    by another name, on which Flax would fall back, is not one for adapters.)

    With ``adapter_ids`` every example of the batch has an adapter of its own, of a stack
    (:func:`lora_jax.stack`), or with the id -1 the base alone; the product with ``W`` is computed
    once for all of them (:mod:`lora_jax.mixed`). The first axes of the input of every adapted layer
    must be those of the batch. Ids may be traced: other ids, and other adapters of the same shapes,
    are no other program. An id that is of no adapter is an error, or, traced, gives NaN in its row.

    Args:
      model: the model; it need not know of this library. A ``flax.linen`` module, or a Flax model
        of Hugging Face, which is called as ``model(*args, params=..., **kwargs)``.
      variables: its variables, with the frozen base: ``{"params": frozen}``; other collections
        (``batch_stats``, ``cache``) as for ``model.apply``.
      adapters: the adapters from :func:`lora_jax.lora_init`.
      *args: for ``model.apply``.
      adapter_ids: integers, ``(batch,)`` for one adapter for each example, ``(batch, tokens)`` for
        one for each token; or one number, for one adapter for all. With it ``adapters`` are
        stacked, and ``variables`` may have all parameters: a leaf that was trained whole is there
        for the rows with the base alone.
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
    check_model(model, variables, "lora_apply")
    dropout = _dropout_is_active(model, args, kwargs)
    nodes: dict[Key, _Placed] = {}
    count = None if adapter_ids is None else _count(adapters)
    ids = None if count is None else checked_ids(adapter_ids, count)
    one_for_all = ids is not None and ids.ndim == 0

    def place(key: Key, kernel: Any, node: Adapter | Shift) -> dict[Key, Any]:
        path, rows = path_of(key), None
        if isinstance(node, Shift):  # never stacked
            return {key: merged_kernel(kernel, node)}
        adapter = node
        if one_for_all:
            adapter = jax.tree.map(lambda array: taken(array, ids, 0.0), adapter)
        if adapter.substitute:
            if ids is None:
                return {key: merged_kernel(kernel, adapter)}
            if not one_for_all:
                raise ValueError(
                    f"The adapters of {path!r} have substitute=True, and W' cannot be another one "
                    f"in every row. {MAP_ROWS}"
                )
            merged = merged_kernel(kernel, adapter)
            return {key: jax.tree.map(lambda W_, W: jnp.where(ids == BASE, W, W_), merged, kernel)}
        if dropout and adapter.dropout is None:
            raise ValueError(
                f"The adapters of {path!r} have several rates of dropout, so that it cannot be "
                f"active: train them apart, or call without the 'dropout' rng."
            )
        array = unbox(kernel)
        adapter = normalized(array, adapter)
        if one_for_all and adapter.m is not None:
            adapter = adapter.replace(m=jnp.where(ids == BASE, 1.0, adapter.m))  # type: ignore[attr-defined]
        arrays = {name: x for name in ("U", "V", "m") if (x := getattr(adapter, name)) is not None}
        if ids is not None and count is not None and not one_for_all:
            rows = Rows.beside(ids, count, adapter.axes, array.shape)
            behind = len(adapter.axes.stack_shape(array.shape))
            arrays = {name: jnp.moveaxis(x, 0, behind) for name, x in arrays.items()}
        arrays = {
            name: adapter.axes.place(x, 1 if name == "m" else 2) for name, x in arrays.items()
        }
        # With dropout off it is off in the tree's structure, so that nn.jit traces again.
        rate = adapter.dropout if dropout else 0.0
        adapter = adapter.replace(dropout=rate, **arrays)  # type: ignore[attr-defined]
        nodes[key] = _Placed(adapter, path, rows)
        return {key: kernel, (*key[:-1], key[-1] + SUFFIX): nodes[key]}

    whole = None if ids is None else functools.partial(beside, ids=ids)
    placed = join(variables["params"], adapters, place, count, whole)
    own = {
        leaf.path: leaf
        for leaf in flatten(placed, "params").values()
        if isinstance(leaf, OwnLeaves)
    }
    batch = None if ids is None or ids.ndim == 0 else ids.shape[0]
    calls = _Calls(nodes, kwargs.get("method"), own, batch=batch)
    _ACTIVE.stack = [*_ACTIVE.stack, calls]
    try:
        with nn.intercept_methods(calls.intercept):
            out = call_model(model, {**variables, "params": placed}, args, kwargs)
    finally:
        _ACTIVE.stack = _ACTIVE.stack[:-1]
    if not allow_unused:
        calls.check_used(model)
    if kwargs.get("mutable", False) is False:
        return out
    return _restored(out, variables["params"], placed)


def _count(adapters: chex.ArrayTree) -> int:
    """How many adapters are stacked."""
    nodes = [node for node in flatten(adapters, "adapters").values() if node is not empty_node]
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(nodes)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "adapter_ids is for stacked adapters, of which every array has the number of adapters "
            f"as its first size, and here these are {sorted(sizes)}: stack them with "
            f"lora_jax.stack([...])."
        )
    return int(sizes.pop()[0])


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


def _is_hugging_face(model: Any) -> bool:
    return callable(model) and isinstance(getattr(model, "module", None), nn.Module)


def _dropout_is_active(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    rngs = kwargs.get("rngs")
    has_rng = isinstance(rngs, Mapping) and "dropout" in rngs
    if not has_rng and kwargs.get("dropout_rng") is None:
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
    for one what it has traced for another.
    """

    adapter: Adapter
    path: str = flax.struct.field(pytree_node=False)
    rows: Rows | None = None


# Placed adapters that were used inside an nn.jit, of any call, by their structure: nn.jit does not
# trace again what it has in its cache, so that the use is seen by the first call only.
_SEEN_IN_JIT: set[Any] = set()


class _Active(threading.local):
    """The calls of lora_apply that are under way: of one inside another, the inner one adapts."""

    stack: list[_Calls] = []  # noqa: RUF012  (replaced, never changed)


_ACTIVE = _Active()


@dataclasses.dataclass(eq=False)
class _Calls:
    """The interceptor of one ``lora_apply``, and what it saw."""

    nodes: Mapping[Key, _Placed]
    method: Any
    own: Mapping[str, OwnLeaves] = dataclasses.field(default_factory=dict)
    classes: dict[Key, list[type[nn.Module]]] = dataclasses.field(default_factory=dict)
    used: set[str] = dataclasses.field(default_factory=set)
    draws: dict[str, int] = dataclasses.field(default_factory=dict)
    batch: Any = None
    mapped: set[Key] = dataclasses.field(default_factory=set)
    around: compat.Transforms = dataclasses.field(default_factory=compat.Transforms)

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
        self._note_mapped(module, (args, kwargs))
        if self.own and context.method_name != "setup" and (own := own_leaves(module)):
            self._check_mapped(module, [leaf.leaves for leaf in own.values()])
            self._note(module, own.values())
            return call_by_rows(module, context.method_name, own, args, kwargs)
        entry = entry_of(context.orig_method)
        names = entry.names(module) if entry else ()
        if entry is None or not any(module.has_variable("params", n + SUFFIX) for n in names):
            return next_fun(*args, **kwargs)
        kernels = tuple(self._kernel(module, name) for name in names)
        for kernel in kernels:
            if kernel is not None and kernel.rows is not None:
                self._check_mapped(module, kernel.rows.ids)
        return entry.handler(module, kernels, next_fun, *args, **kwargs)

    def _note_mapped(self, module: nn.Module, given: Any) -> None:
        """Notes that an nn.vmap may have taken the axis of the batch off what is given."""
        if self.batch is None or not self.around.may_have(module, "vmap"):
            return
        sizes = compat.mapped_sizes(jax.tree.leaves(given))
        if sizes is None or self.batch in sizes:
            self.mapped.add(module.path)

    def _check_mapped(self, module: nn.Module, own: Any) -> None:
        """Errors where this module, or one around it, was noted, and the ids are not mapped."""
        inside = any(module.path[: len(path)] == path for path in self.mapped)
        if inside and not compat.mapped_sizes(jax.tree.leaves(own)):
            raise ValueError(
                f"The layer {path_of(module.path)!r} is inside an nn.vmap over an axis of the size "
                f"of adapter_ids, {self.batch}, so the first axis of its input may not be the "
                f"batch. {MAP_ROWS}"
            )

    def _kernel(self, module: nn.Module, name: str) -> AdaptedKernel | None:
        if not module.has_variable("params", name):
            return None
        value = unbox(module.get_variable("params", name))
        if not module.has_variable("params", name + SUFFIX):
            return AdaptedKernel(path_of((*module.path, name)), value)
        placed: _Placed = module.get_variable("params", name + SUFFIX)
        path, adapter = placed.path, placed.adapter
        if id(adapter.U) not in self._as_placed and self.around.may_map_params(module):
            _refuse_mapped(module)

        rng = self._dropout_rng(module, path) if adapter.dropout else None
        use = functools.partial(self._note, module, [placed])
        return AdaptedKernel(path, value, adapter, rng, use=use, rows=placed.rows)

    @functools.cached_property
    def _as_placed(self) -> set[int]:
        """The factors that no transform has replaced."""
        return {id(node.adapter.U) for node in self.nodes.values()}

    def _note(self, module: nn.Module, placed: Iterable[_Placed | OwnLeaves]) -> None:
        """These were used."""
        for node in placed:
            self.used.add(node.path)
            if compat.is_inside_jit(module):
                _SEEN_IN_JIT.add(jax.tree.structure(node))

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

    def check_used(self, model: nn.Module) -> None:
        """Errors where an adapter had no part in the call."""
        unused = [key for key, node in self.nodes.items() if not self._was_used(node)]
        if unused:
            raise ValueError(self._unused(unused, model))
        for path, leaves in self.own.items():
            if not self._was_used(leaves):
                raise ValueError(
                    f"{path!r} was trained whole and differs from row to row, but no module was "
                    f"called that has it as a parameter of its own."
                )

    def _was_used(self, node: _Placed | OwnLeaves) -> bool:
        return node.path in self.used or jax.tree.structure(node) in _SEEN_IN_JIT

    def _unused(self, unused: list[Key], model: nn.Module) -> str:
        key, method = unused[0], self.method
        path = path_of(key)
        classes = self.classes.get(key[:-1])
        others = f" (and {len(unused) - 1} more adapters)" if len(unused) > 1 else ""
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
            f"lora_jax.register, give the parameter a rule with substitute=True, or narrow the "
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
            f"substitute=True, so that W' is mapped."
        )
