"""How PyTorch and PEFT lay out what Flax has: factors, magnitudes and kernels, both ways.

``kind`` is that of :class:`lora_jax.peft.KeyMapping`; arrays are NumPy's, of one kernel or of one
group of experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.core._axes import KernelAxes
from lora_jax.peft.names._key_mapping import EXPERTS

Array = np.ndarray[Any, Any]

# How transformers' FlaxConv1D stores its kernel, and what layers of that class, and of PyTorch's
# Conv1D, are called. GPT-Neo and others call linear layers so.
CONV1D = KernelAxes(inputs=(1,), outputs=(0,))
CONV1D_LAYERS = ("c_attn", "q_attn", "c_fc", "c_proj")


def factor_shapes(
    kind: str, matrix: tuple[int, int], r: int, window: tuple[int, ...], experts: int
) -> dict[str, tuple[int, ...]]:
    """The shapes of PEFT's ``A``, ``B`` and ``m``.

    Args:
      kind: how PyTorch stores the kernel.
      matrix: ``(d, k)``.
      r: rank.
      window: of a convolution; empty for other kinds.
      experts: how many the parameter holds; 1 for other kinds.
    """
    d, k = matrix
    if kind in EXPERTS:
        return {"A": (experts * r, d), "B": (k, r * experts)}
    if kind == "conv":
        ones = (1,) * len(window)
        return {
            "A": (r, d // math.prod(window), *window),
            "B": (k, r, *ones),
            "m": (1, k, *ones),
        }
    return {"A": (r, d), "B": (k, r), "m": (k,)}


def to_factors(
    kind: str, arrays: Mapping[str, Array], matrix: tuple[int, int], r: int, experts: int
) -> dict[str, Array]:
    """``U``, ``V`` and ``m`` of PEFT's arrays; of experts, stacked."""
    (d, k), A, B = matrix, arrays["A"], arrays["B"]
    U: Array
    V: Array
    if kind in EXPERTS:  # A is expert-major, B is rank-major
        U = A.reshape(experts, r, d).transpose(0, 2, 1)
        V = B.reshape(k, r, experts).transpose(2, 1, 0)
    else:
        U = np.moveaxis(A, (0, 1), (-1, -2)).reshape(d, r)  # (r, in, *window) to (*window, in, r)
        V = B.reshape(k, r).T
    return {"U": U, "V": V} | ({"m": arrays["m"].reshape(k)} if "m" in arrays else {})


def from_factors(
    kind: str, U: Array, V: Array, m: Array | None, window: tuple[int, ...]
) -> dict[str, Array]:
    """PEFT's arrays of ``U``, ``V`` and ``m``: the inverse of :func:`to_factors`."""
    *_, d, r = U.shape
    k = V.shape[-1]
    if kind in EXPERTS:
        return {"A": U.transpose(0, 2, 1).reshape(-1, d), "B": V.transpose(2, 1, 0).reshape(k, -1)}
    if kind == "conv":
        ones = (1,) * len(window)
        A = np.moveaxis(U.reshape(*window, -1, r), (-1, -2), (0, 1))
        return {"A": A, "B": V.T.reshape(k, r, *ones)} | (
            {} if m is None else {"m": m.reshape(1, k, *ones)}
        )
    return {"A": U.T, "B": V.T} | ({} if m is None else {"m": m})


def to_kernel(kind: str, array: Array) -> Array:
    """A parameter in Flax's layout: ``(in, out)``, or ``(*window, in, out)``."""
    if kind in ("linear", "experts"):
        return array.swapaxes(-1, -2)
    return np.moveaxis(array, (0, 1), (-1, -2)) if kind == "conv" else array


def from_kernel(kind: str, array: Array) -> Array:
    """A parameter in PyTorch's layout: the inverse of :func:`to_kernel`."""
    if kind in ("linear", "experts"):
        return array.swapaxes(-1, -2)
    return np.moveaxis(array, (-1, -2), (0, 1)) if kind == "conv" else array


def output_axis(shape: tuple[int, ...], bias: tuple[int, ...]) -> int | None:
    """Which axis of a matrix are the outputs, by the layer's bias; ``None`` if that does not say.

    Example:
      >>> output_axis((3, 2), (2,)), output_axis((3, 3), (3,))
      (1, None)
    """
    fits = [axis for axis, size in enumerate(shape) if bias == (size,)]
    return fits[0] if len(fits) == 1 else None
