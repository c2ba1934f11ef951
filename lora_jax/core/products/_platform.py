"""Forms of a computation that are the same numbers, of which a platform has the one it is best at.

A program may be compiled for another platform than the one that traces it: ahead of time, or by
``jax.export``. So it has all forms until it is lowered, and then keeps one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
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


def by_choice(choices: Mapping[str, Any], form: Callable[..., Any], *args: Any) -> Any:
    """``form(*args, choice=...)`` with what is chosen for the platform.

    Args:
      choices: by the names of the platforms. Where they are all the same, there is one form only.
      form: of arrays, and of a choice.
      *args: trees of arrays.

    Example:
      >>> def scaled(x, choice):
      ...     return choice * x
      >>> by_choice(dict.fromkeys(PLATFORMS, 3.0), scaled, jax.numpy.ones(2))
      Array([3., 3.], dtype=float32)
    """
    if len(set(choices.values())) == 1:
        return form(*args, choice=choices[PLATFORMS[0]])

    def on(*args: Any, platform: str) -> Any:
        return form(*args, choice=choices[platform])

    return by_platform(on, *args)
