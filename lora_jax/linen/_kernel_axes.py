"""The axes of every kernel, from one abstract call of the model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Set
from typing import Any

import chex
import flax.core
import flax.linen as nn
import jax
import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import empty_node

from lora_jax.core._boxes import unbox
from lora_jax.core._meshes import explicit_sharding
from lora_jax.core._model_axes import ModelAxes
from lora_jax.linen._axes_observer import MARK, AxesObserver
from lora_jax.linen._axis_labels import Label, labels_of, renewed
from lora_jax.linen._handlers import Handlers, handlers_of_call
from lora_jax.linen._model_call import call_model, check_model, name_of_call
from lora_jax.linen._output_heads import output_heads
from lora_jax.tracing._arrays_in import arrays_in
from lora_jax.tracing._liveness import live_inputs, marked_inputs
from lora_jax.trees._pair import base_of
from lora_jax.trees._paths import Key, path_of, unflatten


def kernel_axes(
    model: Any,
    variables: Mapping[str, Any],
    /,
    *args: Any,
    handlers: Handlers | None = None,
    **kwargs: Any,
) -> ModelAxes:
    """Finds which axes of every kernel are inputs, outputs and batch axes, from the model itself.

    The model is evaluated abstractly, once, as by ``jax.eval_shape``: no memory, no arithmetic.

    Args:
      model: as for :func:`lora_jax.lora_apply`.
      variables: its variables, arrays or ``jax.ShapeDtypeStruct``.
      *args: for ``model.apply``; arrays may be ``jax.ShapeDtypeStruct``.
      handlers: as for :func:`lora_jax.lora_apply`.
      **kwargs: for ``model.apply``.

    Returns:
      A :class:`ModelAxes`, for ``lora_init(..., axes=...)``: a mapping of the path of every kernel
      that this call used in a known layer to its :class:`KernelAxes`. It also knows which
      parameters the model reads in other places too, such as tied embeddings.

    Raises:
      TypeError: if ``model`` is not a ``flax.linen`` module, or ``handlers`` not
        :class:`lora_jax.Handlers`.
      ValueError: if ``variables`` does not have ``"params"``.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lora_jax
      >>> model = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)
      >>> x = jnp.ones((1, 5, 6))
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), x)
      >>> axes = lora_jax.kernel_axes(model, variables, x)
      >>> axes["out/kernel"].inputs, axes["out/kernel"].outputs
      ((0, 1), (2,))
      >>> print(axes)
      key/kernel    inputs (0,)  outputs (1, 2)  flax.linen.linear.DenseGeneral
      out/kernel    inputs (0, 1)  outputs (2,)  flax.linen.linear.DenseGeneral
      query/kernel  inputs (0,)  outputs (1, 2)  flax.linen.linear.DenseGeneral
      value/kernel  inputs (0,)  outputs (1, 2)  flax.linen.linear.DenseGeneral
    """
    check_model(model, variables, "kernel_axes")
    handlers = handlers_of_call(handlers)
    call = _AbstractCall.of(model, variables, args, kwargs, handlers)
    labels = labels_of(call.params)
    try:
        observer, jaxpr = call.trace(labels)
    except Exception:
        # A parameter may be a dict itself, which has no room for labels: only modules have.
        modules = call.trace({})[0].modules
        labels = {key: label for key, label in labels.items() if key[:-1] in modules}
        observer, jaxpr = call.trace(labels)

    read = call.paths_of(live_inputs(jaxpr, [True] * len(jaxpr.outvars)))
    seen = observer.kernels.keys() | observer.refused.keys()
    unused = {path: why for path, why in observer.handled.items() if path not in seen}
    tied = frozenset(read & observer.kernels.keys() - observer.refused.keys())
    layers = {key[:-1] for key, label in labels.items() if label.path in observer.kernels}
    matrices = {  # of a layer that is not known
        label.path
        for key, label in labels.items()
        if key[:-1] not in layers and label.ndim - len(observer.batch.get(label.path, ())) > 1
    }
    return ModelAxes(
        kernels=dict(sorted(observer.kernels.items())),
        layers=observer.layers,
        batch=observer.batch,
        refused={**observer.refused, **unused},
        read=frozenset(read | observer.kernels.keys()),
        tied=tied,
        shared=frozenset(p for p, methods in observer.methods.items() if len(methods) > 1),
        convolutions=observer.convolutions,
        linear=frozenset(observer.kernels.keys() - observer.not_contracted),
        # With other handlers lora_apply cannot know that a kernel is read in its layer only.
        call=name_of_call(kwargs) if handlers == Handlers.registered() else None,
        find_heads=functools.partial(_find_heads, call, labels, tied, matrices),
    )


def _find_heads(
    call: _AbstractCall, labels: Mapping[Key, Label], tied: Set[str], matrices: Set[str]
) -> tuple[frozenset[str], frozenset[str]]:
    """The kernels of the output heads, and those that may be, where it cannot be known.

    In another call every product forgets its input and depends on its kernel instead: what a result
    depends on then are the last layers before it.
    """
    observer, jaxpr = call.trace(labels, cuts=True)
    feeding, marks = marked_inputs(jaxpr)

    def behind(i: int) -> set[str]:
        live = [output == i for output in range(len(jaxpr.outvars))]
        return call.paths_of(live_inputs(jaxpr, live, effects=False))

    widths = {path: sizes for path, sizes in observer.widths.items() if path not in tied}
    known = {MARK + path for path in observer.widths} <= marks
    return output_heads(
        observer.results,
        behind,
        call.paths_of(feeding) if known else None,
        widths,
        matrices | tied,
    )


@dataclasses.dataclass(frozen=True)
class _AbstractCall:
    """A call of a model, to be traced: it holds no array of JAX alive.

    Attributes:
      model: the model.
      handlers: of the call.
      params: the parameters without values, by their keys.
      like: an empty tree of the kind that the parameters are in.
      rest: the other collections, without values.
      inputs: the arrays among the arguments, without values.
      at: their places among all leaves of the arguments.
      leaves: the leaves of the arguments, ``None`` for those.
      treedef: the structure of the arguments.
    """

    model: Any
    handlers: Handlers
    params: dict[Key, Any]
    like: chex.ArrayTree
    rest: dict[str, Any]
    inputs: list[Any]
    at: list[int]
    leaves: list[Any]
    treedef: Any

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
        leaves, treedef = jax.tree.flatten((args, dict(kwargs)))
        at = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
        params, rest, inputs = jax.tree.map(_abstract, (params, rest, [leaves[i] for i in at]))
        return cls(
            model=model,
            handlers=handlers,
            params=params,
            like=flax.core.freeze({}) if isinstance(variables["params"], FrozenDict) else {},
            rest=rest,
            inputs=inputs,
            at=at,
            leaves=[None if _is_array(leaf) else leaf for leaf in leaves],
            treedef=treedef,
        )

    def trace(self, labels: Mapping[Key, Label], *, cuts: bool = False) -> tuple[AxesObserver, Any]:
        """What is seen in the call, and its jaxpr."""
        observer, labels = AxesObserver(self.handlers, cuts), renewed(labels)

        def call(params: dict[Key, Any], rest: Mapping[str, Any], inputs: list[Any]) -> list[Any]:
            values = dict(zip(self.at, inputs, strict=True))
            args, kwargs = jax.tree.unflatten(
                self.treedef, [values.get(i, leaf) for i, leaf in enumerate(self.leaves)]
            )
            labelled = unflatten({**params, **labels}, self.like)
            observer.given = {path_of(key): unbox(leaf) for key, leaf in params.items()}
            with nn.intercept_methods(observer.intercept):
                out = call_model(self.model, {**rest, "params": labelled}, args, kwargs)
            observer.given = {}  # what is traced must not outlive the trace
            y = out
            if kwargs.get("mutable", False) is not False and isinstance(self.model, nn.Module):
                # That the parameters are given back is not a use of them.
                y = out[0]
                out = y, {name: tree for name, tree in out[1].items() if name != "params"}
            observer.results = [(x.shape, x.dtype) for x in arrays_in(y)]
            return list(arrays_in(out))

        return observer, jax.make_jaxpr(call)(self.params, self.rest, self.inputs).jaxpr

    def paths_of(self, live: list[bool]) -> set[str]:
        """The paths of the parameters among the inputs of the jaxpr that are live."""
        structure = jax.tree.structure((self.params, self.rest, self.inputs))
        params, _, _ = jax.tree.unflatten(structure, live)
        return {path_of(key) for key, leaf in params.items() if any(jax.tree.leaves(leaf))}


def _is_array(leaf: Any) -> bool:
    # A NumPy array may be what a model takes sizes from: it stays what it is.
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def _abstract(leaf: Any) -> Any:
    # In a mesh with explicit axes the sharding is a part of the type.
    return jax.ShapeDtypeStruct(
        np.shape(leaf), jax.dtypes.result_type(leaf), sharding=explicit_sharding(leaf)
    )
