"""How many adapters are stacked in a tree."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from lora_jax.core._adapter import Adapter
from lora_jax.core._adapter_stack import AdapterStack


def stack_size(adapters: Any, what: str) -> int:
    """How many adapters are stacked in a tree.

    Args:
      adapters: of adapters, or of anything that has their arrays, such as gradients.
      what: is for stacked adapters, for the message.

    Raises:
      ValueError: if its arrays do not have one first size, or an adapter is alone.
    """
    kinds = Adapter | AdapterStack
    nodes = jax.tree.leaves(adapters, is_leaf=lambda x: isinstance(x, kinds))
    alone = any(isinstance(node, kinds) and node.count is None for node in nodes)
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(adapters)}
    if alone or len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"{what} for stacked adapters, whose arrays all have the number of adapters as their "
            f"first size, and here these are {sorted(sizes)}: stack them with "
            f"lora_jax.stack([...])."
        )
    return int(sizes.pop()[0])
