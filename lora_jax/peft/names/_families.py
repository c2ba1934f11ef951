"""Families of names: those of models that are found by the name of the family alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.core._axes import KernelAxes
from lora_jax.peft.names._key_mapping import KeyMapping

_LAYER = "model.layers.{i}."


def _decoder(kernel: str, embedding: str) -> tuple[KeyMapping, ...]:
    """The names of decoders in NNX that are built like Llama and Qwen.

    Args:
      kernel: the name of the kernels in attention, ``(d, heads, head)``.
      embedding: that of the embeddings.
    """
    split, joined = KernelAxes((0,), (1, 2)), KernelAxes((0, 1), (2,))
    return (
        *(
            KeyMapping(
                f"layers/{{i}}/attn/{name}/{kernel}",
                f"{_LAYER}self_attn.{name}.weight",
                axes=joined if name == "o_proj" else split,
            )
            for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        ),
        KeyMapping("layers/{i}/mlp/{name}/kernel", _LAYER + "mlp.{name}.weight"),
        KeyMapping(f"embedder/{embedding}", "model.embed_tokens.weight", "embedding"),
        KeyMapping(f"lm_head/{kernel}", "lm_head.weight"),
    )


_GEMMA = "model.layers.{i}.self_attn."
_GEMMA_MLP = "model.layers.{i}.mlp."

FAMILIES: Mapping[str, tuple[KeyMapping, ...]] = {
    # Flax models of Hugging Face have the names of those for PyTorch, but for the last part.
    "transformers": (
        KeyMapping("{path*}/kernel", "{path*}.weight", "weight"),
        # T5's and BART's encoder and decoder have it under their own names; PEFT's embeddings
        # look up tokens, which positions are not.
        KeyMapping("shared/embedding", "shared.weight", "unused"),
        KeyMapping("{path*}/shared/embedding", "{path*}.shared.weight", "unused"),
        KeyMapping("{path*}/embed_positions/embedding", "{path*}.embed_positions.weight", "unused"),
        KeyMapping("{path*}/embedding", "{path*}.weight", "embedding"),
        KeyMapping("{path*}/scale", "{path*}.weight", "plain"),
        KeyMapping("{path*}/{leaf}", "{path*}.{leaf}", "plain"),
        KeyMapping("{leaf}", "{leaf}", "plain"),
    ),
    # Google's gemma, to the models of Hugging Face.
    "gemma": (
        KeyMapping(
            "layer_{i}/attn/q_einsum/w", _GEMMA + "q_proj.weight", axes=KernelAxes((1,), (0, 2))
        ),
        KeyMapping(
            "layer_{i}/attn/kv_einsum/w",
            _GEMMA + "{k_proj|v_proj}.weight",
            axes=KernelAxes((2,), (0, 1, 3), fused=2, parts=(0, 1)),
        ),
        KeyMapping(
            "layer_{i}/attn/attn_vec_einsum/w",
            _GEMMA + "o_proj.weight",
            axes=KernelAxes((0, 1), (2,)),
        ),
        KeyMapping(
            "layer_{i}/mlp/gating_einsum",
            _GEMMA_MLP + "{gate_proj|up_proj}.weight",
            axes=KernelAxes((2,), (0, 1), fused=2, parts=(0, 1)),
        ),
        KeyMapping("layer_{i}/mlp/linear", _GEMMA_MLP + "down_proj.weight"),
        KeyMapping("embedder/input_embedding", "model.embed_tokens.weight", "embedding"),
    ),
    # Llama and Qwen in NNX, to the models of Hugging Face.
    "tunix": _decoder("w", "input_embedding"),
    "bonsai": _decoder("kernel", "embedding"),
}
"""Names by family: each of them a value of ``names``."""


def as_names(names: str | Sequence[KeyMapping | tuple[Any, ...]]) -> tuple[KeyMapping, ...]:
    """What the user gave as ``names``.

    Raises:
      TypeError: if it is neither a family nor a list of names.
      ValueError: if there is no such family.
    """
    if isinstance(names, str):
        if names not in FAMILIES:
            raise ValueError(
                f"There are no names for {names!r}, but for {sorted(FAMILIES)}. Give a list of "
                f"lora_jax.peft.KeyMapping for another model."
            )
        return FAMILIES[names]
    if not isinstance(names, Sequence):
        raise TypeError(
            f"names must be a family or a list of KeyMapping, got {type(names).__name__}."
        )
    return tuple(name if isinstance(name, KeyMapping) else KeyMapping(*name) for name in names)
