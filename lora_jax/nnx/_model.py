"""An NNX model with adapters in its layers: what ``lora_apply`` needs to know of it.

For a call the model is made anew from its graphdef and a copy of its state, so that no object of
the user's is changed.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.core._boxes import content
from lora_jax.core._model_axes import ModelAxes
from lora_jax.layers._check_use import (
    check_ties,
    check_used,
    name_of_call,
    not_called,
    not_computed,
)
from lora_jax.layers._handlers import Handlers
from lora_jax.layers._place_adapters import CallIds, Placed, place
from lora_jax.nnx._adapted_class import adapted_class, own_class
from lora_jax.nnx._adapter_param import AdapterParam
from lora_jax.nnx._calls import SUFFIX, AdaptedCall, refuse_changed, under_way
from lora_jax.nnx._in_layers import explained, parents_of, put_beside
from lora_jax.nnx._kernel_axes import axes_of_call
from lora_jax.nnx._model_call import call_model
from lora_jax.nnx._variables import arrays_of, copied, merged, variables_of
from lora_jax.tracing._arrays_in import arrays_in
from lora_jax.trees._paths import Key, flatten, path_of, unflatten
from lora_jax.trees._rounding import key_for
from lora_jax.trees._states import parameters_in

# The argument in which keys travel: that of adapters' dropout, and those of the model.
_KEYS = "lora_jax: keys"


def is_nnx(value: Any) -> bool:
    """Whether something is a model of NNX, its graphdef or its state."""
    return isinstance(value, nnx.GraphDef | nnx.Module | nnx.State)


@dataclasses.dataclass(frozen=True)
class NnxModel:
    """A graphdef and a state.

    Attributes:
      graphdef: says what the model is.
      state: its state.
      base: the frozen base: the parameters in it.
      rest: the other variables by the names of their types, and their paths.
    """

    graphdef: Any
    state: Any
    base: chex.ArrayTree
    rest: Mapping[str, Any]

    KEYS = (_KEYS,)

    @classmethod
    def of(cls, model: Any, variables: Any, name: str) -> NnxModel:
        """The first two arguments of a function, checked.

        Raises:
          TypeError: if they are not a graphdef, or a model, and a state.
        """
        if isinstance(model, nnx.Module):
            if any(isinstance(v, AdapterParam) for v in variables_of(model).values()):
                raise _has_adapters(name)
            if not isinstance(variables, nnx.State):
                raise _not_a_state(variables, name, type(model).__name__)
            model = nnx.graphdef(model)
        if not isinstance(model, nnx.GraphDef):
            raise TypeError(
                f"{name} got an nnx.State as variables, and {type(model).__name__} as the model: "
                f"pass the model's graphdef, graphdef, state = nnx.split(model). A flax.linen "
                f"module takes {{'params': params}}."
            )
        if not isinstance(variables, nnx.State):
            raise _not_a_state(variables, name, "an nnx.GraphDef")
        flat = flatten(variables, "state")
        if any(isinstance(leaf, AdapterParam) for leaf in flat.values()):
            raise _has_adapters(name)
        rest: dict[str, dict[str, Any]] = {}
        params = parameters_in(flat)
        for key, leaf in flat.items():
            if not (key in params or isinstance(leaf, nnx.RngKey)):
                rest.setdefault(_kind(leaf), {})[path_of(key)] = leaf
        base = unflatten(params, variables)
        return cls(model, variables, base, rest)

    @property
    def params(self) -> chex.ArrayTree:
        """What ``lora_init`` splits."""
        return self.state

    def axes(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], handlers: Handlers
    ) -> ModelAxes:
        """The axes of the kernels, from one abstract call."""
        return axes_of_call(self.graphdef, self.state, args, kwargs, handlers)

    def with_keys(self, key: chex.PRNGKey | None, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments, with all keys of random numbers among them.

        Raises:
          TypeError: if keys are given as to a Linen model.
        """
        if isinstance(kwargs.get("rngs"), dict):
            raise TypeError(
                "rngs={...} is for Linen models. An NNX model has its keys in its state, or takes "
                "rngs=nnx.Rngs(...) itself; for the dropout of adapters pass dropout_key=key."
            )
        of_model = {
            path_of(key): leaf
            for key, leaf in flatten(self.state, "state").items()
            if isinstance(leaf, nnx.RngKey)
        }
        return {**kwargs, _KEYS: (key, of_model)}

    def has_dropout(
        self, wanted: bool | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> bool:
        """Whether adapters have their dropout in a call.

        Raises:
          ValueError: if it is wanted, and the call has no key for it.
        """
        has_key = kwargs[_KEYS][0] is not None
        if wanted and not has_key:
            raise ValueError("adapter_dropout=True needs a key: pass dropout_key=key.")
        return has_key if wanted is None else wanted

    def apply(
        self,
        rest: Mapping[str, Any],
        adapters: chex.ArrayTree,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        ids: CallIds | None = None,
        *,
        dropout: bool,
        allow_unused: bool,
        handlers: Handlers,
        product: str,
    ) -> Any:
        """A call of the model with one adapter, or of one row of the batch.

        Args:
          rest: the variables that are not parameters, by the names of their types.
          adapters: the adapters, stacked if there are ids.
          args: of the model.
          kwargs: of the model, and ``method`` and ``mutable``.
          ids: which of the adapters the call has.
          dropout: whether adapters have their dropout.
          allow_unused: allow adapters that the call does not use.
          handlers: of the call.
          product: how layers compute products of two matrices.
        """
        kwargs = dict(kwargs)
        dropout_key, keys = kwargs.pop(_KEYS)
        mutable = self.gives_variables(kwargs)
        kwargs.pop("mutable", None)
        method = kwargs.pop("method", None)
        others = self._by_key(*rest.values(), keys)
        params, placed = place(
            self.base, adapters, ids, dropout=dropout, handlers=handlers, product=product
        )
        if dropout:
            placed = {
                key: _with_key(node, content(params[key]), dropout_key)
                for key, node in placed.items()
            }

        def call(
            params: Mapping[Key, Any], placed: Mapping[Key, Placed], seen: AdaptedCall, given: Any
        ) -> tuple[Any, Any]:
            state = unflatten(copied({**params, **others}), self.state)
            model = merged(self.graphdef, state)
            put_beside(model, placed, handlers)
            args, kwargs = given
            before = arrays_of(given)
            with under_way(seen), explained():
                y = call_model(model, method, args, kwargs)
            changed = any(map(operator.is_not, before, arrays_of(given)))
            if ids is not None and ids.of_row and changed:
                raise ValueError(
                    "The model changes a variable of its arguments, such as a cache, which is lost "
                    "where each row is called by itself: return it with the result, as by "
                    "method=lambda model, x, cache: (model(x, cache), cache)."
                )
            return y, model

        def results(params: Mapping[Key, Any], placed: Mapping[Key, Placed]) -> list[Any]:
            y, model = call(params, placed, AdaptedCall(handlers), copied((args, kwargs)))
            changed = _after(model) if mutable else {}
            others = {k: v for k, v in changed.items() if not isinstance(v, nnx.Param)}
            return list(arrays_in((y, others)))

        seen = AdaptedCall(handlers)
        y, model = call(params, placed, seen, (args, kwargs))
        if ids is not None and ids.of_row and not mutable:
            _refuse_lost_statistics(model, others)
        if not allow_unused:

            def message(key: Key, more: str) -> str:
                modules = parents_of(model)
                module = modules.get(key[:-1])
                if module is None:
                    above = next(m for n in range(len(key)) if (m := modules.get(key[: -n - 1])))
                    return _of_no_module(key, more, above)
                cls = own_class(module)
                known = adapted_class(cls, handlers) is not None
                if known and path_of(key) not in seen.reached and _inherits_call(cls, handlers):
                    reached = getattr(method, "__name__", method or "__call__")
                    return not_called(key, more, f"{own_class(model).__name__}.{reached}")
                return not_computed(key, more, cls, handlers, other_than="nn.")

            check_used(results, params, placed, seen.used, message)

        def name() -> str | None:
            return name_of_call(self.graphdef, args, kwargs, method, mutable)

        given = params, placed, rest, args, kwargs, method
        check_ties(results, params, placed, name, self.graphdef, given, refuse_changed)
        if not mutable:
            return y
        return y, self._collections(model, params, rows=ids is not None and ids.of_row)

    def gives_variables(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a call gives a result and variables, by its arguments."""
        return kwargs.get("mutable", False) is not False

    def result(self, out: Any, kwargs: Mapping[str, Any]) -> Any:
        """What ``lora_apply`` returns, from what :meth:`apply` gives."""
        if not self.gives_variables(kwargs):
            return out
        y, collections = out
        changed = self._by_key(*collections.values())
        state = unflatten({**flatten(self.state, "state"), **changed}, self.state)
        mutable = kwargs["mutable"]
        chosen = state if mutable is True else nnx.filter_state(state, mutable)
        if _has_words(mutable) and not jax.tree.leaves(chosen):
            raise ValueError(
                f"mutable={mutable!r} matches no variable of the model: for an NNX model it is a "
                f"filter of NNX, as nnx.BatchStat, or True for all variables."
            )
        return y, chosen

    def axes_by_name(self, variable_axes: Mapping[Any, Any]) -> dict[str, Any]:
        """Axes of variables by the names of their types."""
        return {getattr(of, "__name__", of): axes for of, axes in variable_axes.items()}

    def _by_key(self, *collections: Mapping[str, Any]) -> dict[Key, Any]:
        """Variables by their keys, from those by their paths."""
        keys = {path_of(key): key for key in flatten(self.state, "state")}
        return {
            keys.get(path, tuple(path.split("/"))): leaf
            for leaves in collections
            for path, leaf in leaves.items()
        }

    def _collections(
        self, model: Any, params: Mapping[Key, Any], *, rows: bool
    ) -> dict[str, dict[str, Any]]:
        """What the call has changed, by the names of the types and the paths.

        Args:
          model: after the call.
          params: that it was given.
          rows: whether this is one row of many: then parameters and keys are as they were given.
        """
        base = flatten(self.base, "state")
        found: dict[str, dict[str, Any]] = {}
        for key, variable in _after(model).items():
            if key in params:
                changed = _is_other(variable, params[key])
                if not changed or key not in base:
                    continue
            if not (rows and isinstance(variable, nnx.Param | nnx.RngKey)):
                found.setdefault(_kind(variable), {})[path_of(key)] = variable
        return found


def _is_other(variable: Any, given: Any) -> bool:
    """Whether a variable has other arrays than it was given."""
    return any(map(operator.is_not, jax.tree.leaves(variable), jax.tree.leaves(given)))


def _has_words(mutable: Any) -> bool:
    """Whether names are in a filter, as for a Linen model."""
    several = mutable if isinstance(mutable, list | tuple) else [mutable]
    return any(isinstance(one, str) for one in several)


def _refuse_lost_statistics(model: Any, given: Mapping[Key, Any]) -> None:
    """Raises ValueError if one row of many was normalized by itself."""
    for key, variable in _after(model).items():
        changed = key in given and _is_other(variable, given[key])
        if changed and isinstance(variable, nnx.BatchStat):
            raise ValueError(
                f"The model changes the statistics {path_of(key)!r}, which are those of a batch, "
                f"where each row is called by itself: serve with model.eval() before nnx.split, "
                f"or use_running_average=True."
            )


def _after(model: Any) -> dict[Key, Any]:
    """The variables of a model after a call, without what was put next to kernels."""
    return {k: v for k, v in variables_of(model).items() if not k[-1].endswith(SUFFIX)}


def _with_key(placed: Placed, kernel: Any, dropout_key: chex.PRNGKey) -> Placed:
    """An adapter with a key for each of the matrices that are stacked in its kernel."""
    if not jnp.issubdtype(dropout_key.dtype, jax.dtypes.prng_key):
        dropout_key = jax.random.wrap_key_data(dropout_key)
    batch = placed.adapter.axes.batch
    shape = tuple(n if axis in batch else 1 for axis, n in enumerate(kernel.shape))
    keys = jax.random.split(key_for(dropout_key, placed.path), shape if batch else (1,))
    return dataclasses.replace(placed, rng=keys)


def _inherits_call(cls: type[Any], handlers: Handlers) -> bool:
    """Whether the class calls its layer's method as it is."""
    method = getattr(adapted_class(cls, handlers), "__call__", None)  # noqa: B004
    return hasattr(method, "__wrapped__")


def _of_no_module(key: Key, more: str, above: nnx.Module) -> str:
    """The message for an adapter of a parameter that is in no module of its own.

    Args:
      key: of the kernel.
      more: words for how many more there are.
      above: the module that it is somewhere in.
    """
    cls = own_class(above)
    reason = f"it is in a container of {cls.__module__}.{cls.__qualname__}, and no layer's own"
    if isinstance(above, nnx.bridge.ToNNX):
        reason = "it is of a flax.linen module, inside of an NNX one by nnx.bridge.ToNNX"
    return (
        f"The adapter of {path_of(key)!r}{more} was not used: {reason}. Give the parameter a rule "
        f"with materialize=True, or narrow the rule."
    )


def _kind(leaf: Any) -> str:
    """The name of the type of a variable; of an array without one ``"data"``."""
    return type(leaf).__name__ if isinstance(leaf, nnx.Variable) else "data"


def _has_adapters(name: str) -> TypeError:
    return TypeError(
        f"{name} got a model of lora_model, or its state, which has its adapters in it. Call that "
        f"model itself; or pass the graphdef and the frozen state that it was made of, and "
        f"lora_jax.lora_state(model)."
    )


def _not_a_state(variables: Any, name: str, model: str) -> TypeError:
    return TypeError(
        f"{name} got {model}, and {type(variables).__name__} as its variables: pass its nnx.State, "
        f"graphdef, state = nnx.split(model), or the frozen state that lora_init returned."
    )
