"""The nearest matrix of a lower rank, and what it leaves out.

By singular values (Eckart and Young 1936), on the host, of a matrix or of a product of factors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


class LowRank(NamedTuple):
    """Factors of the nearest matrix of a lower rank.

    Attributes:
      U: ``(d, r)``, with the roots of the singular values.
      V: ``(r, k)``, likewise.
      lost: the Frobenius norm of what is left out.
      norm: that of what was wanted.
    """

    U: Array
    V: Array
    lost: float
    norm: float

    @property
    def error(self) -> float:
        """``||wanted - U V|| / ||wanted||``; 0 where nothing was wanted."""
        return self.lost / self.norm if self.norm > 0 else 0.0


def low_rank(delta: Array, rank: int | None, explained_variance: float | None) -> LowRank:
    """The nearest matrix of a lower rank.

    Args:
      delta: ``(d, k)``.
      rank: at most this one, and never above ``min(d, k)``; or
      explained_variance: the smallest that keeps this share of the squared norm.

    Example:
      >>> U, V, lost, norm = low_rank(np.diag([4.0, 3.0]), 1, None)
      >>> np.abs(U @ V).round(4).tolist(), round(lost, 4), round(norm, 4)
      ([[4.0, 0.0], [0.0, 0.0]], 3.0, 5.0)
    """
    left, values, right = np.linalg.svd(np.asarray(delta, np.float32), full_matrices=False)
    return _cut(left, values, right, rank, explained_variance, None)


def low_rank_product(
    U: Array,
    V: Array,
    rank: int | None,
    explained_variance: float | None,
    norm: float | None = None,
) -> LowRank:
    """The same of ``U V``, which is never formed: its factors' QR leaves a matrix of ``r`` columns.

    Args:
      U: ``(d, r)``.
      V: ``(r, k)``.
      rank: as for :func:`low_rank`.
      explained_variance: likewise.
      norm: that of all that was wanted, where ``U V`` is a part of it and the rest is kept.
    """
    Q, R = np.linalg.qr(U.astype(np.float64))
    P, L = np.linalg.qr(V.astype(np.float64).T)
    left, values, right = np.linalg.svd(R @ L.T, full_matrices=False)
    return _cut(Q @ left, values, right @ P.T, rank, explained_variance, norm)


def _cut(
    left: Array,
    values: Array,
    right: Array,
    rank: int | None,
    explained_variance: float | None,
    norm: float | None,
) -> LowRank:
    squares = np.square(values, dtype=np.float64)
    total = float(squares.sum())
    wanted = total if norm is None else norm**2
    if rank is None:
        assert explained_variance is not None
        may_lose = wanted * (1 - explained_variance * (1 - 1e-12))
        rank = int(np.searchsorted(np.cumsum(squares), total - may_lose)) + 1
    rank = min(rank, len(values))
    root = np.sqrt(values[:rank])
    lost = float(np.sqrt(squares[rank:].sum()))
    return LowRank(left[:, :rank] * root, root[:, None] * right[:rank], lost, float(wanted**0.5))
