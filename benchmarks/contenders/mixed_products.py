"""LoRA by hand where each row of a batch has its own adapter: three ways to write ``(x U_i) V_i``.

    gather   the factors of each row are copied, and multiplied row by row
    one-hot  x [U_0 | U_1 | ...], a mask, and [V_0; V_1; ...]
    ragged   the rows sorted by adapter, and `jax.lax.ragged_dot`

Each is a function of ``x``, ``(rows, length, d)``, of ``U``, ``(adapters, d, r)``, of ``V``,
``(adapters, r, k)``, and of the adapter of each row, ``(rows,)``.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def gather(x: jax.Array, U: jax.Array, V: jax.Array, ids: jax.Array) -> jax.Array:
    """The factors of each row."""
    return jax.vmap(lambda x, i: (x @ U[i]) @ V[i])(x, ids)


def one_hot(x: jax.Array, U: jax.Array, V: jax.Array, ids: jax.Array) -> jax.Array:
    """The factors of all, side by side."""
    count, d, r = U.shape
    mask = jnp.repeat(jax.nn.one_hot(ids, count, dtype=x.dtype), r, axis=-1)[:, None]
    xU = x @ jnp.moveaxis(U, 0, 1).reshape(d, -1)
    return (xU * mask) @ V.reshape(-1, V.shape[-1])


def ragged(x: jax.Array, U: jax.Array, V: jax.Array, ids: jax.Array) -> jax.Array:
    """The rows of each adapter together."""
    order = jnp.argsort(ids)
    sizes = jnp.bincount(ids, length=len(U)) * x.shape[1]
    rows = x[order].reshape(-1, x.shape[-1])
    y = jax.lax.ragged_dot(jax.lax.ragged_dot(rows, U, sizes), V, sizes)
    return y.reshape(*x.shape[:2], -1)[jnp.argsort(order)]


PRODUCTS: dict[str, Callable[..., jax.Array]] = {
    "gather": gather,
    "one-hot": one_hot,
    "ragged": ragged,
}
