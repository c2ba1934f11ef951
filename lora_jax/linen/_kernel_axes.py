"""An abstract call of a Linen model, in which it is seen which axes its kernels have."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import chex
import flax.core
import flax.linen as nn
import jax
from flax.core import FrozenDict
from flax.traverse_util import empty_node

from lora_jax.core._boxes import unbox
from lora_jax.core._model_axes import ModelAxes
from lora_jax.layers._abstract_inputs import AbstractInputs, abstract, without_values
from lora_jax.layers._axes_seen import AxesSeen
from lora_jax.layers._check_use import name_of_call
from lora_jax.layers._find_axes import find_axes
from lora_jax.layers._handlers import Handlers
from lora_jax.linen._axes_observer import AxesObserver
from lora_jax.linen._axis_labels import Label, labels_of, renewed
from lora_jax.linen._model_call import call_model, gives_variables
from lora_jax.tracing._arrays_in import arrays_in
from lora_jax.trees._pair import base_of
from lora_jax.trees._paths import Key, path_of, unflatten


def axes_of_call(
    model: Any,
    variables: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    handlers: Handlers,
) -> ModelAxes:
    """The axes of the kernels of a Linen model."""
    call = _AbstractCall.of(model, variables, args, kwargs, handlers)
    name = (
        name_of_call(model, args, kwargs, kwargs.get("method"), gives_variables(kwargs))
        if handlers == Handlers.registered()
        else None
    )
    try:
        return find_axes(call, name)
    except Exception:
        # A parameter may be a dict itself, which has no room for labels: only modules have.
        modules = dataclasses.replace(call, labels={}).trace(cuts=False)[0].modules
        labels = {key: label for key, label in call.labels.items() if key[:-1] in modules}
        return find_axes(dataclasses.replace(call, labels=labels), name)


@dataclasses.dataclass(frozen=True)
class _AbstractCall:
    """A call of a model, to be traced: it holds no array of JAX alive.

    Attributes:
      model: the model.
      handlers: of the call.
      params: the parameters without values, by their keys.
      like: an empty tree of the kind that the parameters are in.
      rest: the other collections, without values.
      inputs: the arguments, without values.
      labels: those of the parameters.
    """

    model: Any
    handlers: Handlers
    params: dict[Key, Any]
    like: chex.ArrayTree
    rest: dict[str, Any]
    inputs: AbstractInputs
    labels: Mapping[Key, Label]

    @classmethod
    def of(
        cls,
        model: Any,
        variables: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        handlers: Handlers,
    ) -> _AbstractCall:
        """The call with these arguments."""
        params = {
            key: leaf
            for key, leaf in base_of(variables["params"], "params").items()
            if leaf is not empty_node
        }
        rest = {name: value for name, value in variables.items() if name != "params"}
        params = {key: without_values(leaf) for key, leaf in params.items()}
        rest = jax.tree.map(abstract, rest)
        return cls(
            model=model,
            handlers=handlers,
            params=params,
            like=flax.core.freeze({}) if isinstance(variables["params"], FrozenDict) else {},
            rest=rest,
            inputs=AbstractInputs.of((args, dict(kwargs))),
            labels=labels_of(params),
        )

    def trace(self, cuts: bool) -> tuple[AxesSeen, Any]:
        """What is seen in the call, and its jaxpr."""
        seen, labels = AxesSeen(cuts), renewed(self.labels)
        observer = AxesObserver(self.handlers, seen)

        def call(params: dict[Key, Any], rest: Mapping[str, Any], inputs: list[Any]) -> list[Any]:
            args, kwargs = self.inputs.with_arrays(inputs)
            labelled = unflatten({**params, **labels}, self.like)
            seen.given = {path_of(key): unbox(leaf) for key, leaf in params.items()}
            with nn.intercept_methods(observer.intercept):
                out = call_model(self.model, {**rest, "params": labelled}, args, kwargs)
            seen.given = {}  # what is traced must not outlive the trace
            y = out
            if kwargs.get("mutable", False) is not False and isinstance(self.model, nn.Module):
                # That the parameters are given back is not a use of them.
                y = out[0]
                out = y, {name: tree for name, tree in out[1].items() if name != "params"}
            seen.results = [(x.shape, x.dtype) for x in arrays_in(y)]
            return list(arrays_in(out))

        return seen, jax.make_jaxpr(call)(self.params, self.rest, self.inputs.arrays).jaxpr
