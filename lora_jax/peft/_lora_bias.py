"""The node of PEFT's ``lora_bias``: what is added to a leaf that stays in the base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import chex
import flax.struct
import numpy as np

from lora_jax._deprecated import renamed_fields
from lora_jax.core._node import Node
from lora_jax.core._numerics import float32_or_more
from lora_jax.files._node_kinds import NodeKind, add_kind
from lora_jax.files._tensors import is_floating


@renamed_fields(effective_kernel="merge")
@flax.struct.dataclass
class LoraBias(Node):
    """What is added to a leaf that stays in the base: ``b' = b + s v``, as PEFT's ``lora_bias``.

    With ``b`` the bias of an adapted layer it is ``x W + b + s ((x U) V + v)``. Kept apart from
    ``b``, ``v`` comes back from a file and goes into one as it is, trained further or not.

    Attributes:
      value: ``v``, of the shape of the leaf, in float32.
      scale: ``s``; of a bias, that of the adapter of its layer.
    """

    value: Any
    scale: float = flax.struct.field(pytree_node=False, default=1.0)

    @property
    def arrays(self) -> dict[str, Any]:
        """The trained array."""
        return {"value": self.value}

    @property
    def kind(self) -> str:
        """``"lora_bias"``."""
        return "lora_bias"

    def merge(self, leaf: chex.Array) -> chex.Array:
        """``b' = b + s v``, in float32."""
        return leaf.astype(float32_or_more(leaf.dtype)) + self.scale * self.value

    def check_fits(
        self, path: str, shape: tuple[int, ...], count: int | None = None, name: str = "the base"
    ) -> None:
        """Checks that ``v`` is of the leaf's shape, and not in a stack of adapters."""
        if count is not None:
            self.check_stacks(path, "The stack")
        found = tuple(self.value.shape)
        if found != shape:
            raise ValueError(
                f"What is added to {path!r} is {found}, but the base has {shape} there. Was it "
                f"made for another model?"
            )

    def check_combines(self, path: str, name: str) -> None:
        """Raises ValueError: it cannot be added to others."""
        raise ValueError(
            f"Something is added to {path!r} (PEFT's lora_bias), for which there is no arithmetic: "
            f"merge such an adapter into its base."
        )

    def check_stacks(self, path: str, name: str) -> None:
        """Raises ValueError: it cannot be stacked."""
        raise ValueError(
            f"{name} adds something to {path!r} (PEFT's lora_bias), which cannot be stacked: serve "
            f"it apart."
        )


def _read(entry: Any, arrays: Mapping[str, np.ndarray], path: str, where: str) -> LoraBias:
    """The node out of ``adapter.json``, if its entry makes sense."""
    array = arrays["value"]
    if type(entry) is not float or not (math.isfinite(entry) and entry > 0):
        raise ValueError(f"{where}: the scale of a LoRA bias must be positive, got {entry!r}.")
    if not is_floating(array):
        raise ValueError(f"{where}: a LoRA bias is of dtype {array.dtype}.")
    return LoraBias(array, entry)


add_kind(
    NodeKind(
        section="shifts",
        node=LoraBias,
        always=False,
        entry=lambda path, node: float(node.scale),
        tensors=lambda path, entry, where: {"value": path},
        read=_read,
    )
)
