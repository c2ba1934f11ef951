"""A decoder with scanned layers on a mesh, and how its parameters are sharded there."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

from benchmarks.models.cases import Case
from benchmarks.models.linen import DecoderLayer, dense, embed, norm, rematerialised

# Over the axes "data" and "model" of a mesh, how many chips of 16 are in each, or of one.
LAYOUTS = {"data": (16, 1), "model": (1, 16), "both": (4, 4), "one": (1, 1)}
# Their inputs are sharded by "model", where those of others are their outputs.
SECOND = ("o", "down")


class ScannedDecoder(nn.Module):
    """The decoder of a case, with its layers in one loop.

    Attributes:
      case: the case.
      constrain: says of activations how they are sharded.
      unroll: how many layers are in one turn of the loop.
    """

    case: Case
    constrain: Callable[[jax.Array], jax.Array]
    unroll: int = 1

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """``(batch, length)`` to logits ``(batch, length, vocab)``."""
        case = self.case
        x = self.constrain(embed(case, case.vocab, "embed")(ids))
        layer = rematerialised(case, DecoderLayer, prevent_cse=False)
        layers = nn.scan(
            layer if case.remat else DecoderLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=case.layers,
            unroll=self.unroll,
        )
        x, _ = layers(case, name="layers")(x, None, None)
        return dense(case, case.vocab, "head")(norm(case, "norm")(x))


def spec_of(path: tuple[Any, ...]) -> PartitionSpec:
    """How a parameter of it is sharded, as its user says it; also the factors of qwix.

    Args:
      path: to it, as `jax.tree_util` gives it.
    """
    names = [part.key for part in path]
    inputs, outputs = ("model", "data") if set(SECOND) & set(names) else ("data", "model")
    spec = {
        "kernel": (inputs, outputs),
        "kernel_lora_a": (inputs, None),
        "kernel_lora_b": (None, outputs),
    }.get(names[-1], ())
    return PartitionSpec(*(None,) * (spec != () and "layers" in names), *spec)
