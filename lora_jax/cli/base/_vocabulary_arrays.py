"""What has a row for every token, by its name: embeddings, which look tokens up, and heads."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lora_jax.files._checkpoint import Checkpoint, said_in

# How the modules of transformers are called that give the logits of tokens, and that look them up.
_HEADS = (
    "lm_head",
    "lm_head.decoder",
    "predictions.decoder",
    "vocab_projector",
    "generator_lm_head",
    "embed_out",
    "proj_out",
)
_EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "word_embedding",
    "tok_embeddings",
    "embeddings",
    "embed_in",
    "shared",
)

# The last part of the names of modules that look up anything, tokens, positions or buckets, but of
# no projection of an embedding.
_EMBEDDING = re.compile(r"^(?!.*proj)(.*emb.*|w[tp]e|shared|.*bias|.*codebook)$", re.IGNORECASE)


def is_head(module: str) -> bool:
    """Whether a module gives the logits of tokens, by its name."""
    alone = module in ("decoder", "output_projection")
    return alone or f".{module}".endswith(tuple(f".{name}" for name in _HEADS))


def is_embedding(module: str) -> bool:
    """Whether a module looks up tokens, by its name."""
    return module.rpartition(".")[2] in _EMBEDDINGS


def is_vocabulary(name: str) -> bool:
    """Whether a parameter has a row for every token, by its name."""
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and (is_head(module) or is_embedding(module))


def embedding_by(name: str, *models: Checkpoint) -> str:
    """What says that a weight is of an embedding, its ``"name"`` or its ``"size"``, or nothing.

    Args:
      name: as ``"transformer.wte.weight"``.
      models: those that have it. An embedding has no bias, and often a row for every token, which
        their ``config.json`` or a head that is known by its name says.
    """
    module = module_of(name)
    if is_head(module) or any(f"{module}.bias" in one for one in models):
        return ""
    if _EMBEDDING.search(module.rpartition(".")[2]):
        return "name"
    tokens = {one.info[n].shape[:1] for one in models for n in one if is_head(module_of(n))}
    tokens |= {(n,) for one in models for n in said_in(one.config, "vocab_size")}
    return "size" if {one.info[name].shape[:1] for one in models} & tokens else ""


def head_biases(parameters: Iterable[str]) -> list[str]:
    """The biases that have a number for every token, by their names."""
    names = [name for name in parameters if name.endswith(".bias")]
    return [
        name
        for name in names
        if is_head(name.removesuffix(".bias"))
        or name.endswith(("cls.predictions.bias", "lm_head.bias"))
    ]


def grown(shapes: Iterable[tuple[int, ...]], old: tuple[int, ...]) -> bool:
    """Whether arrays have more rows than one of the shape old, and the same columns."""
    return all(len(s) == len(old) and s[1:] == old[1:] and s[0] > old[0] for s in shapes)


def module_of(name: str) -> str:
    """The module that has a parameter."""
    return name.rpartition(".")[0]


def last_of(name: str) -> str:
    """What the module of a parameter is called in the module above it."""
    return module_of(name).rpartition(".")[2]
