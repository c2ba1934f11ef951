"""An optimization barrier that is not there under ``jax.vmap``.

XLA's compiler for CPUs fails a check of its own, and with it the process, on some batched matrix
products behind a barrier: it leaves an operand in a layout that it has no code for.
"""

from __future__ import annotations

import chex
import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_barrier_p = Primitive("lora_jax_barrier")


def barrier(x: chex.Array) -> chex.Array:
    """``jax.lax.optimization_barrier`` of an array, which a mapped array goes past.

    Example:
      >>> import jax.numpy as jnp
      >>> def has_one(function):
      ...     return "optimization_barrier" in jax.jit(function).lower(jnp.ones((2, 3))).as_text()
      >>> has_one(barrier), has_one(jax.vmap(barrier))
      (True, False)
    """
    y: chex.Array = _barrier_p.bind(x)
    return y


_barrier_p.def_impl(jax.lax.optimization_barrier)
_barrier_p.def_abstract_eval(lambda x: x)
ad.deflinear2(_barrier_p, lambda cotangent, _: [barrier(cotangent)])
batching.primitive_batchers[_barrier_p] = lambda args, axes: (args[0], axes[0])
mlir.register_lowering(
    _barrier_p, mlir.lower_fun(jax.lax.optimization_barrier, multiple_results=False)
)
