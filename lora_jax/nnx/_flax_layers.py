"""How the layers of Flax NNX compute with their kernels.

Each handler gets the layer, its kernels, Flax's own method, and the arguments of the call.
Where Flax lets the product be injected, all but the product stays Flax's: promotion of dtypes,
bias, padding. Elsewhere the handler computes all that the layer's method does.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax._compat import only_converts
from lora_jax.core.products._adapted_kernel import AdaptedKernel
from lora_jax.core.products._einsum_equation import of_dot_general
from lora_jax.layers._entry import Entry, MethodKey, body
from lora_jax.nnx._variables import value_of

Kernels = tuple[AdaptedKernel, ...]
Method = Callable[..., Any]
_DOT = jax.lax.dot_general
_CONV = jax.lax.conv_general_dilated


def _linear(layer: Any, kernels: Kernels, method: Method, *args: Any, **kwargs: Any) -> Any:
    """``nnx.Linear`` and ``nnx.LinearGeneral``, through their ``dot_general``."""
    (kernel,) = kernels
    _check(layer, kernel, 3)
    by_class = getattr(layer, "dot_general_cls", None)
    own_dot = by_class() if by_class is not None else layer.dot_general or _DOT

    def dot_general(x: chex.Array, W: chex.Array, dims: Any, **kwargs: Any) -> chex.Array:
        # An injected dot_general quantizes, as a rule: it is for the base, not the factors.
        plain = own_dot is _DOT and _says_nothing_more(kwargs)
        return kernel.einsum(
            of_dot_general(x.ndim, W.ndim, dims),
            x,
            W,
            base=None if plain else lambda x, W: own_dot(x, W, dims, **kwargs),
            precision=kwargs.get("precision"),
        )

    return method(_changed(layer, dot_general=dot_general, dot_general_cls=None), *args, **kwargs)


def _einsum(layer: Any, kernels: Kernels, method: Method, *args: Any, **kwargs: Any) -> Any:
    """``nnx.Einsum``, through its ``einsum_op``."""
    (kernel,) = kernels
    _check(layer, kernel, 3)
    own_einsum = getattr(layer, "einsum_op", jnp.einsum)

    def einsum(equation: str, x: chex.Array, W: chex.Array, **kwargs: Any) -> chex.Array:
        plain = own_einsum is jnp.einsum and _says_nothing_more(kwargs)
        return kernel.einsum(
            equation,
            x,
            W,
            base=None if plain else lambda x, W: own_einsum(equation, x, W, **kwargs),
            precision=kwargs.get("precision"),
        )

    return method(_changed(layer, einsum_op=einsum), *args, **kwargs)


def _conv(
    layer: Any, kernels: Kernels, method: Method, inputs: chex.Array, *args: Any, **kwargs: Any
) -> Any:
    """``nnx.Conv``, through its ``conv_general_dilated``: ``x`` with ``U``, and then ``V``."""
    (kernel,) = kernels
    _check(layer, kernel, 3)
    batch = _batch(kernel, inputs)
    own_conv = getattr(layer, "conv_general_dilated", _CONV)

    def conv(x: chex.Array, W: chex.Array, *args: Any, **kwargs: Any) -> chex.Array:
        own = {name: value for name, value in kwargs.items() if name not in _OF_BASE}
        return kernel.linear(
            lambda x, K: _CONV(x, K, *args, **own),
            x,
            W,
            base=lambda x, W: own_conv(x, W, *args, **kwargs),
            inputs=tuple(range(W.ndim - 1)),
            groups=kwargs.get("feature_group_count", 1),
            batch_shape=batch,
            precision=kwargs.get("precision"),
        )

    return method(_changed(layer, conv_general_dilated=conv), inputs, *args, **kwargs)


def _conv_transpose(
    layer: Any, kernels: Kernels, method: Method, inputs: chex.Array, *args: Any, **kwargs: Any
) -> chex.Array:
    """``nnx.ConvTranspose``: ``x`` through the layer with the kernel ``U``, times ``V``."""
    (kernel,) = kernels
    _check(layer, kernel, 3)
    _batch(kernel, inputs)
    bias = None if layer.bias is None else value_of(layer.bias)
    x, W, bias = layer.promote_dtype((inputs, kernel.value, bias), dtype=layer.dtype)
    out = W.ndim - 2 if layer.transpose_kernel else W.ndim - 1
    contracted = tuple(axis for axis in range(W.ndim) if axis != out)

    def product(x: chex.Array, K: chex.Array) -> chex.Array:
        bare = _changed(
            layer,
            kernel=nnx.Param(K),
            kernel_shape=K.shape,
            bias=None,
            use_bias=False,
            dtype=None,
        )
        y: chex.Array = method(bare, x, *args, **kwargs)
        return y

    y = kernel.linear(product, x, W, inputs=contracted, precision=layer.precision)
    return y if bias is None else y + jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))


def _batch(kernel: AdaptedKernel, inputs: chex.Array) -> tuple[int, ...]:
    """The sizes in front of those that are convolved."""
    batch = tuple(inputs.shape[: inputs.ndim - kernel.value.ndim + 1])
    kernel.check_batch(batch)
    return batch


def _embed(
    layer: Any, kernels: Kernels, method: Method, inputs: chex.Array, *args: Any, **kwargs: Any
) -> chex.Array:
    """``nnx.Embed``: row ``i`` of ``W'`` is ``W_i + s U_i V``."""
    (embedding,) = kernels
    _check(layer, embedding, 1)
    if not jnp.issubdtype(inputs.dtype, jnp.integer):
        raise ValueError("Input type must be an integer or unsigned integer.")
    (W,) = layer.promote_dtype((embedding.value,), dtype=layer.dtype, inexact=False)

    def look_up(ids: chex.Array, W: chex.Array) -> chex.Array:
        table = _changed(
            layer, embedding=nnx.Param(W), features=W.shape[-1], dtype=None, param_dtype=W.dtype
        )
        is_whole = W.shape == embedding.value.shape  # what is said is said of its result
        y: chex.Array = method(table, ids, *args, **kwargs) if is_whole else method(table, ids)
        return y

    return embedding.linear(look_up, inputs, W, inputs=(0,))


