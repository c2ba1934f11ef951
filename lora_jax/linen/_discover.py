"""The axes of every kernel, from one abstract call of the model.

Beside every parameter stands a label without arrays: Flax tells it when ``nn.scan`` or ``nn.vmap``
slice an axis off, so that in the layer it says which axes of the whole kernel are left there. The
handlers then compute with zeros in place of their kernels; a kernel on which the result depends
all the same is read in another place too.

Output heads are found by another call, in which every product forgets its input and depends on its
kernel instead: what a result depends on then are the last layers before it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax.core
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import empty_node
from jax.ad_checkpoint import checkpoint_name

from lora_jax._compat import Maps, Probe
from lora_jax.core._axes import KernelAxes, ModelAxes
from lora_jax.core._kernel import AdaptedKernel
from lora_jax.core._meshes import explicit_sharding
from lora_jax.linen._apply import MAPPED, call_model, check_model, name_of_call
from lora_jax.linen._heads import output_heads
from lora_jax.linen._registry import entry_of
from lora_jax.tracing._liveness import arrays_in, live_inputs, marked_inputs
from lora_jax.trees._pair import base_of
from lora_jax.trees._paths import Key, path_of, unbox, unflatten

_SUFFIX = "@label"
_MARK = "lora_jax: what is multiplied by "


def kernel_axes(
    model: Any, variables: Mapping[str, Any], /, *args: Any, **kwargs: Any
) -> ModelAxes:
    """Finds which axes of every kernel are inputs, outputs and stacks, from the model itself.

    The model is evaluated abstractly, once, as by ``jax.eval_shape``: no memory, no arithmetic.

    Args:
      model: as for :func:`lora_jax.lora_apply`.
      variables: its variables, arrays or ``jax.ShapeDtypeStruct``.
      *args: for ``model.apply``; arrays may be ``jax.ShapeDtypeStruct``.
      **kwargs: for ``model.apply``.

    Returns:
      A :class:`ModelAxes`, for ``lora_init(..., axes=...)``: a mapping of the path of every kernel
      that this call used in a known layer to its :class:`KernelAxes`. It also knows which
      parameters the model reads in other places too, such as tied embeddings.

    Raises:
      TypeError: ``model`` is no ``flax.linen`` module.
      ValueError: ``variables`` without ``"params"``.

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
    leaves, treedef = jax.tree.flatten((args, kwargs))
    arrays = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
    params = {
        key: leaf
        for key, leaf in base_of(variables["params"], "params").items()
        if leaf is not empty_node
    }
    rest = {name: value for name, value in variables.items() if name != "params"}
    abstract = jax.tree.map(_abstract, (params, rest, [leaves[i] for i in arrays]))
    # What is traced again, when heads are asked for, holds no array alive.
    like = flax.core.freeze({}) if isinstance(variables["params"], flax.core.FrozenDict) else {}
    leaves = [None if _is_array(leaf) else leaf for leaf in leaves]

    def trace(labels: Mapping[Key, _Label], cuts: bool = False) -> tuple[_Observer, Any]:
        observer, nonce = _Observer(cuts=cuts), next(_NONCES)
        labels = {key: dataclasses.replace(label, nonce=nonce) for key, label in labels.items()}

        def call(params: dict[Key, Any], rest: Mapping[str, Any], traced: list[Any]) -> list[Any]:
            values = dict(zip(arrays, traced, strict=True))
            args, kwargs = jax.tree.unflatten(
                treedef, [values.get(i, leaf) for i, leaf in enumerate(leaves)]
            )
            labelled = unflatten({**params, **labels}, like)
            observer.given = {path_of(key): unbox(leaf) for key, leaf in params.items()}
            with nn.intercept_methods(observer.intercept):
                out = call_model(model, {**rest, "params": labelled}, args, kwargs)
            observer.given = {}  # what is traced must not outlive the trace
            given = out
            if kwargs.get("mutable", False) is not False and isinstance(model, nn.Module):
                # That the parameters are given back is no use of them.
                given = out[0]
                out = given, {name: tree for name, tree in out[1].items() if name != "params"}
            observer.results = [(x.shape, x.dtype) for x in arrays_in(given)]
            return list(arrays_in(out))

        return observer, jax.make_jaxpr(call)(*abstract).jaxpr

    labels = {
        (*key[:-1], key[-1] + _SUFFIX): _Label(path_of(key), tuple(range(ndim)), ndim, 0)
        for key, leaf in params.items()
        if (ndim := getattr(unbox(leaf), "ndim", None)) is not None
    }
    try:
        observer, jaxpr = trace(labels)
    except Exception:
        # A parameter may be a dict itself, which has no room for labels: only modules have.
        modules = trace({})[0].modules
        labels = {key: label for key, label in labels.items() if key[:-1] in modules}
        observer, jaxpr = trace(labels)
    structure = jax.tree.structure(abstract)

    def paths(used: list[bool]) -> set[str]:
        inputs = jax.tree.unflatten(structure, used)
        return {path_of(key) for key, leaf in inputs[0].items() if any(jax.tree.leaves(leaf))}

    read = paths(live_inputs(jaxpr, [True] * len(jaxpr.outvars)))
    seen = observer.kernels.keys() | observer.refused.keys()
    unused = {path: why for path, why in observer.handled.items() if path not in seen}
    tied = frozenset(read & observer.kernels.keys() - observer.refused.keys())
    layers = {key[:-1] for key, label in labels.items() if label.path in observer.kernels}
    matrices = {  # of no layer that is known
        label.path
        for key, label in labels.items()
        if key[:-1] not in layers and label.ndim - len(observer.batch.get(label.path, ())) > 1
    }

    def find_heads() -> tuple[frozenset[str], frozenset[str]]:
        observer, jaxpr = trace(labels, cuts=True)
        outputs = range(len(jaxpr.outvars))
        feeding, marks = marked_inputs(jaxpr)

        def behind(i: int) -> set[str]:
            return paths(live_inputs(jaxpr, [output == i for output in outputs], effects=False))

        widths = {path: sizes for path, sizes in observer.widths.items() if path not in tied}
        known = {_MARK + path for path in observer.widths} <= marks
        return output_heads(
            observer.results, behind, paths(feeding) if known else None, widths, matrices | tied
        )

    return ModelAxes(
        kernels=dict(sorted(observer.kernels.items())),
        layers=observer.layers,
        batch=observer.batch,
        refused={**observer.refused, **unused},
        read=frozenset(read | observer.kernels.keys()),
        tied=tied,
        shared=frozenset(p for p, methods in observer.methods.items() if len(methods) > 1),
        unlike=observer.unlike,
        linear=frozenset(observer.kernels.keys() - observer.not_contracted),
        call=name_of_call(kwargs),
        find_heads=find_heads,
    )


