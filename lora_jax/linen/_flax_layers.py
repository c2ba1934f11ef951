"""How the layers of Flax compute with their kernels.

Each handler gets the layer, its kernels, Flax's own method, and the arguments of the call.
Where Flax lets the product be injected, all but the product stays Flax's: promotion of dtypes,
bias, padding. Elsewhere the handler computes all that the layer's method does.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import chex
import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_jax._compat import only_converts
from lora_jax.core._boxes import unbox
from lora_jax.core._numerics import along
from lora_jax.core.products._adapted_kernel import AdaptedKernel
from lora_jax.core.products._einsum_equation import Equation, of_dot_general
from lora_jax.layers._entry import Entry, MethodKey, body

Kernels = tuple[AdaptedKernel, ...]
Method = Callable[..., Any]


def _dense(layer: nn.Module, kernels: Kernels, method: Method, *args: Any, **kwargs: Any) -> Any:
    """``nn.Dense`` and ``nn.DenseGeneral``, through their ``dot_general``."""
    (kernel,) = kernels
    _check(layer, kernel)

    def with_adapter(own_dot: Callable[..., chex.Array]) -> Callable[..., chex.Array]:
        def dot_general(x: chex.Array, W: chex.Array, dims: Any, **kwargs: Any) -> chex.Array:
            # An injected dot_general quantizes, as a rule: it is for the base, not the factors.
            plain = own_dot is jax.lax.dot_general and kwargs.keys() <= {"precision"}
            return kernel.einsum(
                of_dot_general(x.ndim, W.ndim, dims),
                x,
                W,
                base=None if plain else lambda x, W: own_dot(x, W, dims, **kwargs),
                precision=kwargs.get("precision"),
            )

        return dot_general

    adapted = _injected(layer, "dot_general", jax.lax.dot_general, with_adapter)
    return method(adapted, *args, **kwargs)


def _conv(layer: nn.Module, kernels: Kernels, method: Method, *args: Any, **kwargs: Any) -> Any:
    """``nn.Conv``, through its ``conv_general_dilated``: ``x`` convolved with ``U``; then ``V``."""
    (kernel,) = kernels
    _check(layer, kernel)
    inputs = args[0] if args else kwargs["inputs"]
    batch = _batch(kernel, inputs)
    if not layer.shared_weights:
        return _conv_local(layer, kernel, *args, **kwargs)

    def with_adapter(own_conv: Callable[..., chex.Array]) -> Callable[..., chex.Array]:
        def conv(x: chex.Array, W: chex.Array, *args: Any, **kwargs: Any) -> chex.Array:
            return kernel.linear(
                lambda x, K: jax.lax.conv_general_dilated(x, K, *args, **kwargs),
                x,
                W,
                base=lambda x, W: own_conv(x, W, *args, **kwargs),
                inputs=tuple(range(W.ndim - 1)),
                groups=kwargs.get("feature_group_count", 1),
                batch_shape=batch,
                precision=kwargs.get("precision"),
            )

        return conv

    conv = jax.lax.conv_general_dilated
    return method(_injected(layer, "conv_general_dilated", conv, with_adapter), *args, **kwargs)


def _batch(kernel: AdaptedKernel, inputs: chex.Array) -> tuple[int, ...]:
    """The sizes in front of those that are convolved."""
    batch = tuple(inputs.shape[: inputs.ndim - kernel.value.ndim + 1])
    kernel.check_batch(batch)
    return batch


def _conv_local(layer: Any, kernel: AdaptedKernel, inputs: chex.Array) -> chex.Array:
    """``nn.ConvLocal``: a matrix for every pixel, ``(*pixels, d, k)``."""
    x, W, bias = _promoted(layer, kernel, inputs)
    pixels = tuple(range(W.ndim - 2))
    local = _bare(nn.ConvLocal, layer)
    y = kernel.linear(
        local, x, W, inputs=(W.ndim - 2,), batch_axes=pixels, precision=layer.precision
    )
    return y if bias is None else y + along(bias, y)


def _conv_transpose(layer: Any, kernels: Kernels, method: Method, inputs: chex.Array) -> chex.Array:
    """``nn.ConvTranspose``: ``x`` through the layer with the kernel ``U``, times ``V``."""
    del method
    (kernel,) = kernels
    _check(layer, kernel)
    _batch(kernel, inputs)
    x, W, bias = _promoted(layer, kernel, inputs)
    out = W.ndim - 2 if layer.transpose_kernel else W.ndim - 1
    contracted = tuple(axis for axis in range(W.ndim) if axis != out)
    transposed = _bare(nn.ConvTranspose, layer, out)
    y = kernel.linear(transposed, x, W, inputs=contracted, precision=layer.precision)
    return y if bias is None else y + along(bias, y)


def _einsum(
    layer: Any, kernels: Kernels, method: Method, inputs: chex.Array, einsum_str: str | None = None
) -> chex.Array:
    """``nn.Einsum``."""
    (kernel,) = kernels
    _check(layer, kernel)
    equation = nn.merge_param("einsum_str", layer.einsum_str, einsum_str)
    x, W, bias = _promoted(layer, kernel, inputs)
    try:
        eq = Equation.parse(equation, x.shape, W.shape)
    except ValueError as error:
        kernel.refuse(str(error))
        return method(layer, inputs, einsum_str)

    preferred = getattr(layer, "preferred_element_type", None)

    def einsum(x: chex.Array, W: chex.Array) -> chex.Array:
        return jnp.einsum(
            equation, x, W, precision=layer.precision, preferred_element_type=preferred
        )

    base = None if preferred is None else einsum
    y = kernel.einsum(equation, x, W, base=base, precision=layer.precision)
    if bias is None:
        return y
    # The bias has the axes of the kernel that are left in the result, in the result's order.
    return y + jnp.expand_dims(bias, [i for i, c in enumerate(eq.y) if c not in eq.W])


def _embed(layer: Any, kernels: Kernels, method: Method, inputs: chex.Array) -> chex.Array:
    """``nn.Embed``: row ``i`` of ``W'`` is ``W_i + s U_i V``."""
    del method
    (embedding,) = kernels
    _check(layer, embedding)
    if not jnp.issubdtype(inputs.dtype, jnp.integer):
        raise ValueError("Input type must be an integer or unsigned integer.")
    (W,) = layer.promote_dtype(embedding.value, dtype=layer.dtype, inexact=False)

    def look_up(ids: chex.Array, W: chex.Array) -> chex.Array:
        if layer.num_embeddings == 1:
            return jnp.broadcast_to(W, (*ids.shape, W.shape[-1]))
        return jnp.take(W, ids, axis=0)

    return embedding.linear(look_up, inputs, W, inputs=(0,))


