"""The short way: the adapters of a model, with the axes of its kernels found on the way."""

from __future__ import annotations

from typing import Any

import chex

from lora_jax.core.rules._config import LoraConfig, check_config
from lora_jax.core.rules._hints import key_comes_first, look_first
from lora_jax.layers._handlers import Handlers, handlers_of_call
from lora_jax.models._front_end import front_end
from lora_jax.trees._init import lora_init


@look_first(key_comes_first("lora_init_model(key, model, variables, config, *args)"))
def lora_init_model(
    key: chex.PRNGKey,
    model: Any,
    variables: Any,
    config: LoraConfig,
    /,
    *args: Any,
    handlers: Handlers | None = None,
    **kwargs: Any,
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """Splits the parameters of a model into a frozen base and the adapters to train.

    It is :func:`lora_jax.lora_init` with ``axes`` from :func:`lora_jax.kernel_axes`, so that every
    kernel of every known layer can be adapted, whatever its axes, rules may be for
    ``"all-linear"``, and parameters that the model also reads outside of their layer are refused
    where an adapter would change one use only. The model is evaluated abstractly, once or twice:
    no memory, no arithmetic.

    Args:
      key: a JAX random key.
      model: as for :func:`lora_jax.lora_apply`.
      variables: its variables, ``{"params": params}`` and other collections that the call needs,
        such as ``batch_stats`` and ``cache``; of an NNX model its ``nnx.State``.
      config: which leaves are adapted and how, and which are fully trained.
      *args: for the model: a sample input, arrays or ``jax.ShapeDtypeStruct``.
      handlers: as for :func:`lora_jax.lora_apply`; give both the same.
      **kwargs: for the model: ``train=True``, ``rngs``, ``mutable``, ``method``. The call
        must read every kernel that is adapted.

    Returns:
      ``(frozen, adapters)``, both nested like ``variables["params"]``, or, of an NNX model, a state
      and nested dicts; see
      :func:`lora_jax.lora_init`.

    Raises:
      TypeError: if arguments are in another order, or if a model, a config or handlers are
        something else.
      ValueError: if ``variables`` does not have ``"params"``; and as :func:`lora_jax.lora_init`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lora_jax
      >>> model = nn.Sequential([nn.MultiHeadDotProductAttention(num_heads=2), nn.Dense(3)])
      >>> x = jnp.ones((1, 5, 8))
      >>> variables = model.init(jax.random.key(0), x)
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("all-linear", rank=2, variant="dora")])
      >>> frozen, adapters = lora_jax.lora_init_model(
      ...     jax.random.key(1), model, variables, config, x
      ... )
      >>> sorted(adapters["layers_0"])  # and not the output head
      ['key', 'out', 'query', 'value']
      >>> lora_jax.lora_apply(model, {"params": frozen}, adapters, x).shape
      (1, 5, 3)
    """
    check_config(config)
    called = front_end(model, variables, "lora_init_model")
    axes = called.axes(args, kwargs, handlers_of_call(handlers))
    return lora_init(key, called.params, config, axes=axes)
