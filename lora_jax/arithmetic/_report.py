"""How near the result of arithmetic is to what was asked for, adapter by adapter."""

from __future__ import annotations

import dataclasses

from lora_jax.trees._table import Report, text_table


@dataclasses.dataclass(frozen=True)
class Approximation:
    """How near an adapter comes to what was asked for.

    Attributes:
      rank: of the adapter; ``None`` for a leaf that is fully trained.
      error: ``||wanted - got|| / ||wanted||`` of ``W' - W`` in the Frobenius norm, over all stacked
        matrices; 0 where nothing is left out, which is exact but for float32's rounding.
    """

    rank: int | None
    error: float


@dataclasses.dataclass(frozen=True)
class ApproximationReport(Report[Approximation]):
    """The rank and the error of every adapter by its path; as text, a table.

    Attributes:
      rows: the same as a dict.
    """

    @property
    def largest(self) -> float:
        """The largest error; 0 where there is nothing."""
        return max((one.error for one in self.rows.values()), default=0.0)

    def __str__(self) -> str:
        """A table."""
        body = [
            (
                path,
                "full" if one.rank is None else str(one.rank),
                f"{one.error:.2g}" if one.error else "exact",
            )
            for path, one in self.rows.items()
        ]
        return "\n".join(text_table(("path", "rank", "relative error"), body, left=1))
