"""Patterns of module names in PEFT's config: matched safely, and written for values by module."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any


def first_match(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    r"""The value of the first pattern that matches a module, as PEFT: ``(.*\.)?(pattern)$``."""
    for pattern, value in patterns.items():
        if pattern == module or compiled(pattern, r"(.*\.)?({})$").match(module):
            return value
    return default


def by_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, and patterns for the modules that have another one.

    A pattern is the module's name, and anchored where names alone would match another module too.
    """
    common = Counter(values.values()).most_common(1)[0][0]
    # In the order in which they are written.
    others = {module: values[module] for module in sorted(values) if values[module] != common}
    for start, escaped in (("", str), ("^", re.escape)):
        patterns = dict(sorted((start + escaped(m), value) for m, value in others.items()))
        if all(first_match(patterns, m, common) == value for m, value in values.items()):
            break
    return common, patterns


# What a pattern may be made of: names, classes, groups and lookarounds, and at most three
# repetitions, none of a group: nothing that could take longer than the cube of a name's length.
_TOKEN = re.compile(
    r"""(?P<group>\((?:\?(?:[:=!]|<[=!]))?)
    |(?P<optional>\)(?:\?|\{0,1\})\??)
    |(?P<repetition>(?:[*+?]|\{\d{1,2}(?:,\d{0,2})?\})\??)
    |\\[.\-dwDWsSbB]|\[\^?(?:[\w\-.]|\\[.\-dwDWsS])+\]|[\w\-.^$|)]""",
    re.VERBOSE,
)


def _is_simple(pattern: str) -> bool:
    """Whether a pattern is of that kind."""
    at, before, counts = 0, "", Counter[str | None]()
    while at < len(pattern):
        found = _TOKEN.match(pattern, at)
        if not found or (found.lastgroup == "repetition" and before.startswith(")")):
            return False
        counts[found.lastgroup] += 1
        at, before = found.end(), found[0]
    repetitions = counts["repetition"] + counts["optional"]
    return len(pattern) <= 2000 and repetitions <= 3 and counts["group"] <= 4


def compiled(pattern: str, template: str) -> re.Pattern[str]:
    """The regular expression of a template with a pattern in place of ``{}``.

    Raises:
      ValueError: if the pattern is too complex, or is not a regular expression.
    """
    if not _is_simple(pattern):
        raise ValueError(
            f"The pattern {pattern[:200]!r} is too complex to be matched safely: only names, "
            f"classes, four groups and three repetitions are, and of a group none but '?'."
        )
    try:
        return re.compile(template.replace("{}", pattern))
    except re.error as error:
        raise ValueError(
            f"The pattern {pattern[:200]!r} is not a regular expression: {error}."
        ) from None
