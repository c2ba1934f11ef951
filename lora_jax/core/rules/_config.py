"""What the user says: the rules of what is adapted, and the leaves that are fully trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from lora_jax.core.rules._hints import OF_A_RULE, refuse_words
from lora_jax.core.rules._rule import Rule, as_patterns

# Words that are a rule's, and what the error says of them.
_IN_A_RULE = {
    **OF_A_RULE,
    **{field.name: "" for field in dataclasses.fields(Rule)},
    "modules_to_save": "trainable=, a list of patterns",
}


@refuse_words(_IN_A_RULE, "a rule says it, LoraConfig([Rule(pattern, rank=8)])")
@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which leaves of a parameter tree are adapted, and which are fully trained.

    Attributes:
      rules: for each leaf the first rule that matches wins; a leaf that no rule matches stays
        frozen.
      trainable: regular expressions (fullmatch on the path) of leaves that are fully trained,
        such as a new head. They are exceptions to the rules: a leaf that is matched by both is
        fully trained.

    Raises:
      TypeError: if a rule is not a :class:`Rule`, or a pattern is not a string.
      ValueError: if a pattern is not a regular expression, or there is nothing to train.

    Example:
      >>> import lora_jax
      >>> config = lora_jax.LoraConfig(
      ...     rules=[
      ...         lora_jax.Rule(r".*/(query|value)/kernel", rank=8, variant="dora"),
      ...         lora_jax.Rule(r".*/kernel", rank=4),
      ...     ],
      ...     trainable=[r"classifier/.*"],
      ... )
    """

    rules: Sequence[Rule] = ()
    trainable: Sequence[str] = ()

    def __post_init__(self) -> None:
        rules: object = self.rules
        if isinstance(rules, Rule):
            raise TypeError(f"LoraConfig(rules=...) is a list; write rules=[{rules!r}].")
        if isinstance(rules, str | Mapping) or not isinstance(rules, Iterable):
            raise TypeError(
                f"LoraConfig(rules=...) is a list of Rules, got {rules!r}; write "
                f"rules=[Rule({_example(rules)!r}, rank=8)]."
            )
        object.__setattr__(self, "rules", tuple(rules))
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise TypeError(
                    f"LoraConfig(rules=...) holds {rule!r}, which is not a Rule; write "
                    f"rules=[Rule({_example(rule)!r}, rank=8)]."
                )
        trainable = as_patterns(self.trainable, "LoraConfig(trainable=...)")
        object.__setattr__(self, "trainable", trainable)
        if not self.rules and not self.trainable:
            raise ValueError("LoraConfig() would train nothing: give it rules or trainable.")


def check_config(config: object) -> None:
    """Raises TypeError if a config is not a :class:`LoraConfig`."""
    if not isinstance(config, LoraConfig):
        raise TypeError(
            f"config must be a LoraConfig, got {type(config).__name__}; write "
            f"lora_jax.LoraConfig([lora_jax.Rule('.*/kernel', rank=8)])."
        )


def _example(pattern: object) -> str:
    return pattern if isinstance(pattern, str) else ".*/kernel"
