"""The demo's classifier in either of Flax's APIs: made, and called with adapters and without.

A model is a module of Linen or the graphdef of one of NNX; its parameters are a dict or a state.
"""

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

import lora_jax
from examples import minilm, minilm_nnx

KERNELS = r"encoder/.*/kernel"
Api: TypeAlias = Literal["linen", "nnx"]
Base: TypeAlias = Literal["float32", "int8", "int4", "nf4", "fp8"]
Model: TypeAlias = minilm.Classifier | nnx.GraphDef[minilm_nnx.Classifier]


def make(
    api: Api, config: minilm.Config, classes: int, encoder: dict[str, Any], seed: int
) -> tuple[Model, Any]:
    """The model, and its parameters: the pretrained encoder with a new head."""
    if api == "nnx":
        graphdef, state = nnx.split(minilm_nnx.Classifier(config, classes, nnx.Rngs(seed)))
        nnx.replace_by_pure_dict(state, {"encoder": encoder})
        return graphdef, state
    model, tokens = minilm.Classifier(config, classes), jnp.ones((1, 4), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(seed), tokens, tokens)["params"]
    return model, {**params, "encoder": encoder}


def with_base(params: Any, base: Base) -> Any:
    """The parameters with the encoder's kernels as the base shall have them."""
    return params if base == "float32" else lora_jax.quantize(params, {KERNELS: base})


def logits(
    model: Model, frozen: Any, adapters: Any, tokens: Any, mask: Any, rng: jax.Array | None = None
) -> jax.Array:
    """``(texts, classes)``, of the adapted model; with a key there is dropout."""
    if isinstance(model, nnx.GraphDef):
        rngs = None if rng is None else nnx.Rngs(dropout=rng)
        return lora_jax.lora_apply(model, frozen, adapters, tokens, mask, rngs)
    return lora_jax.lora_apply(
        model,
        {"params": frozen},
        adapters,
        tokens,
        mask,
        deterministic=rng is None,
        rngs={} if rng is None else {"dropout": rng},
    )


def plain_logits(model: Model, params: Any, tokens: Any, mask: Any) -> jax.Array:
    """The same of the plain model, which knows of no adapters."""
    if isinstance(model, nnx.GraphDef):
        return nnx.merge(model, params)(tokens, mask)
    return model.apply({"params": params}, tokens, mask)
