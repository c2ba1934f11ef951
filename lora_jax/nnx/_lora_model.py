"""A model object whose layers have their adapters as variables, for the loops of NNX users.

Next to a kernel stand the arrays of its adapter, each an :class:`AdapterParam`: ``kernel_lora_U``,
``kernel_lora_V``, ``kernel_lora_m``. All else of the adapter is a static attribute of the layer,
and so a part of the graphdef. The layer computes its normal form when it is called.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.core._adapter import Adapter
from lora_jax.core._boxes import unbox
from lora_jax.core._fully_trained import FullyTrained
from lora_jax.core._node import Node
from lora_jax.core.products._adapted_kernel import AdaptedKernel
from lora_jax.layers._abstract_inputs import AbstractInputs
from lora_jax.layers._check_use import name_of_method
from lora_jax.layers._entry import Entry
from lora_jax.layers._handlers import Handlers, handlers_of_call
from lora_jax.nnx._adapted_class import OWN_CALL, adapted_class, own_class, set_class
from lora_jax.nnx._adapter_param import AdapterParam
from lora_jax.nnx._calls import value_in
from lora_jax.nnx._model import NnxModel
from lora_jax.nnx._variables import (
    copied,
    has_own_get_value,
    merged,
    modules_of,
    raw_value_of,
    set_value,
    value_of,
    variables_in,
    variables_of,
)
from lora_jax.trees._pair import nodes_of, pair
from lora_jax.trees._paths import Key, path_of, unflatten

_ORIGIN = "lora_jax_origin"  # the metadata of a variable that was fully trained


class _InPrecision(AdapterParam):
    """A variable that is trained in float32, and that the model sees in its own dtype."""

    def get_value(self, **kwargs: Any) -> Any:
        """The value as the model has it."""
        return self.get_metadata()[_ORIGIN].cast(super().get_value(**kwargs))


@dataclasses.dataclass(frozen=True)
class _Spec:
    """The adapter of one kernel of a layer, without its arrays."""

    key: Key
    structure: Any

    @classmethod
    def of(cls, key: Key, adapter: Adapter) -> _Spec:
        return cls(key, adapter.tree_flatten()[1])

    def adapter(self, arrays: dict[str, Any]) -> Adapter:
        return Adapter.tree_unflatten(self.structure, [arrays.get(n) for n in self.names()])

    def names(self) -> tuple[str, ...]:
        """Of the arrays; for LoRA with an ``m`` that is ``None``."""
        names: tuple[str, ...] = self.structure[0]
        return names


@dataclasses.dataclass(frozen=True)
class LayerAdapters:
    """The adapters of a layer: what its handlers ask for its kernels.

    Attributes:
      handlers: of the model.
      product: how products of two matrices are computed.
      specs: the adapters, by the names of their kernels.
    """

    handlers: Handlers
    product: str
    specs: tuple[tuple[str, _Spec], ...]

    def called(self, module: nnx.Module, entry: Entry) -> None:
        """Nothing is noted."""

    def kernel(
        self, module: nnx.Module, method: str, entry: Entry, name: str
    ) -> AdaptedKernel | None:
        """The kernel with its adapter, if it has one."""
        del method
        if (value := value_in(module, name)) is None:
            return None
        spec = dict(self.specs).get(name)
        if spec is None:
            return AdaptedKernel(name, value, built_in=entry.built_in)
        arrays = {field: value_of(v) for field, v in _arrays_of(module, name, spec)}
        adapter = spec.adapter(arrays)
        key = _dropout_key(module) if adapter.dropout else None
        return AdaptedKernel(
            path_of(spec.key),
            value,
            adapter,
            key,
            product=self.product,
            built_in=entry.built_in,
        )


class _DropoutKey(nnx.Module):
    """The stream of keys of a layer; ``model.eval()`` and ``model.train()`` set the flag."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stream = rngs.dropout.fork()
        self.deterministic = False

    def set_view(self, deterministic: bool | None = None) -> None:
        """The same for ``nnx.view``."""
        if deterministic is not None:
            self.deterministic = deterministic


