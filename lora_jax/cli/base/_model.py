"""What is known of the model that a base is of: its config, and the classes of transformers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.files._checkpoint import Checkpoint
from lora_jax.files._json import read_json
from lora_jax.peft.config._module_config import CONFIG

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
        content = read_json(adapter / CONFIG) if (adapter / CONFIG).exists() else {}
        auto = content.get("auto_mapping")
        name = auto.get("base_model_class") if isinstance(auto, dict) else None
        trained = name if isinstance(name, str) else CLASSES.get(str(content.get("task_type")))
        return cls(
            base.config_file, base.config, trained, content.get("ensure_weight_tying") is True
        )

    @property
    def architecture(self) -> str | None:
        """The class of the base."""
        match (self.config or {}).get("architectures"):
            case [str(name), *_]:
                return name
        return None

    @property
    def headless(self) -> bool:
        """Whether there are no logits of tokens, as far as the names of classes say."""
        if _WITH_HEAD.search(self.trained or ""):
            return False
        return any(_HEADLESS.search(name or "") for name in (self.trained, self.architecture))

    @property
    def trained_class(self) -> str | None:
        """The class that the adapter was trained in, as far as it can be known."""
        name = self.trained
        if name is not None and name in CLASSES.values():  # only how it ends
            known = re.match(
                r"(.+?)(?:For[A-Z]\w*|(?:LMHead|DoubleHeads)?Model)$", self.architecture or ""
            )
            name = known[1] + name if known else None
        return name
