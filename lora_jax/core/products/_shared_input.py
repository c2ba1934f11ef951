"""The input that several layers read, as their factors have it.

Queries, keys and values are products of the same ``x``. In the gradient of ``x`` a compiler adds up
what comes back through the kernels and through the factors,

    dx = g_q W_q^T + h_q U_q^T + g_k W_k^T + h_k U_k^T + ...,

in this order, as JAX writes it. Where the outputs of the kernels are sharded each ``g W^T`` is a
sum over the chips, and they are one sum, and one transfer, only if nothing stands between them. So
the factors of all layers have one copy of ``x``, whose gradient is added up by itself:

    dx = (g_q W_q^T + g_k W_k^T + ...) + (h_q U_q^T + h_k U_k^T + ...).

It is a copy by name: a compiled program has none.
"""

from __future__ import annotations

import chex
import jax.numpy as jnp

from lora_jax._compat import is_traced, trace_state


class SharedInputs:
    """The inputs that the layers of one module have read, in one call of it."""

    def __init__(self) -> None:
        self._state = trace_state()
        self._copies: list[tuple[chex.Array, chex.Array]] = []

    def copy(self, x: chex.Array) -> chex.Array:
        """The copy of an input: the same for all layers that read this very array.

        Inside of a transform that has begun since, it is the input itself: what is made there means
        nothing outside.
        """
        if not is_traced(x) or trace_state() != self._state:
            return x
        for original, copy in self._copies:
            if original is x:
                return copy
        self._copies.append((x, jnp.copy(x)))
        return self._copies[-1][1]