@dataclasses.dataclass(frozen=True)
class _Origin:
    """What a variable was, and is again in :func:`lora_state`."""

    type: Any
    dtype: str | None

    def cast(self, value: Any) -> Any:
        """The value in the dtype that the model has it in."""
        return value if self.dtype is None else value.astype(self.dtype)

    def __call__(self, variable: Any, value: Any) -> Any:
        """The same as a hook, which is what older versions of NNX have."""
        return self.cast(value)


def lora_model(
    model: Any,
    frozen: Any,
    adapters: chex.ArrayTree,
    /,
    *args: Any,
    dropout_rngs: nnx.Rngs | None = None,
    handlers: Handlers | None = None,
    product: str = "auto",
    **kwargs: Any,
) -> Any:
    """A model object of the same graph, whose layers have the adapters in them.

    For a loop with ``nnx.Optimizer`` and ``nnx.value_and_grad``: what is trained are variables of
    the type :class:`lora_jax.AdapterParam`, next to the kernels, and nothing else is. The arrays of
    the base are not copied. The model that is given is not changed.

    In a loop that differentiates, DoRA's norm is computed in the layers, so under ``nnx.remat``
    twice: :func:`lora_jax.lora_apply` computes it once.

    Args:
      model: the ``nnx.GraphDef``, or the model.
      frozen: the frozen ``nnx.State`` from :func:`lora_jax.lora_init`.
      adapters: the adapters.
      *args: a sample input of the model. With it the adapters are checked by an abstract call, as
        :func:`lora_jax.lora_apply` checks them: that the model uses each, and reads no adapted
        kernel elsewhere. It can be left out where :func:`lora_jax.lora_init_model`, or
        ``lora_init(..., axes=axes)``, has made them for a call of this model itself. What the model
        reads in other methods, or for other flags, is not checked.
      dropout_rngs: a stream ``dropout`` for adapters with dropout: ``nnx.Rngs(dropout=0)``. It is
        active between ``model.train()`` and ``model.eval()``, and at the start.
      handlers: as for :func:`lora_jax.lora_apply`.
      product: as for :func:`lora_jax.lora_apply`.
      **kwargs: for the abstract call, ``method`` among them.

    Returns:
      The model. What it learns beside its adapters, such as statistics, goes into the frozen state
      by ``nnx.merge_state(frozen, nnx.state(model, nnx.BatchStat))``.

    Raises:
      TypeError: if the arguments are not what they should be.
      ValueError: if the adapters do not fit the base or the model, are stacked, have
        ``materialize=True``, or have dropout and there is no stream for it, or there are layers
        stacked in their kernel.

    Example:
      >>> from flax import nnx
      >>> import jax, jax.numpy as jnp, lora_jax, optax
      >>> graphdef, state = nnx.split(nnx.Linear(5, 3, rngs=nnx.Rngs(0)))
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=2)])
      >>> x = jnp.ones((2, 5))
      >>> frozen, adapters = lora_jax.lora_init_model(
      ...     jax.random.key(1), graphdef, state, config, x
      ... )
      >>> model = lora_jax.lora_model(graphdef, frozen, adapters)
      >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=lora_jax.AdapterParam)
      >>> @nnx.jit
      ... def step(model, optimizer, x):
      ...     wrt = nnx.DiffState(0, lora_jax.AdapterParam)
      ...     loss = lambda model: jnp.mean(model(x) ** 2)
      ...     loss, grads = nnx.value_and_grad(loss, argnums=wrt)(model)
      ...     optimizer.update(model, grads)
      ...     return loss
      >>> bool(step(model, optimizer, x) > step(model, optimizer, x))
      True
      >>> lora_jax.lora_state(model)["kernel"].U.shape
      (5, 2)
    """
    given = NnxModel.of(model, frozen, "lora_model")
    handlers = handlers_of_call(handlers)
    flat, nodes = pair(given.state, adapters)
    for key, node in nodes.items():
        is_checked = bool(args or kwargs)
        is_known = handlers == Handlers.registered() and _is_alone(node, given.graphdef)
        _check_node(path_of(key), node, is_checked or is_known, dropout_rngs)
    if args or kwargs:
        _check_call(given, adapters, handlers, product, args, kwargs)
    whole = {key: _trained(node) for key, node in nodes.items() if isinstance(node, FullyTrained)}
    new = merged(given.graphdef, unflatten({**copied(flat), **whole}, given.state))
    variables = variables_of(new)
    kernels = {
        id(variables[key]): (key, node)
        for key, node in nodes.items()
        if isinstance(node, Adapter) and key in variables
    }
    placed: dict[Key, dict[str, AdapterParam]] = {}
    for _, module in list(modules_of(new)):
        specs = {}
        for name, variable in list(variables_in(module)):
            if id(variable) in kernels:
                specs[name] = _Spec.of(*kernels[id(variable)])
        cls = adapted_class(own_class(module), handlers) if specs else None
        if cls is not None:
            for name, spec in specs.items():  # one kernel of several layers has one adapter
                own = placed.setdefault(spec.key, _variables_for(nodes[spec.key]))
                for field, variable in own.items():
                    setattr(module, f"{name}_lora_{field}", variable)
            if any(nodes[spec.key].dropout for spec in specs.values()):  # type: ignore[attr-defined]
                setattr(module, f"{OWN_CALL}_dropout", _DropoutKey(dropout_rngs))  # type: ignore[arg-type]
            setattr(module, OWN_CALL, LayerAdapters(handlers, product, tuple(specs.items())))
            set_class(module, cls)
    for key, node in nodes.items():
        if isinstance(node, Adapter) and key not in placed:
            raise ValueError(
                f"The adapter of {path_of(key)!r} is in no layer that can be adapted: pass a "
                f"sample input to lora_model, which then says why, or narrow the rule."
            )
    return new


