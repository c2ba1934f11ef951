"""Parameters that ``nn.map_variables`` maps on their way to a layer, which is refused."""

from __future__ import annotations

import flax.linen as nn

from lora_jax.linen._params import SUFFIX
from lora_jax.trees._paths import flatten, path_of

MAPPED = (
    "its parameters are mapped by nn.map_variables, as nn.WeightNorm and nn.SpectralNorm do, and "
    "an adapter would be mapped as well"
)

OF_NNX = "its module is one of NNX, by nnx.bridge.ToLinen"


def refuse_mapped(module: nn.Module, why: str = MAPPED) -> None:
    """Refuses the adapters in a module whose parameters are mapped, or which has no layers.

    Args:
      module: the module.
      why: the reason, for the message.

    Raises:
      ValueError: if there is one.
    """
    params = flatten(module.variables.get("params", {}), "params")
    found = [key for key in params if key[-1].endswith(SUFFIX)]
    if found:
        path = path_of((*module.path, *found[0])).removesuffix(SUFFIX)
        raise ValueError(
            f"The adapter of {path!r} cannot be used: {why}. Give it a rule with "
            f"materialize=True, so that W' stands in the place of the parameter."
        )