def _is_array(leaf: Any) -> bool:
    # A NumPy array may be what a model takes sizes from: it stays what it is.
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def _abstract(leaf: Any) -> Any:
    # In a mesh with explicit axes the sharding is a part of the type.
    return jax.ShapeDtypeStruct(
        np.shape(leaf), jax.dtypes.result_type(leaf), sharding=explicit_sharding(leaf)
    )


_NONCES = itertools.count()


@flax.struct.dataclass
class _Label(nn.meta.AxisMetadata[Any]):
    """Which parameter this is, and which of its axes are left.

    It has no arrays, so that maps over parameters pass it by. The nonce makes ``nn.jit`` trace
    again what it has in its cache.
    """

    path: str = flax.struct.field(pytree_node=False)
    axes: tuple[int, ...] = flax.struct.field(pytree_node=False)
    ndim: int = flax.struct.field(pytree_node=False)
    nonce: int = flax.struct.field(pytree_node=False)

    @property
    def batch(self) -> tuple[int, ...]:
        """The axes that were sliced off."""
        return tuple(axis for axis in range(self.ndim) if axis not in self.axes)

    def unbox(self) -> None:
        """Holds nothing."""

    def replace_boxed(self, val: Any) -> Any:
        """Holds nothing."""
        return self

    def remove_axis(self, index: int, params: Any) -> _Label:
        """A transform slices this axis off."""
        left = list(self.axes)
        del left[index]
        return _Label(self.path, tuple(left), self.ndim, self.nonce)

    def add_axis(self, index: int, params: Any) -> _Label:
        """A transform stacks again what it returns; that is of no interest."""
        return self