def lora_state(model: nnx.Module) -> chex.ArrayTree:
    """The adapters of a model of :func:`lora_jax.lora_model`, as ``lora_init`` gives them.

    They are what :func:`lora_jax.save`, :func:`lora_jax.lora_apply`, :func:`lora_jax.lora_merge`
    and all other functions take.

    Args:
      model: the model.

    Returns:
      The tree of adapters, nested dicts.

    Raises:
      TypeError: if it is not such a model.

    Example:
      >>> from flax import nnx
      >>> import jax, lora_jax
      >>> graphdef, state = nnx.split(nnx.Linear(5, 3, rngs=nnx.Rngs(0)))
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=2)])
      >>> frozen, adapters = lora_jax.lora_init(jax.random.key(1), state, config)
      >>> model = lora_jax.lora_model(graphdef, frozen, adapters, jax.numpy.ones((2, 5)))
      >>> merged = lora_jax.lora_merge(frozen, lora_jax.lora_state(model))
      >>> nnx.merge(graphdef, merged)(jax.numpy.ones((2, 5))).shape
      (2, 3)
    """
    found: dict[Key, Any] = {}
    for spec, name, module in _specs(model, "lora_state"):
        arrays = {field: raw_value_of(v) for field, v in _arrays_of(module, name, spec)}
        adapter, shape = spec.adapter(arrays), value_of(vars(module)[name]).shape
        found[spec.key] = _off_axes_of_kernel(adapter, shape)
    for key, variable, origin in _fully_trained(model):
        boxed = origin.type.from_metadata(raw_value_of(variable), _metadata(variable))
        found[key] = boxed if origin.dtype is None else FullyTrained(boxed, origin.dtype)
    return unflatten(found, {})