def _attend(
    layer: Any, kernels: Kernels, method: Method, query: chex.Array, out_sharding: Any = None
) -> chex.Array:
    """``nnx.Embed.attend``: the product with the transposed matrix."""
    del method
    said = {} if out_sharding is None else {"out_sharding": out_sharding}
    (embedding,) = kernels
    _check(layer, embedding, 2)
    query, W = layer.promote_dtype((query, embedding.value), dtype=layer.dtype)

    def product(q: chex.Array, W: chex.Array) -> chex.Array:
        return jnp.dot(q, W.T, **said)

    if embedding.untied:
        return product(query, W)
    return embedding.einsum("...k,dk->...d", query, W, base=product, transposed=True)


# --- Flax's layers, from inside and outside ---

# What a layer says of the product with its own kernel: the factors are of other sizes.
_OF_BASE = ("out_sharding", "preferred_element_type")


def _says_nothing_more(kwargs: Mapping[str, Any]) -> bool:
    """Whether a product is a plain one: Flax passes what is ``None`` too."""
    return all(value is None or name == "precision" for name, value in kwargs.items())


def _changed(layer: Any, **attributes: Any) -> Any:
    """The layer once more, with other attributes; the given one is left as it is.

    Variables are those of the layer.
    """
    changed = object.__new__(type(layer))
    vars(changed).update({**vars(layer), **attributes})
    return changed


def _check(layer: Any, kernel: AdaptedKernel, operands: int) -> None:
    """Refuses a layer that computes with something else than the kernel that is stored."""
    if getattr(layer, "mask", None) is not None:
        kernel.refuse("its layer has a mask, and a masked U V is not a product of two factors")
    if layer.promote_dtype is not nnx.nn.dtypes.promote_dtype:
        W = jax.ShapeDtypeStruct(kernel.value.shape, kernel.dtype)
        if not only_converts(lambda *a: layer.promote_dtype(a, dtype=layer.dtype), *[W] * operands):
            kernel.refuse("its promote_dtype does more to the kernel than to convert its dtype")


LAYERS: Mapping[MethodKey, Entry] = types.MappingProxyType(
    {
        body(nnx.Linear.__call__): Entry("nnx.Linear", ("kernel",), _linear),
        body(nnx.LinearGeneral.__call__): Entry("nnx.LinearGeneral", ("kernel",), _linear),
        body(nnx.Einsum.__call__): Entry("nnx.Einsum", ("kernel",), _einsum),
        body(nnx.Conv.__call__): Entry("nnx.Conv", ("kernel",), _conv),
        body(nnx.ConvTranspose.__call__): Entry("nnx.ConvTranspose", ("kernel",), _conv_transpose),
        body(nnx.Embed.__call__): Entry("nnx.Embed", ("embedding",), _embed),
        body(nnx.Embed.attend): Entry("nnx.Embed", ("embedding",), _attend),
    }
)