@dataclasses.dataclass
class _Observer:
    """The interceptor of the abstract call, and what it saw."""

    kernels: dict[str, KernelAxes] = dataclasses.field(default_factory=dict)
    layers: dict[str, str] = dataclasses.field(default_factory=dict)
    batch: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    handled: dict[str, str] = dataclasses.field(default_factory=dict)
    given: dict[str, Any] = dataclasses.field(default_factory=dict)
    methods: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    unlike: dict[str, str] = dataclasses.field(default_factory=dict)
    modules: set[Key] = dataclasses.field(default_factory=set)
    not_contracted: set[str] = dataclasses.field(default_factory=set)
    widths: dict[str, set[int]] = dataclasses.field(default_factory=dict)
    results: list[tuple[tuple[int, ...], Any]] = dataclasses.field(default_factory=list)
    cuts: bool = False
    maps: Maps = dataclasses.field(default_factory=Maps)

    def intercept(
        self,
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        """Runs the handler of a known layer, and notes what it does with its kernels."""
        module = context.module
        if module.scope is None or isinstance(module, Probe):
            return next_fun(*args, **kwargs)
        self.modules.add(module.path)
        labels = {
            name: label
            for name, label in module.variables.get("params", {}).items()
            if isinstance(label, _Label)
        }
        for label in labels.values():
            self.layers.setdefault(label.path, _name(module))
            self.batch.setdefault(label.path, label.batch)
        entry = entry_of(context.orig_method)
        names = entry.names(module) if entry else ()
        ours = {name: labels[name + _SUFFIX] for name in names if name + _SUFFIX in labels}
        if entry is None:
            return next_fun(*args, **kwargs)
        if not ours:
            why = f"the handler of {entry.layer} is for {' and '.join(map(repr, names))}"
            self.handled |= {label.path: why for label in labels.values()}
            return next_fun(*args, **kwargs)
        for name, label in ours.items():
            self.layers[label.path] = _name(module)
            self.methods.setdefault(label.path, set()).add(context.method_name)
            if reason := _unlike_peft(module):
                self.unlike[label.path] = reason
            self.handled[label.path] = f"the handler of {entry.layer} did not compute with it"
            value = unbox(module.get_variable("params", name))
            as_given = value is self.given[label.path]
            if not as_given and self.maps.may_be_of_params(module):
                self.refused[label.path] = MAPPED
        kernels = tuple(self._kernel(module, name, ours.get(name)) for name in names)
        return entry.handler(module, kernels, next_fun, *args, **kwargs)

    def _kernel(self, module: nn.Module, name: str, label: _Label | None) -> AdaptedKernel | None:
        if label is None:
            return None
        value = unbox(module.get_variable("params", name))
        return AdaptedKernel(label.path, value, observer=_OneKernel(self, label, value))


@dataclasses.dataclass
class _OneKernel:
    """Notes what the handler of a layer does with one kernel."""

    observer: _Observer
    label: _Label
    value: jax.Array

    def use(self, layer: KernelAxes, contracted: bool) -> None:
        """The handler computes with the kernel, of which the layer sees these axes."""
        label = self.label
        if not contracted:
            self.observer.not_contracted.add(label.path)
        if layer.ndim != len(label.axes):
            self.refuse(f"its handler computes with {layer.ndim} axes of {len(label.axes)}")
            return
        axes = KernelAxes(
            inputs=tuple(label.axes[i] for i in layer.inputs),
            outputs=tuple(label.axes[i] for i in layer.outputs),
            batch=(*label.batch, *(label.axes[i] for i in layer.batch)),
        )
        shape = self.observer.given[label.path].shape
        k, last = axes.matrix_shape(shape)[1], shape[axes.outputs[-1]]
        self.observer.widths[label.path] = {k, last}
        before = self.observer.kernels.setdefault(label.path, axes)
        if before != axes:
            self.refuse(f"its handler uses it as {before} and as {axes}")

    def product(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """The product; where it is cut, one that depends on the kernel instead of the input."""
        if not self.observer.cuts:
            return y
        checkpoint_name(x, _MARK + self.label.path)
        return jnp.zeros_like(y) + jnp.sum(self.value).astype(y.dtype)

    def refuse(self, reason: str) -> None:
        """The handler cannot adapt the kernel."""
        self.observer.refused[self.label.path] = reason


def _unlike_peft(module: nn.Module) -> str | None:
    """Why PEFT would compute otherwise with an adapter of a convolution."""
    if isinstance(module, nn.ConvTranspose):
        return "PEFT has no transposed convolutions"
    if not hasattr(module, "kernel_dilation"):
        return None
    dilation, padding = module.kernel_dilation, getattr(module, "padding", None)
    if dilation not in (None, 1) and any(n != 1 for n in np.ravel(dilation)):
        return "PEFT does not dilate its factors"
    if isinstance(padding, str) and padding not in ("SAME", "VALID"):
        return f"PEFT does not pad its factors with {padding}"
    if getattr(module, "feature_group_count", 1) != 1:
        return "PEFT's factors have no groups"
    return None


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