def lora_update(model: nnx.Module, adapters: chex.ArrayTree) -> None:
    """Puts other adapters into a model of :func:`lora_jax.lora_model`, as ``nnx.update`` does.

    So a model serves another use case: nothing is compiled anew.

    Args:
      model: the model, which is changed.
      adapters: adapters of the same kernels, with the same ranks and variants.

    Raises:
      TypeError: if it is not such a model, or if these are no adapters.
      ValueError: if they differ from those of the model in more than their numbers.

    Example:
      >>> from flax import nnx
      >>> import jax, lora_jax
      >>> graphdef, state = nnx.split(nnx.Linear(5, 3, rngs=nnx.Rngs(0)))
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=2)])
      >>> x = jax.numpy.ones((2, 5))
      >>> frozen, one = lora_jax.lora_init(jax.random.key(1), state, config)
      >>> _, other = lora_jax.lora_init(jax.random.key(2), state, config)
      >>> model = lora_jax.lora_model(graphdef, frozen, one, x)
      >>> lora_jax.lora_update(model, other)
      >>> bool((lora_jax.lora_state(model)["kernel"].V == other["kernel"].V).all())
      True
    """
    before, nodes = nodes_of(lora_state(model)), nodes_of(adapters)
    for key in sorted(before.keys() ^ nodes.keys()):
        which = "the model" if key in before else "these adapters"
        raise ValueError(f"Only {which} has an adapter for {path_of(key)!r}. {_ANEW}")
    for key, node in nodes.items():
        node.check_alone(path_of(key))
        old = before[key]
        if _kind(old) != _kind(node):
            raise ValueError(
                f"The adapter of {path_of(key)!r} is another one than the model's, with another "
                f"rank, scale, variant or dtype. {_ANEW}"
            )
    for spec, name, module in list(_specs(model, "lora_update")):
        adapter: Any = nodes[spec.key]
        placed = _on_axes_of_kernel(adapter)
        for field, variable in _arrays_of(module, name, spec):
            set_value(variable, jnp.asarray(placed[field]))
    for key, variable, _ in _fully_trained(model):
        set_value(variable, jnp.asarray(nodes[key].arrays["value"]))


_ANEW = "Make another model for these adapters, lora_jax.lora_model(graphdef, frozen, adapters)."


def _is_alone(node: Node, graphdef: Any) -> bool:
    """Whether ``kernel_axes`` found that a call of the model reads the kernel in its layer only."""
    if not isinstance(node, Adapter):
        return False
    of_model = [name_of_method(graphdef, None, variables) for variables in (False, True)]
    known = node.axes.alone or ""
    return node.untied or any(name and known.startswith(f"{name},") for name in of_model)


def _check_node(path: str, node: Node, is_alone: bool, rngs: nnx.Rngs | None) -> None:
    """Raises ValueError if a layer cannot have a node in it."""
    if isinstance(node, FullyTrained):
        return
    if not isinstance(node, Adapter):
        raise ValueError(
            f"What is trained of {path!r} is {node.kind!r}, which a model cannot have in a layer: "
            f"call it by lora_jax.lora_apply, which also takes stacked adapters."
        )
    if not node.in_layer:
        raise ValueError(
            f"The adapter of {path!r} has materialize=True: W' stands in the place of the "
            f"parameter, and is no variable. Call the model by lora_jax.lora_apply."
        )
    if not is_alone:
        raise ValueError(
            f"Whether the model reads {path!r} in its layer only is not known: pass a sample "
            f"input, lora_model(graphdef, frozen, adapters, x), and method= where it is not the "
            f"model itself that is called."
        )
    if node.dropout and not _has_stream(rngs):
        raise ValueError(
            f"The adapter of {path!r} has dropout: pass dropout_rngs=nnx.Rngs(dropout=0), or "
            f"another key."
        )
    if node.dropout and node.axes.batch:
        raise ValueError(
            f"The adapter of {path!r} has dropout and is of stacked layers, which have no key each "
            f"in a model. Call it by lora_jax.lora_apply(..., dropout_key=key)."
        )


def _has_stream(rngs: Any) -> bool:
    """Whether there are keys for dropout."""
    return isinstance(rngs, nnx.Rngs) and ("dropout" in rngs or "default" in rngs)


