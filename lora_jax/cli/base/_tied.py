"""An embedding that is the head of its model too: whether a base has one, and what it is called.

PEFT adapts one use of it. The merged model then has two arrays, and the head needs a name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.cli.base._model import Model
from lora_jax.cli.base._vocabulary_arrays import (
    is_embedding,
    is_head,
    is_vocabulary,
    last_of,
    module_of,
)
from lora_jax.files._checkpoint import MODEL_CONFIG, Checkpoint
from lora_jax.peft._folder import PeftFiles
from lora_jax.peft.names._keys import without_base_layer

TIED = "tie_word_embeddings"

# A layer that stands before a tied head, which no file has, and that head.
_BEFORE_HEAD = {
    "cls.predictions.transform.dense": "cls.predictions.decoder",
    "lm_head.dense": "lm_head.decoder",
    "predictions.dense": "predictions.decoder",
    "vocab_transform": "vocab_projector",
    "generator_predictions.dense": "generator_lm_head",
    "head.dense": "decoder",
}
# Heads of causal models in transformers, and the types of the models that call it so, whether the
# embedding is tied to it or not. Only types that were looked at: where the name is another one,
# transformers would make a new head, and only warn.
_CAUSAL_HEADS = {
    "lm_head": """
        apertus arcee bamba bart bigbird_pegasus bitnet blenderbot blenderbot-small bloom
        code_llama codegen cohere cohere2 deepseek_v2 deepseek_v3 diffllama doge dots1 ernie4_5
        ernie4_5_moe exaone4 falcon falcon_h1 falcon_mamba flex_olmo gemma gemma2 gemma3_text
        gemma3n_text glm glm4 glm4_moe gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_oss gptj granite
        granitemoe granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe
        jamba jetmoe lfm2 llama llama4_text longcat_flash mamba mamba2 marian mbart minimax
        ministral mistral mixtral mpt mvp nemotron olmo olmo2 olmo3 olmoe opt pegasus persimmon
        phi phi3 phimoe plbart qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next recurrent_gemma
        seed_oss smollm3 stablelm starcoder2 vaultgemma xglm zamba zamba2
        """,
    "output_projection": "biogpt trocr",
    "embed_out": "gpt_neox gpt_neox_japanese",
    "proj_out": "whisper",
}
_CAUSAL = re.compile(r"CausalLM|LMHead|DoubleHeads")


@dataclasses.dataclass(frozen=True)
class Tie:
    """An embedding that is the model's head too.

    Attributes:
      embedding: its name.
      head: the name that the head has as a separate array; the base may lack it.
      together: whether PEFT was asked to tie what it makes of the two (``ensure_weight_tying``).
    """

    embedding: str
    head: str
    together: bool = False


def tie_of(model: Model, files: PeftFiles, base: Checkpoint) -> Tie | None:
    """Which embedding that the adapter changes the model ties to its head.

    Args:
      model: what is known of the model.
      files: the adapter.
      base: the base, by the adapter's names.

    Raises:
      ValueError: if that cannot be known, or it cannot be untied.
    """
    change = _Change.of(model, files, base)
    return _tie(model, change, base) if _may_be_tied(model, change, base) else None


@dataclasses.dataclass(frozen=True)
class _Change:
    """What an adapter changes of embeddings and heads, by its names.

    Attributes:
      embeddings: those of the base.
      heads: those that are separate arrays in the base.
      touched: what the adapter changes of them.
      trained_heads: the heads among these, in the base or not.
      what: begins the messages.
    """

    embeddings: list[str]
    heads: list[str]
    touched: set[str]
    trained_heads: list[str]
    what: str

    @classmethod
    def of(cls, model: Model, files: PeftFiles, base: Checkpoint) -> _Change:
        """What the files change of a base."""
        embeddings = [n for n in base if is_vocabulary(n) and is_embedding(module_of(n))]
        heads = [n for n in base if is_vocabulary(n) and is_head(module_of(n))]
        # What the base lacks and is as large as its embedding is a head, however it is called.
        sizes = {base.info[name].shape for name in embeddings}
        shapes = {without_base_layer(n): shape for n, shape in _shapes(files).items()}
        lost = {n for n, shape in shapes.items() if n not in base and shape in sizes}
        touched = {n for n in shapes if is_vocabulary(n)} | lost
        trained_heads = sorted(n for n in touched if not is_embedding(module_of(n)))
        touched = touched or _by_size(model, files, base)
        what = f"{files.tensors.path} changes {min(touched)!r}" if touched else ""
        return cls(embeddings, heads, touched, trained_heads, what)


def _may_be_tied(model: Model, change: _Change, base: Checkpoint) -> bool:
    """Whether what is changed may be tied, by the model's config and the names of the base.

    Raises:
      ValueError: if there is no config that says it, or an encoder and a decoder share it.
    """
    what, trained_heads, heads = change.what, change.trained_heads, change.heads
    if not change.touched:
        return False
    if model.config is None:
        if heads or model.headless:
            return False
        lacks = trained_heads[0] if trained_heads else "a head"
        raise ValueError(
            f"{what}, and {base.path} lacks {lacks}, which may be tied to the embedding: give "
            f"the base's folder, with its {MODEL_CONFIG}, which says so."
        )
    if model.headless and not trained_heads:
        return False
    flag, shared = _flag(model), bool(model.config.get("is_encoder_decoder"))
    if flag is False and set(trained_heads) <= set(heads) and not shared:
        return False
    if shared or any(module_of(n).endswith("shared") for n in change.embeddings):
        if flag is False and change.touched <= set(heads):
            return False
        raise ValueError(
            f"{what}, of an encoder and a decoder that share their embedding: PEFT's adapter "
            f"is of one of its uses, for which the merged model has no array of its own. Train "
            f"it without {', '.join(sorted({last_of(n) for n in change.touched}))}."
        )
    if flag is False:
        raise ValueError(
            f"{what}, and {base.path} lacks {trained_heads[0]!r}, though {model.path} says that "
            f"{TIED} is false."
        )
    return True


def _tie(model: Model, change: _Change, base: Checkpoint) -> Tie | None:
    """The embedding and its head; ``None`` if the base has them as two that differ.

    Raises:
      ValueError: if it is not known which embedding is tied, or what its head is called.
    """
    what, heads = change.what, change.heads
    unknown = ValueError(
        f"{what}, which may be tied, and {base.path} has several parts, or no embedding that "
        f"is known by its name: untie it first, in transformers, and set {TIED} to false in "
        f"{model.path}."
    )
    if len(change.embeddings) != 1 or len(heads) > 1:
        raise unknown
    (embedding,) = change.embeddings
    if heads and not _equal(base[heads[0]], base[embedding]):
        if _flag(model) is None:
            return None
        raise ValueError(
            f"{what}, and {model.path} says that {TIED} is true, but {base.path} has "
            f"another {heads[0]!r} than {embedding!r}: set {TIED} to what is right."
        )
    if _parts(model):
        raise unknown
    if model.tying and not change.trained_heads and last_of(embedding) == "embed_tokens":
        raise ValueError(
            f"{what}, and by ensure_weight_tying its head too, but holds nothing for the head: "
            f"save it with a PEFT that does."
        )
    known = [*change.trained_heads, *heads]
    return Tie(embedding, known[0] if known else _head(model, base, embedding), model.tying)


def _parts(model: Model) -> list[Mapping[str, Any]]:
    """The configs of the model's parts that have a vocabulary."""
    parts = (model.config or {}).values()
    return [part for part in parts if isinstance(part, dict) and "vocab_size" in part]


