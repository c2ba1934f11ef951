"""The embedding of a language model and its head, which may be one array, and where they stand."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.files._checkpoint import MODEL_CONFIG, Checkpoint, said_in
from lora_jax.files._json import read_json
from lora_jax.peft._config import CONFIG
from lora_jax.peft._files import PeftFiles

TIED = "tie_word_embeddings"

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
_WITH_HEAD = re.compile(r"CausalLM|LMHead|DoubleHeads|MaskedLM|PreTraining|ConditionalGeneration")
_HEADLESS = re.compile(
    r"(Classification|QuestionAnswering|MultipleChoice|(?<!Head)(?<!Heads)Model)$"
)

# How the classes end that PEFT's types of tasks are of.
CLASSES = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForConditionalGeneration",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "Model",
}


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
    module = _module(name)
    if is_head(module) or any(f"{module}.bias" in one for one in models):
        return ""
    if _EMBEDDING.search(module.rpartition(".")[2]):
        return "name"
    tokens = {one.info[n].shape[:1] for one in models for n in one if is_head(_module(n))}
    tokens |= {(n,) for one in models for n in said_in(one.config, "vocab_size")}
    return "size" if {one.info[name].shape[:1] for one in models} & tokens else ""


@dataclasses.dataclass(frozen=True)
class Tie:
    """An embedding that is the model's head too.

    Attributes:
      embedding: its name.
      head: the name that the head has as an array of its own; the base may lack it.
      together: whether PEFT was asked to tie what it makes of the two (``ensure_weight_tying``).
    """

    embedding: str
    head: str
    together: bool = False


@dataclasses.dataclass(frozen=True)
class Model:
    """What is known of the model that a base is of.

    Attributes:
      path: of its ``config.json``.
      config: what that says; ``None`` where there is none.
      trained: the class that the adapter was trained in, or how it ends; ``None`` where the adapter
        does not say it.
      tying: whether PEFT was asked to tie what it makes of an embedding and of its head.
    """

    path: Path
    config: Mapping[str, Any] | None
    trained: str | None
    tying: bool = False

    @classmethod
    def of(cls, base: Checkpoint, adapter: Path) -> Model:
        """The model of a base, for an adapter of PEFT."""
        said = read_json(adapter / CONFIG) if (adapter / CONFIG).exists() else {}
        auto = said.get("auto_mapping")
        name = auto.get("base_model_class") if isinstance(auto, dict) else None
        trained = name if isinstance(name, str) else CLASSES.get(str(said.get("task_type")))
        return cls(base.config_file, base.config, trained, said.get("ensure_weight_tying") is True)

    @property
    def architecture(self) -> str | None:
        """The class of the base."""
        said = (self.config or {}).get("architectures")
        return said[0] if isinstance(said, list) and said and isinstance(said[0], str) else None

    @property
    def headless(self) -> bool:
        """Whether there are no logits of tokens, as far as the names of classes say."""
        if _WITH_HEAD.search(self.trained or ""):
            return False
        return any(_HEADLESS.search(name or "") for name in (self.trained, self.architecture))

    def tie(self, files: PeftFiles, base: Checkpoint) -> Tie | None:
        """What the model ties of that which the adapter changes.

        Args:
          files: the adapter.
          base: the base, by the adapter's names.

        Raises:
          ValueError: it cannot be known, or cannot be untied.
        """
        embeddings = [n for n in base if is_vocabulary(n) and is_embedding(_module(n))]
        heads = [n for n in base if is_vocabulary(n) and is_head(_module(n))]
        # What the base lacks and is as large as its embedding is a head, however it is called.
        sizes = {base.info[name].shape for name in embeddings}
        shapes = {n.replace(".base_layer.", "."): shape for n, shape in _shapes(files).items()}
        lost = {n for n, shape in shapes.items() if n not in base and shape in sizes}
        touched = {n for n in shapes if is_vocabulary(n)} | lost
        trained_heads = sorted(n for n in touched if not is_embedding(_module(n)))
        touched = touched or self._by_size(files, base)
        if not touched:
            return None
        what = f"{files.tensors.path} changes {min(touched)!r}"
        if self.config is None:
            if heads or self.headless:
                return None
            lacks = trained_heads[0] if trained_heads else "a head"
            raise ValueError(
                f"{what}, and {base.path} lacks {lacks}, which may be tied to the embedding: give "
                f"the base's folder, with its {MODEL_CONFIG}, which says so."
            )
        if self.headless and not trained_heads:
            return None
        parts = [v for v in self.config.values() if isinstance(v, dict) and "vocab_size" in v]
        flag = [self.config, *parts][-1].get(TIED, self.config.get(TIED))
        shared = bool(self.config.get("is_encoder_decoder"))
        if flag is False and set(trained_heads) <= set(heads) and not shared:
            return None
        if shared or any(_module(n).endswith("shared") for n in embeddings):
            if flag is False and touched <= set(heads):
                return None
            raise ValueError(
                f"{what}, of an encoder and a decoder that share their embedding: PEFT's adapter "
                f"is of one of its uses, for which the merged model has no array of its own. Train "
                f"it without {', '.join(sorted({_last(n) for n in touched}))}."
            )
        if flag is False:
            raise ValueError(
                f"{what}, and {base.path} lacks {trained_heads[0]!r}, though {self.path} says that "
                f"{TIED} is false."
            )
        unknown = ValueError(
            f"{what}, which may be tied, and {base.path} has several parts, or no embedding that "
            f"is known by its name: untie it first, in transformers, and set {TIED} to false in "
            f"{self.path}."
        )
        if len(embeddings) != 1 or len(heads) > 1:
            raise unknown
        (embedding,) = embeddings
        if heads:
            same = _equal(base[heads[0]], base[embedding])
            if not same and flag is None:
                return None
            if not same:
                raise ValueError(
                    f"{what}, and {self.path} says that {TIED} is true, but {base.path} has "
                    f"another {heads[0]!r} than {embedding!r}: set {TIED} to what is right."
                )
        if parts:
            raise unknown
        if self.tying and not trained_heads and _last(embedding) == "embed_tokens":
            raise ValueError(
                f"{what}, and by ensure_weight_tying its head too, but holds nothing for the head: "
                f"save it with a PEFT that does."
            )
        known = [*trained_heads, *heads]
        return Tie(embedding, known[0] if known else self._head(base, embedding), self.tying)

    def _by_size(self, files: PeftFiles, base: Checkpoint) -> set[str]:
        """What is adapted and has a row for every token, where no name says what looks them up."""
        if self.config is None or any(is_vocabulary(name) for name in base):
            return set()
        found = {f"{m}.weight" for m, keys in files.modules.items() if "embedding" in keys["A"]}
        found = {n for n in (*found, *files.whole) if n in base and len(base.info[n].shape) == 2}
        return {n for n in found if base.info[n].shape[0] == self.config.get("vocab_size")}

    def _head(self, base: Checkpoint, embedding: str) -> str:
        """The name that a tied head has as an array of its own."""
        for before, head in _BEFORE_HEAD.items():
            if f"{before}.weight" in base:
                return f"{head}.weight"
        rows = base.info[embedding].shape[:1]
        biases = [n for n, one in base.info.items() if n.endswith(".bias") and one.shape == rows]
        lone = [_module(n) for n in biases if f"{_module(n)}.weight" not in base]
        if lone:
            return f"{lone[0]}.weight"
        causal = any(_CAUSAL.search(name or "") for name in (self.trained, self.architecture))
        model = (self.config or {}).get("model_type")
        if causal and (
            found := [n for n, types in _CAUSAL_HEADS.items() if model in types.split()]
        ):
            return f"{found[0]}.weight"
        both = f"The adapter changes {embedding!r}, which may be the head of the model too, and "
        if not causal:
            raise ValueError(
                f"{both}{self.path} does not say how that is called: name the class in its "
                f"architectures."
            )
        raise ValueError(
            f"{both}it is not known how that is called in a model of the type {model!r}, as "
            f"{self.path} says. Give the base a head of its own first, in transformers: let the "
            f"weight of get_output_embeddings() be a copy, and save it with {TIED} = false."
        )


def _shapes(files: PeftFiles) -> dict[str, tuple[int, ...]]:
    """The shape of everything that is adapted or saved, by its name, as a linear layer has it."""
    info, shapes = files.tensors.info, {}
    for module, keys in files.modules.items():
        shapes[f"{module}.weight"] = (info[keys["B"]].shape[0], info[keys["A"]].shape[1])
    return shapes | {name: info[key].shape for name, key in files.whole.items()}


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _last(name: str) -> str:
    return _module(name).rpartition(".")[2]


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(a, b)


def grown(shapes: Iterable[tuple[int, ...]], old: tuple[int, ...]) -> bool:
    """Whether arrays have more rows than one of old, and are else like it."""
    return all(len(s) == len(old) and s[1:] == old[1:] and s[0] > old[0] for s in shapes)
