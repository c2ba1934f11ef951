"""An optimizer for each of several adapters that are trained at once."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from lora_jax.core.products._row_ids import checked_ids
from lora_jax.trees._stack_size import stack_size

_WHAT = "per_adapter is"


def per_adapter(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Gives each of the stacked adapters its own optimizer, with its own state.

    What an optimizer reckons over all parameters, such as the norm that gradients are clipped to,
    it reckons for each adapter by itself. Given the ids of a batch of mixed requests, it leaves
    adapters that are not in the batch as they are, bit for bit, with their states: no momentum, no
    weight decay and no count of steps goes on for them.

    Args:
      optimizer: any of optax. ``optax.inject_hyperparams`` gives hyperparameters that are arrays in
        the state, which may then differ: see the example.

    Returns:
      An optimizer for trees with the adapters on an axis in front, as from :func:`lora_jax.stack`.
      Its ``update`` takes ``adapter_ids=ids`` besides, the ids of :func:`lora_jax.lora_apply`;
      without them every adapter is updated. Other arguments are for each one's optimizer.

    Raises:
      ValueError: if adapters are not stacked; by the optimizer.

    Example:
      >>> import jax.numpy as jnp, lora_jax, optax
      >>> optimizer = lora_jax.per_adapter(optax.inject_hyperparams(optax.sgd)(learning_rate=0.0))
      >>> stacked = {"U": jnp.zeros((3, 2))}  # of three adapters
      >>> state = optimizer.init(stacked)
      >>> state.hyperparams["learning_rate"] = jnp.array([1.0, 10.0, 100.0])
      >>> gradient = {"U": -jnp.ones((3, 2))}
      >>> updates, state = optimizer.update(
      ...     gradient, state, stacked, adapter_ids=jnp.array([2, 0, -1])
      ... )
      >>> updates["U"]
      Array([[  1.,   1.],
             [  0.,   0.],
             [100., 100.]], dtype=float32)
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: optax.Params) -> optax.OptState:
        stack_size(params, _WHAT)
        return jax.vmap(inner.init)(params)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        adapter_ids: chex.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        def one(updates: Any, state: Any, params: Any) -> Any:
            return inner.update(updates, state, params, **extra_args)

        count = stack_size(updates, _WHAT)
        new, new_state = jax.vmap(one)(updates, state, params)
        if adapter_ids is None:
            return new, new_state
        ids = checked_ids(adapter_ids, count)
        present = jax.nn.one_hot(jnp.ravel(ids), count, dtype=bool).any(axis=0)

        def chosen(new: chex.Array, old: chex.Array) -> chex.Array:
            return jnp.where(jnp.reshape(present, (count, *(1,) * (new.ndim - 1))), new, old)

        zeros = jax.tree.map(jnp.zeros_like, new)
        return jax.tree.map(chosen, new, zeros), jax.tree.map(chosen, new_state, state)

    return optax.GradientTransformationExtraArgs(init, update)