def _flag(model: Model) -> Any:
    """What the config says of the tie, or that of its last part; ``None`` where it is silent."""
    config = model.config or {}
    return [config, *_parts(model)][-1].get(TIED, config.get(TIED))


def _by_size(model: Model, files: PeftFiles, base: Checkpoint) -> set[str]:
    """What is adapted and has a row for every token, where no name says what looks them up."""
    if model.config is None or any(is_vocabulary(name) for name in base):
        return set()
    found = {f"{m}.weight" for m, keys in files.modules.items() if "embedding" in keys["A"]}
    found = {n for n in (*found, *files.parameters) if n in base and len(base.info[n].shape) == 2}
    return {n for n in found if base.info[n].shape[0] == model.config.get("vocab_size")}


def _head(model: Model, base: Checkpoint, embedding: str) -> str:
    """The name that a tied head has as a separate array."""
    for before, head in _BEFORE_HEAD.items():
        if f"{before}.weight" in base:
            return f"{head}.weight"
    rows = base.info[embedding].shape[:1]
    biases = [n for n, one in base.info.items() if n.endswith(".bias") and one.shape == rows]
    lone = [module_of(n) for n in biases if f"{module_of(n)}.weight" not in base]
    if lone:
        return f"{lone[0]}.weight"
    causal = any(_CAUSAL.search(name or "") for name in (model.trained, model.architecture))
    model_type = (model.config or {}).get("model_type")
    if causal and (
        found := [n for n, types in _CAUSAL_HEADS.items() if model_type in types.split()]
    ):
        return f"{found[0]}.weight"
    both = f"The adapter changes {embedding!r}, which may be the head of the model too, and "
    if not causal:
        raise ValueError(
            f"{both}{model.path} does not say how that is called: name the class in its "
            f"architectures."
        )
    raise ValueError(
        f"{both}it is not known how that is called in a model of the type {model_type!r}, as "
        f"{model.path} says. Give the base a head of its own first, in transformers: let the "
        f"weight of get_output_embeddings() be a copy, and save it with {TIED} = false."
    )


def _shapes(files: PeftFiles) -> dict[str, tuple[int, ...]]:
    """The shapes of what is adapted or in the files itself, as linear layers have them, by name."""
    info, shapes = files.tensors.info, {}
    for module, keys in files.modules.items():
        shapes[f"{module}.weight"] = (info[keys["B"]].shape[0], info[keys["A"]].shape[1])
    return shapes | {name: info[key].shape for name, key in files.parameters.items()}


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have the same shape and numbers."""
    return a.shape == b.shape and np.array_equal(a, b)
