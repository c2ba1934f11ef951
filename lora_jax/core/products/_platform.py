"""Forms of a computation that are the same numbers, of which a platform has the one it is best at.

A program may be compiled for another platform than the one that traces it: ahead of time, or by
``jax.export``. So it has all forms until it is lowered, and then keeps one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

PLATFORMS = ("cpu", "gpu", "tpu")


def by_platform(form: Callable[..., Any], *args: Any) -> Any:
    """``form(*args, platform=...)``, as it is for the platform that the program is compiled for.

    Args:
      form: of arrays, and of ``platform``, one of ``"cpu"``, ``"gpu"`` and ``"tpu"``; the last is
        also that of platforms that are none of these.
      *args: trees of arrays.

    Example:
      >>> def doubled(x, platform):
      ...     return x + x if platform == "cpu" else 2 * x
      >>> by_platform(doubled, jax.numpy.ones(2))
      Array([2., 2.], dtype=float32)
    """
    cpu, gpu, tpu = (functools.partial(form, platform=platform) for platform in PLATFORMS)
    return jax.lax.platform_dependent(*args, cpu=cpu, cuda=gpu, rocm=gpu, default=tpu)
