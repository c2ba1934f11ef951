"""An abstract call of an NNX model, in which it is seen which axes its kernels have.

Next to each parameter stands a probe, an array of its shape, which transforms slice as they slice
the parameter. Which axes of the parameter are left in its layer is known by the sizes that are left
of the probe. Where two axes are of one size and one of them is gone, probes are tried whose sizes
tell them apart: those that a transform takes are right.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lora_jax.core._boxes import content
from lora_jax.core._model_axes import ModelAxes
from lora_jax.core.products._adapted_kernel import AdaptedKernel
from lora_jax.layers._abstract_inputs import AbstractInputs, without_values
from lora_jax.layers._axes_seen import AxesSeen
from lora_jax.layers._check_use import name_of_call
from lora_jax.layers._entry import Entry
from lora_jax.layers._find_axes import find_axes
from lora_jax.layers._handlers import Handlers
from lora_jax.nnx._adapted_class import own_class
from lora_jax.nnx._calls import CHANGED, FOUND, KERNEL, SUFFIX, changed_kernels, under_way
from lora_jax.nnx._in_layers import explained, put_beside
from lora_jax.nnx._model_call import call_model
from lora_jax.nnx._variables import copied, merged, modules_of, value_of, variables_in, variables_of
from lora_jax.tracing._arrays_in import arrays_in
from lora_jax.tracing._liveness import live_inputs
from lora_jax.trees._paths import Key, flatten, path_of, unflatten
from lora_jax.trees._states import parameters_in

# Sizes of the axes of a probe that no transform slices, if it is right: no model has them.
_SIZES = itertools.count(1_000_003, 2)
_NONCES = itertools.count()


@flax.struct.dataclass
class Probe:
    """Which parameter this is, next to it, and what transforms have left of it.

    The nonce makes ``nnx.jit`` trace again what it has in its cache.

    Attributes:
      array: sliced as the parameter.
      path: of the parameter.
      shape: of the array in the model.
      axes: those that are sliced, if this is tried; else ``None``.
      nonce: another one in each call.
    """

    array: Any
    path: str = flax.struct.field(pytree_node=False)
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
    axes: tuple[int, ...] | None = flax.struct.field(pytree_node=False)
    nonce: int = flax.struct.field(pytree_node=False)

    def slices(self) -> list[tuple[int, ...]]:
        """The axes that may have been sliced off, the first ones before others."""
        gone = len(self.shape) - self.array.ndim
        if self.axes is not None:
            left = tuple(n for i, n in enumerate(self.shape) if i not in self.axes)
            return [self.axes] if left == self.array.shape else []
        return [
            axes
            for axes in itertools.combinations(range(len(self.shape)), max(gone, 0))
            if tuple(n for i, n in enumerate(self.shape) if i not in axes) == self.array.shape
        ]


@dataclasses.dataclass(frozen=True)
class _Label:
    """Which parameter a layer has, and which of its axes are left."""

    path: str
    axes: tuple[int, ...]
    batch: tuple[int, ...]


@dataclasses.dataclass
class ObservingCall:
    """An abstract call that is under way.

    Attributes:
      handlers: of the call.
      seen: what was seen.
      unknown: the axes that may have been sliced off, where it is not known which.
    """

    handlers: Handlers
    seen: AxesSeen
    unknown: dict[str, list[tuple[int, ...]]] = dataclasses.field(default_factory=dict)

    def called(self, module: nnx.Module, entry: Entry) -> None:
        """Notes the parameters of the module."""
        names, beside = entry.names(module), vars(module)
        labels = [self._label(value_of(beside[n])) for n in beside if n.endswith(SUFFIX)]
        for label in labels:
            self.seen.called(module, label)
        if not any(name + SUFFIX in beside for name in names):
            why = f"the handler of {entry.layer} is for {' and '.join(map(repr, names))}"
            self.seen.handled |= {label.path: why for label in labels}

    def kernel(
        self, module: nnx.Module, method: str, entry: Entry, name: str
    ) -> AdaptedKernel | None:
        """The kernel, of which it is noted what its handler does with it."""
        probe = vars(module).get(name + SUFFIX)
        if probe is None:
            return None
        label, value = self._label(value_of(probe)), value_of(vars(module)[name])
        kernel = self.seen.kernel(module, method, entry.layer, label, value)
        if not self.seen.cuts:  # then the inputs of products alone are marked
            checkpoint_name(value, KERNEL + label.path)
        return kernel

    def _label(self, probe: Probe) -> _Label:
        slices = probe.slices()
        if not slices:
            raise _NotSliced(probe.path)
        if len(slices) > 1:
            self.unknown[probe.path] = slices
        axes = tuple(i for i in range(len(probe.shape)) if i not in slices[0])
        return _Label(probe.path, axes, slices[0])


class _NotSliced(Exception):
    """A probe was not sliced as it was thought, and not as its parameter."""


def axes_of_call(
    graphdef: Any,
    state: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    handlers: Handlers,
) -> ModelAxes:
    """The axes of the kernels of an NNX model."""
    call = _AbstractCall.of(graphdef, state, args, kwargs, handlers)
    call = call.with_known_axes()
    mutable = kwargs.get("mutable", False) is not False
    name = name_of_call(graphdef, args, kwargs, kwargs.get("method"), mutable)
    found = find_axes(call, name if handlers == Handlers.registered() else None)
    layers = {**call.classes(), **found.layers}
    return dataclasses.replace(found, layers=layers)


@dataclasses.dataclass(frozen=True)
class _AbstractCall:
    """A call of a model, to be traced: it holds no array of JAX alive.

    Attributes:
      graphdef: says what the model is.
      handlers: of the call.
      params: the parameters without values, by their keys.
      rest: the other variables, likewise.
      like: a state with the same keys.
      inputs: the arguments, without values.
      sliced: the axes that transforms slice off, where it had to be tried.
    """

    graphdef: Any
    handlers: Handlers
    params: dict[Key, Any]
    rest: dict[Key, Any]
    like: Any
    inputs: AbstractInputs
    sliced: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        graphdef: Any,
        state: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        handlers: Handlers,
    ) -> _AbstractCall:
        """The call with these arguments."""
        kwargs = {name: value for name, value in kwargs.items() if name != "mutable"}
        variables = {key: without_values(leaf) for key, leaf in flatten(state, "state").items()}
        params = parameters_in(variables)
        return cls(
            graphdef=graphdef,
            handlers=handlers,
            params=params,
            rest={key: leaf for key, leaf in variables.items() if key not in params},
            like=unflatten(variables, state),
            inputs=AbstractInputs.of((args, kwargs)),
        )

    def with_known_axes(self) -> _AbstractCall:
        """The call, in which it is known of every parameter which axes are sliced off."""
        unknown = self._observed(False)[0].unknown
        if not unknown:
            return self
        known = {path: axes[0] for path, axes in unknown.items()}
        if not self._takes(known):
            for path, axes in unknown.items():
                known[path] = next((one for one in axes if self._takes({path: one})), axes[0])
        return dataclasses.replace(self, sliced={**self.sliced, **known})

    def trace(self, cuts: bool) -> tuple[AxesSeen, Any]:
        """What is seen in the call, and its jaxpr."""
        call, jaxpr = self._observed(cuts)
        call.seen.refused |= dict.fromkeys(changed_kernels(jaxpr, self.params), CHANGED)
        call.seen.refused |= dict.fromkeys(
            self._found_beside(jaxpr) & call.seen.kernels.keys(), FOUND
        )
        return call.seen, jaxpr

    def classes(self) -> dict[str, str]:
        """For each parameter of a module the module's class."""
        found = {}
        model = merged(self.graphdef, copied(self.like))
        for key, module in modules_of(model):
            cls = own_class(module)
            for name, _ in variables_in(module):
                found[path_of((*key, name))] = f"{cls.__module__}.{cls.__qualname__}"
        return {path_of(key): found[path_of(key)] for key in self.params if path_of(key) in found}

    def _takes(self, sliced: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether the model takes probes that are sliced in these axes only."""
        try:
            dataclasses.replace(self, sliced={**self.sliced, **sliced})._observed(False)
        except Exception:  # of a transform, as sizes differ; with the parameters' own it was none
            return False
        return True

    def _observed(self, cuts: bool) -> tuple[ObservingCall, Any]:
        """The call that was under way, and its jaxpr."""
        observing: list[ObservingCall] = []
        probes = self._probes()

        def call(
            params: dict[Key, Any], rest: dict[Key, Any], probes: dict[Key, Any], inputs: list[Any]
        ) -> list[Any]:
            args, kwargs = copied(self.inputs.with_arrays(inputs))
            model = merged(self.graphdef, unflatten(copied({**params, **rest}), self.like))
            one = ObservingCall(self.handlers, AxesSeen(cuts))
            observing[:] = [one]
            one.seen.given = {
                path_of(key): value_of(variable)
                for key, variable in variables_of(model).items()
                if key in params
            }
            put_beside(model, probes, self.handlers)
            method = kwargs.pop("method", None)
            with under_way(one), explained(Probe):
                y = call_model(model, method, args, kwargs)
            one.seen.given = {}  # what is traced must not outlive the trace
            one.seen.results = [(x.shape, x.dtype) for x in arrays_in(y)]
            changed = [
                leaf
                for key, leaf in variables_of(model).items()
                if not isinstance(leaf, nnx.Param) and not key[-1].endswith(SUFFIX)
            ]
            return list(arrays_in((y, changed)))

        jaxpr = jax.make_jaxpr(call)(self.params, self.rest, probes, self.inputs.arrays).jaxpr
        return observing[0], jaxpr

    def _found_beside(self, jaxpr: Any) -> set[str]:
        """The paths of the parameters next to which the model has found our probe, and read it."""
        live = live_inputs(jaxpr, [True] * len(jaxpr.outvars), effects=False)
        before = len(jax.tree.leaves((self.params, self.rest)))
        # Each has one array, and they are in the order of their keys.
        of_probes = live[before : before + len(self.params)]
        keys = zip(sorted(self.params), of_probes, strict=True)
        return {path_of(key) for key, is_read in keys if is_read}

    def _probes(self) -> dict[Key, Probe]:
        nonce, probes = next(_NONCES), {}
        for key, leaf in self.params.items():
            path, shape = path_of(key), tuple(getattr(content(leaf), "shape", ()))
            axes = self.sliced.get(path)
            if axes is not None:
                shape = tuple(n if i in axes else next(_SIZES) for i, n in enumerate(shape))
            array = jax.ShapeDtypeStruct(shape, jnp.bool_)
            probes[key] = Probe(array, path, shape, axes, nonce)
        return probes