def _check_call(
    given: NnxModel,
    adapters: chex.ArrayTree,
    handlers: Handlers,
    product: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Calls the model abstractly, with all the checks of ``lora_apply``."""
    inputs = AbstractInputs.of((given.rest, adapters, args, kwargs))

    def call(arrays: list[Any]) -> int:
        rest, nodes, args, kwargs = copied(inputs.with_arrays(arrays))
        given.apply(
            rest,
            nodes,
            args,
            given.with_keys(None, kwargs),
            dropout=False,
            allow_unused=False,
            handlers=handlers,
            product=product,
        )
        return 0

    jax.eval_shape(call, inputs.arrays)


def _specs(model: Any, caller: str) -> Iterator[tuple[_Spec, str, Any]]:
    """The adapters in a model, the names of their kernels, and the modules, each adapter once."""
    if not isinstance(model, nnx.Module):
        raise TypeError(f"{caller} is for a model of lora_model, got {type(model).__name__}.")
    seen: set[Key] = set()
    for _, module in modules_of(model):
        beside = vars(module).get(OWN_CALL)
        for name, spec in () if beside is None else beside.specs:
            if spec.key not in seen:
                seen.add(spec.key)
                yield spec, name, module
    if not seen and not any(True for _ in _fully_trained(model)):
        raise TypeError(
            f"{caller} is for a model of lora_model, and this {type(model).__name__} has no "
            f"adapters in it."
        )


def _fully_trained(model: Any) -> Iterator[tuple[Key, Any, _Origin]]:
    """The variables that are fully trained, with their keys."""
    for key, variable in variables_of(model).items():
        origin = variable.get_metadata().get(_ORIGIN)
        if origin is not None:
            yield key, variable, origin


def _trained(node: FullyTrained) -> AdapterParam:
    """The variable of a leaf that is fully trained."""
    variable = node.value
    origin = _Origin(type(variable), node.dtype)
    metadata = {**_metadata(variable), _ORIGIN: origin}
    by_method = has_own_get_value(nnx.Variable)
    if node.dtype is not None and not by_method:
        metadata["on_get_value"] = origin
    cls = _trained_class(origin.type, casts=node.dtype is not None and by_method)
    variable_: AdapterParam = cls.from_metadata(unbox(variable), metadata)  # calls no hooks
    return variable_


@functools.cache
def _trained_class(of: Any, *, casts: bool) -> Any:
    """The type of what was a variable of another type: of both, so that filters find it."""
    ours = _InPrecision if casts else AdapterParam
    return ours if issubclass(ours, of) else type(of.__name__, (ours, of), {})


def _metadata(variable: Any) -> dict[str, Any]:
    """What a variable says of itself, without what we say of it."""
    metadata = dict(variable.get_metadata())
    if metadata.pop(_ORIGIN, None) is not None:
        metadata.pop("on_get_value", None)
    return metadata


def _variables_for(adapter: Any) -> dict[str, AdapterParam]:
    """The variables of an adapter, by the names of its arrays."""
    arrays = _on_axes_of_kernel(adapter)
    return {field: AdapterParam(jnp.asarray(array)) for field, array in arrays.items()}


def _arrays_of(module: Any, name: str, spec: _Spec) -> Iterator[tuple[str, Any]]:
    """The variables of an adapter, by the names of its arrays."""
    for field in spec.names():
        variable = vars(module).get(f"{name}_lora_{field}")
        if variable is not None:
            yield field, variable


def _on_axes_of_kernel(adapter: Adapter) -> dict[str, Any]:
    place, ndims = adapter.axes.place, adapter.matrix_ndims()
    return {name: place(array, ndims[name]) for name, array in adapter.arrays.items()}


def _off_axes_of_kernel(adapter: Adapter, kernel_shape: tuple[int, ...]) -> Adapter:
    ndims, shapes = adapter.matrix_ndims(), adapter.shapes(kernel_shape)
    arrays = {
        name: adapter.axes.take(array, ndims[name], shapes[name])
        for name, array in adapter.arrays.items()
    }
    return adapter.replace(arrays=arrays)


def _dropout_key(module: Any) -> chex.PRNGKey | None:
    dropout = vars(module)[f"{OWN_CALL}_dropout"]
    return None if dropout.deterministic else dropout.stream()


def _kind(node: Node) -> Any:
    """All of a node but its numbers."""
    arrays, structure = jax.tree.flatten(node.arrays)
    more = node.tree_flatten()[1] if isinstance(node, Adapter) else node.kind
    dtype = node.merged_dtype() if isinstance(node, FullyTrained) else None
    return structure, [(jnp.shape(a), jnp.result_type(a)) for a in arrays], more, dtype
