"""What follows from merged arrays for the rest of a model: its head, its tokens and its config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.cli.base._model import Model
from lora_jax.cli.base._tied import TIED, Tie
from lora_jax.cli.base._vocabulary_arrays import head_biases, is_vocabulary
from lora_jax.cli.merging._merged_arrays import Updates
from lora_jax.cli.merging._prefixes import ADAPTER
from lora_jax.files._checkpoint import MODEL_CONFIG, Checkpoint
from lora_jax.files._tensors import Info

# How the names of matrices end that have a row for every label.
_LABELS = (
    ".score.weight",
    ".classifier.weight",
    ".classifier.out_proj.weight",
    ".qa_outputs.weight",
)

# Layers between the base and the head of labels, which models of other classes have not, by the end
# of the class, and the types of models that have them.
_SEQUENCE, _CHOICE = "ForSequenceClassification", "ForMultipleChoice"
_LAYERS = {
    (_SEQUENCE, "pooler"): """
        albert bert deberta deberta-v2 ernie megatron-bert mobilebert nezha rembert roc_bert tapas
        """,
    (_SEQUENCE, "classification_head"): "bart bigbird_pegasus mbart mvp plbart",
    (_SEQUENCE, "sequence_summary"): "flaubert xlm xlnet",
    (_SEQUENCE, "head"): "modernbert-decoder",
    (_CHOICE, "pooler"): """
        albert bert camembert data2vec-text deberta-v2 ernie ibert longformer mega megatron-bert
        mobilebert mpnet nezha rembert roberta roberta-prelayernorm roc_bert xlm-roberta
        xlm-roberta-xl xmod
        """,
    (_CHOICE, "sequence_summary"): "electra flaubert xlm xlnet",
    ("ForQuestionAnswering", "qa_classifier"): "big_bird",
}


def with_consequences(
    updates: Updates,
    base: Checkpoint,
    model: Model,
    tie: Tie | None,
    notes_before: Sequence[str] = (),
) -> Updates:
    """Merged arrays with all that follows from them.

    Args:
      updates: what is merged.
      base: the base, by the adapter's names.
      model: what is known of it.
      tie: what it ties.
      notes_before: notes on what was done before.

    Raises:
      ValueError: if some of the arrays have tokens that others lack.
    """
    info = dict(updates.info)
    for name, array in updates.replaced.items():
        dtype = info[name].dtype if name in info else array.dtype
        info[name] = Info(dtype, array.shape)
    changed = set(updates.merged) | set(updates.replaced)
    untied = tie if tie is not None and {tie.embedding, tie.head} & changed else None
    if tie is not None and untied is None and tie.head not in base:
        del info[tie.head]
    config, notes = dict[str, Any](), list(notes_before)
    for new_config, new_notes in (
        _of_untying(untied, base),
        _of_added(updates, base, model, info),
        _of_tokens(base, model, info),
    ):
        config |= new_config
        notes += new_notes
    if not config:
        return dataclasses.replace(updates, info=info, notes=notes)
    if base.path.is_dir() and model.config is not None:
        new = {**model.config, **config}
        return dataclasses.replace(updates, info=info, config=new, notes=notes)
    changes = ", ".join(f"{key} = {value}" for key, value in config.items())
    notes.append(f"{base.path} has no config that could be changed, which must have {changes}.")
    return dataclasses.replace(updates, info=info, notes=notes)


# What each thing that follows asks of the config, and notes on it.
_Change = tuple[dict[str, Any], list[str]]


def _of_untying(tie: Tie | None, base: Checkpoint) -> _Change:
    """Of an embedding and a head that are two arrays with the adapter."""
    if tie is None:
        return {}, []
    if not base.path.is_dir():
        raise ValueError(
            f"{tie.embedding!r} and {tie.head!r} are tied in the base, and two arrays with "
            f"the adapter, which {MODEL_CONFIG} must say: give the base's folder, "
            f"{base.path.parent}, in place of {base.path.name}."
        )
    if tie.head not in base and tie.embedding.count(".") == tie.head.count(".") == 1:
        raise ValueError(
            f"{base.path} has {tie.embedding!r} without the prefix that it has with "
            f"{tie.head!r}: say it, {ADAPTER} transformer. for GPT-2, model. for Llama."
        )
    note = (
        f"{tie.embedding} and {tie.head} are two arrays now, as PEFT computes with them: {TIED} "
        f"is false."
    )
    return {TIED: False}, [note]


def _of_added(
    updates: Updates, base: Checkpoint, model: Model, info: Mapping[str, Info]
) -> _Change:
    """Of arrays that the base lacks: those of a head."""
    added = sorted(set(updates.replaced) - set(updates.base))
    if not added:
        return {}, []
    labels = [info[n].shape[0] for n in added if f".{n}".endswith(_LABELS)]
    _check_layers(model, info, base.path)
    config = _with_head(model, labels[-1] if labels else None)
    notes = [f"{base.path} lacks {', '.join(added)}: added as the adapter has them."]
    if classes := config.get("architectures"):
        notes.append(
            f"The model is a {classes[0]} now: transformers must not report newly initialized "
            f"weights when it loads it."
        )
    return config, notes


def _of_tokens(base: Checkpoint, model: Model, info: Mapping[str, Info]) -> _Change:
    """Of tokens that the base lacks."""
    rows = _more_tokens(info, base)
    if rows is None:
        return {}, []
    note = (
        f"There are {rows[1]} tokens, and {rows[0]} in {base.path}, whose tokenizer is copied: "
        f"put the adapter's in its place."
    )
    return _with_tokens(model, *rows), [note]


def _check_layers(model: Model, info: Mapping[str, Info], where: Path) -> None:
    """Raises ValueError if neither the base nor the adapter has a layer of the class."""
    name, has = model.trained_class or "", {part for one in info for part in one.split(".")}
    for (end, layer), types in _LAYERS.items():
        asks = name.endswith(end) and (model.config or {}).get("model_type") in types.split()
        if asks and layer not in has:
            raise ValueError(
                f"{name} has a {layer!r}, and neither the adapter nor {where} has one: "
                f"transformers would make it of random numbers. Give the base with the one that "
                f"the training began with, saved as {name}, or train it too, by modules_to_save."
            )


def _with_head(model: Model, labels: int | None) -> dict[str, Any]:
    """What the config says of a model with the head that the adapter was trained with."""
    new: dict[str, Any] = {}
    name, base = model.trained_class, model.architecture
    if name is not None and name != base:
        new["architectures"] = [name]
    had = (model.config or {}).get("id2label") or {"0": "", "1": ""}
    if labels is not None and len(had) != labels:
        new["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        new["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    return new


def _with_tokens(model: Model, before: int, after: int) -> dict[str, Any]:
    """What the config says of a model with more tokens."""
    if model.config is not None and model.config.get("vocab_size") != before:
        raise ValueError(
            f"The adapter has {after} tokens, and {model.path} says vocab_size = "
            f"{model.config.get('vocab_size')!r}, where the base has {before}: give the model its "
            f"new tokens first, in transformers."
        )
    return {"vocab_size": after}


def _more_tokens(info: Mapping[str, Info], base: Checkpoint) -> tuple[int, int] | None:
    """The number of tokens in the base, and the larger one of the merged model."""
    old = {name: one.shape[0] for name, one in base.info.items() if is_vocabulary(name)}
    more = {name: rows for name, rows in old.items() if info[name].shape[0] > rows}
    if not more:
        return None
    name = min(more)
    before, after = more[name], info[name].shape[0]
    for other in [*(n for n in info if is_vocabulary(n)), *head_biases(base)]:
        if info[other].shape[0] == before:
            raise ValueError(
                f"The adapter has {after} tokens in {name!r}, and {base.path} has "
                f"{before} in {other!r}, for which the adapter has no more: give the "
                f"base its new tokens first, as it was when the training began."
            )
    return before, after
