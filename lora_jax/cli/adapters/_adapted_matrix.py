"""One adapted matrix without its base: norms, products and singular values of ``s U V``.

``U V`` is never formed: all of them come from matrices of ``r`` columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class AdaptedMatrix:
    """One adapted matrix.

    Attributes:
      U: ``(d, r)``.
      V: ``(r, k)``.
      m: ``(k,)``, or ``None`` for LoRA.
      scale: ``s`` of ``W + s U V``.
      settings: what else an adapter of lora_jax says of what it computes, by the names of fields.
    """

    U: Array
    V: Array
    m: Array | None
    scale: float
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def rank(self) -> int:
        """``r``."""
        return int(self.U.shape[1])

    @property
    def size(self) -> int:
        """How many numbers are trained."""
        return int(self.U.size + self.V.size + (0 if self.m is None else self.m.size))

    @property
    def singular_values(self) -> Array:
        """Those of ``s U V``, the largest first; at most ``r`` of them are not zero."""
        _, R = np.linalg.qr(self.U.astype(np.float64))
        _, L = np.linalg.qr(self.V.astype(np.float64).T)
        return self.scale * np.linalg.svd(R @ L.T, compute_uv=False)

    @property
    def effective_rank(self) -> float:
        """The exponential of the entropy of the singular values (Roy and Vetterli 2007)."""
        values = self.singular_values
        share = values[values > 0] / max(values.sum(), np.finfo(float).tiny)
        return float(np.exp(-(share * np.log(share)).sum())) if len(share) else 0.0


def difference(a: AdaptedMatrix, b: AdaptedMatrix) -> tuple[float, float]:
    """How far ``s U V`` of two adapters of one matrix are apart.

    Returns:
      ``||A - B|| / ||A||`` in the Frobenius norm, and the cosine of the angle between them.
    """
    aa, bb, ab = _inner(a, a), _inner(b, b), _inner(a, b)
    apart = AdaptedMatrix(
        np.concatenate(
            [a.scale * a.U.astype(np.float64), -b.scale * b.U.astype(np.float64)], axis=1
        ),
        np.concatenate([a.V.astype(np.float64), b.V.astype(np.float64)]),
        None,
        1.0,
    )
    norm = float(np.linalg.norm(apart.singular_values))
    relative = norm / np.sqrt(aa) if aa > 0 else (0.0 if norm == 0 else float("inf"))
    return float(relative), float(ab / np.sqrt(aa * bb)) if aa * bb > 0 else float("nan")


def _inner(a: AdaptedMatrix, b: AdaptedMatrix) -> float:
    """The inner product of ``s U V`` of two adapters."""
    left = a.U.astype(np.float64).T @ b.U.astype(np.float64)
    right = a.V.astype(np.float64) @ b.V.astype(np.float64).T
    return float(a.scale * b.scale * (left * right).sum())