def _attend(layer: Any, kernels: Kernels, method: Method, query: chex.Array) -> chex.Array:
    """``nn.Embed.attend``: the product with the transposed matrix."""
    del method
    (embedding,) = kernels
    _check(layer, embedding)
    query, W = layer.promote_dtype(query, embedding.value, dtype=layer.dtype)
    if embedding.untied:
        return jnp.dot(query, W.T)
    return embedding.einsum(
        "...k,dk->...d", query, W, base=lambda q, W: jnp.dot(q, W.T), transposed=True
    )


# --- Flax's layers, from inside and outside ---


def _promoted(layer: Any, kernel: AdaptedKernel, x: chex.Array) -> Any:
    """Input, kernel and bias (or ``None``) in the dtype that the layer computes in."""
    bias = nn.unbox(layer.get_variable("params", "bias")) if layer.use_bias else None
    return layer.promote_dtype(x, kernel.value, bias, dtype=layer.dtype)


def _injected(
    layer: Any,
    name: str,
    default: Callable[..., chex.Array],
    adapt: Callable[[Callable[..., chex.Array]], Callable[..., chex.Array]],
) -> Any:
    """The layer with an adapted product, in the place where Flax lets it be injected."""
    own_cls = getattr(layer, f"{name}_cls")
    if own_cls is not None:
        return _changed(layer, type(layer), **{f"{name}_cls": lambda: adapt(own_cls())})
    return _changed(layer, type(layer), **{name: adapt(getattr(layer, name) or default)})


def _bare(
    cls: type[nn.Module], layer: nn.Module, out: int = -1
) -> Callable[[chex.Array, chex.Array], chex.Array]:
    """The product of Flax's own layer, without its bias: of an input and a kernel."""

    def product(x: chex.Array, K: chex.Array) -> chex.Array:
        bare = _changed(
            layer,
            cls,
            scope=flax.core.bind({"params": {"kernel": K}}),
            features=K.shape[out],
            use_bias=False,
            dtype=None,
            promote_dtype=nn.dtypes.promote_dtype,
        )
        y: chex.Array = body(cls.__call__)(bare, x)
        return y

    return product


def _changed(layer: nn.Module, cls: type[nn.Module], **attributes: Any) -> Any:
    """The layer once more, with other attributes; the given one is left as it is.

    It is a part of the call that is under way, for the function in the class body. A module that
    Flax binds or clones would be called anew, with all interceptors around it.
    """
    changed = object.__new__(cls)
    vars(changed).update({**vars(layer), **attributes})
    return changed


def _check(layer: Any, kernel: AdaptedKernel) -> None:
    """Refuses a layer that computes with something else than the kernel that is stored."""
    if getattr(layer, "mask", None) is not None:
        kernel.refuse("its layer has a mask, and a masked U V is not a product of two factors")
    name = type(layer).__name__
    if type(layer).param is not nn.Module.param:
        kernel.refuse(f"{name} overrides param, and may compute with another kernel")
    own_setup = isinstance(layer, nn.Embed) and body(type(layer).setup) is not body(nn.Embed.setup)
    own_setup = own_setup and not kernel.was_seen_as_read
    if own_setup and layer.embedding is not unbox(layer.get_variable("params", "embedding")):
        kernel.refuse(f"{name} overrides setup, and computes with another kernel")
    if layer.promote_dtype is not nn.dtypes.promote_dtype:
        W = jax.ShapeDtypeStruct(kernel.value.shape, kernel.dtype)
        operands = [W] if isinstance(layer, nn.Embed) else [W, W, W]
        if not only_converts(lambda *a: layer.promote_dtype(*a, dtype=layer.dtype), *operands):
            kernel.refuse("its promote_dtype does more to the kernel than to convert its dtype")


_CONV = Entry("nn.Conv, nn.ConvLocal", ("kernel",), _conv)
LAYERS: Mapping[MethodKey, Entry] = types.MappingProxyType(
    {
        body(nn.Dense.__call__): Entry("nn.Dense", ("kernel",), _dense),
        body(nn.DenseGeneral.__call__): Entry("nn.DenseGeneral", ("kernel",), _dense),
        body(nn.Einsum.__call__): Entry("nn.Einsum", ("kernel",), _einsum),
        body(nn.Conv.__call__): _CONV,
        body(nn.ConvLocal.__call__): _CONV,  # the same function, in the versions of Flax so far
        body(nn.ConvTranspose.__call__): Entry("nn.ConvTranspose", ("kernel",), _conv_transpose),
        body(nn.Embed.__call__): Entry("nn.Embed", ("embedding",), _embed),
        body(nn.Embed.attend): Entry("nn.Embed", ("embedding",), _attend),
    }
)
