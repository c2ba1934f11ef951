"""Which rule each path has: patterns against the paths of a tree, and the words of their errors."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from lora_jax.core._model_axes import ModelAxes
from lora_jax.core.rules._config import LoraConfig
from lora_jax.core.rules._hints import meant
from lora_jax.core.rules._rule import ALL_LINEAR, Rule


def assign(
    config: LoraConfig, paths: Sequence[str], axes: object = None
) -> tuple[dict[str, Rule], set[str]]:
    """Says which rule each path has, and which paths are fully trained.

    Args:
      config: the user's rules and trainable patterns.
      paths: every path of the parameter tree.
      axes: what is known of the model, for rules for ``"all-linear"``.

    Returns:
      ``({path: rule}, {path, ...})``, without a path in both.

    Raises:
      ValueError: if a pattern matches nothing, or a rule never wins. The message names the pattern
        and the nearest paths.
    """
    trainable: dict[str, str] = {}
    for pattern in config.trainable:
        matched = matching(pattern, paths)
        if not matched:
            what = f"trainable pattern {pattern!r}"
            raise ValueError(matches_nothing(what, pattern, paths, leaves=".*"))
        trainable |= dict.fromkeys(matched, f"trainable pattern {pattern!r}")
    owners = dict(trainable)
    rules: dict[str, Rule] = {}
    for rule in config.rules:
        matched = matched_by(rule, paths, axes)
        won = [path for path in matched if path not in owners]
        if not won:
            raise ValueError(_never_wins(rule, {path: owners[path] for path in matched}))
        if rule.pattern == ALL_LINEAR and isinstance(axes, ModelAxes):
            _check_heads(axes, won)
        rules |= dict.fromkeys(won, rule)
        owners |= dict.fromkeys(won, f"Rule({rule.pattern!r})")
    return rules, set(trainable)


def matched_by(rule: Rule, paths: Sequence[str], axes: object = None) -> list[str]:
    """The paths that a rule matches, also those that an earlier rule has won.

    Raises:
      ValueError: if there are none, or one of its patterns matches nothing.
    """
    where = f"Rule({rule.pattern!r})"
    if rule.pattern == ALL_LINEAR:
        if not isinstance(axes, ModelAxes):
            raise ValueError(
                f"{where}: which layers are linear is known from the model only. Use "
                f"lora_jax.lora_init_model(key, model, variables, config, *args), or pass "
                f"axes=lora_jax.kernel_axes(model, variables, *args)."
            )
        matched = [path for path in paths if path in axes.linear and path not in axes.heads]
        if not matched:
            heads = ", ".join(sorted(axes.heads)) or "none"
            raise ValueError(
                f"{where} matches nothing: the model has no linear layer that is known here, but "
                f"output heads: {heads}. Write a pattern for what shall be adapted; for a layer of "
                f"your own register a handler, lora_jax.register."
            )
    else:
        matched = matching(rule.pattern, paths)
        if not matched:
            raise ValueError(matches_nothing(where, rule.pattern, paths))
    for name, patterns in (("only", rule.only), ("exclude", rule.exclude)):
        for pattern in patterns:
            if not matching(pattern, paths):
                what = f"{where}: {name}={pattern!r}"
                raise ValueError(matches_nothing(what, pattern, paths, leaves=".*"))
    left = [
        path
        for path in matched
        if (not rule.only or any(re.fullmatch(pattern, path) for pattern in rule.only))
        and not any(re.fullmatch(pattern, path) for pattern in rule.exclude)
    ]
    if not left:
        raise ValueError(
            f"{where} matches nothing, as only={rule.only} and exclude={rule.exclude} leave none "
            f"of {', '.join(matched[:4])}{', ...' if len(matched) > 4 else ''}."
        )
    return left


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    """The paths that a pattern matches as a whole."""
    fullmatch = re.compile(pattern).fullmatch
    return [path for path in paths if fullmatch(path)]


def matches_nothing(what: str, pattern: str, paths: Sequence[str], leaves: str = "kernel") -> str:
    """The message for a pattern that matches nothing.

    Args:
      what: it is a pattern of.
      pattern: the pattern.
      paths: those that are there.
      leaves: what is tried in the place of the pattern's last part.
    """
    suggested, found = meant(pattern, paths, leaves)
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    hint = f"Did you mean {suggested!r}? It matches {found[0]!r}{more}. " if found else ""
    if not found and re.sub(r"\W|_", "", pattern).lower() in ("alllinear", "linear"):
        hint = f"Did you mean {ALL_LINEAR!r}? "
    return (
        f"{what} matches no parameter. Patterns are regular expressions that must match a whole "
        f"path. {hint}Nearest paths: {', '.join(nearest_paths(pattern, paths)) or 'none'}."
    )


def _check_heads(axes: ModelAxes, paths: Iterable[str]) -> None:
    """Raises ValueError if it cannot be known whether a layer is an output head."""
    unsure = [path for path in paths if path in axes.unsure]
    if unsure:
        raise ValueError(
            f"Rule({ALL_LINEAR!r}): whether {', '.join(map(repr, unsure))} is the kernel of an "
            f"output head, which would stay frozen, cannot be known, as the model computes more "
            f"behind it. Add exclude={[re.escape(path) for path in unsure]}, and to adapt it, a "
            f"rule of its own."
        )


def _never_wins(rule: Rule, owners: Mapping[str, str]) -> str:
    some = [f"{path!r} has {owner}" for path, owner in list(owners.items())[:3]]
    more = f" and {len(owners) - 3} more" if len(owners) > 3 else ""
    if all(owner.startswith("trainable") for owner in owners.values()):
        advice = "Those leaves would be both adapted and fully trained: remove one of the two"
    else:
        advice = "The first match wins: put the more special rule first, or remove this one"
    return f"Rule({rule.pattern!r}) never has a leaf of its own: {'; '.join(some)}{more}. {advice}."


def nearest_paths(pattern: str, paths: Iterable[str], count: int = 4) -> list[str]:
    """The paths most like a pattern, for an error message; first those that contain it.

    Example:
      >>> nearest_paths(r".*/qeury/kernel", ["encoder/query/kernel", "head/bias"], count=1)
      ['encoder/query/kernel']
    """
    literal = re.sub(r"\\(.)", r"\1", re.sub(r"\.[*+]|[()^$?\[\]{}]", "", pattern))

    def likeness(path: str) -> tuple[bool, float]:
        return literal in path, difflib.SequenceMatcher(None, literal, path).ratio()

    return sorted(paths, key=likeness, reverse=True)[:count]
