"""Names with placeholders, as ``layer_{i}/query/kernel``: matched, and filled in.

``{...}`` stands for one part of a name between separators, ``{...*}`` for one or more.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def placeholders(template: str) -> tuple[str, ...]:
    """The placeholders of a template, in their order.

    Example:
      >>> placeholders("layer_{i}/{leaf*}")
      ('i', 'leaf*')
    """
    return tuple(_PLACEHOLDER.findall(template))


def match(template: str, name: str, separator: str) -> dict[str, str] | None:
    """What stands in a name for each placeholder; ``None`` if the template does not match it.

    Example:
      >>> match("layer_{i}/{path*}", "layer_3/query/kernel", "/")
      {'i': '3', 'path*': 'query/kernel'}
    """
    found = _regex(template, separator).fullmatch(name)
    if found is None:
        return None
    return dict(zip(placeholders(template), found.groups(), strict=True))


def fill(template: str, values: Mapping[str, str]) -> str:
    """The name with values for its placeholders: the inverse of :func:`match`."""
    return _PLACEHOLDER.sub(lambda found: values[found[1]], template)


@functools.lru_cache(maxsize=1024)
def _regex(template: str, separator: str) -> re.Pattern[str]:
    one = f"([^{re.escape(separator)}]+)"
    parts = _PLACEHOLDER.split(template)
    for i, part in enumerate(parts):
        is_placeholder = i % 2 == 1
        parts[i] = ("(.+)" if part.endswith("*") else one) if is_placeholder else re.escape(part)
    return re.compile("".join(parts))
