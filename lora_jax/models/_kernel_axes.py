"""The axes of every kernel, from one abstract call of the model."""

from __future__ import annotations

from typing import Any

from lora_jax.core._model_axes import ModelAxes
from lora_jax.layers._handlers import Handlers, handlers_of_call
from lora_jax.models._front_end import front_end


def kernel_axes(
    model: Any,
    variables: Any,
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
      *args: for the model; arrays may be ``jax.ShapeDtypeStruct``.
      handlers: as for :func:`lora_jax.lora_apply`.
      **kwargs: for the model, and for ``model.apply``.

    Returns:
      A :class:`ModelAxes`, for ``lora_init(..., axes=...)``: a mapping of the path of every kernel
      that this call used in a known layer to its :class:`KernelAxes`. It also knows which
      parameters the model reads in other places too, such as tied embeddings.

    Raises:
      TypeError: if ``model`` is not a model of Flax, or ``variables`` not of its library, or
        ``handlers`` not :class:`lora_jax.Handlers`.
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
    called = front_end(model, variables, "kernel_axes")
    return called.axes(args, kwargs, handlers_of_call(handlers))
