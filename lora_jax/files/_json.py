"""JSON from strangers, read strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_jax.files._bytes import open_regular

MAX_JSON = 32 * 2**20
"""Bytes of JSON that are read at most: enough for the header of 100,000 tensors."""


def parse_json(content: bytes, what: str) -> Any:
    """JSON as its standard has it: no duplicate keys, no NaN.

    Raises:
      ValueError: if it is not; the message says where.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, value in items:
            if name in out:
                raise ValueError(f"the key {name!r} is there twice")
            out[name] = value
        return out

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not a number of JSON")

    try:
        return json.loads(content.decode(), object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError:
        raise ValueError(f"{what} cannot be read: it is nested too deep.") from None
    except ValueError as error:
        raise ValueError(f"{what} cannot be read: {error}. Is it truncated?") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file, as :func:`parse_json` has it."""
    with open_regular(path) as file:
        content = file.read(MAX_JSON + 1)
    if len(content) > MAX_JSON:
        raise ValueError(f"{path} has more than {MAX_JSON} bytes.")
    return parse_json(content, str(path))


def json_bytes(content: Any) -> bytes:
    """Content as JSON that people can read."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
