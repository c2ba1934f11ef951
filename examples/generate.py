"""Texts from a language model with a cache, one token of all rows at a time."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from examples.smollm2 import SmolLM2, empty_cache


def pad(rows: Sequence[Sequence[int]], multiple: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of all rows, ``(batch, length)``, padded on the right, and their lengths.

    The length is a multiple of a number, so that few of them are compiled.
    """
    lengths = np.array([len(row) for row in rows], np.int32)
    length = -(-int(lengths.max()) // multiple) * multiple
    tokens = np.zeros((len(rows), length), np.int32)
    for to, row in zip(tokens, rows, strict=True):
        to[: len(row)] = row
    return tokens, lengths


@functools.partial(jax.jit, static_argnames="apply", donate_argnames="cache")
def step(
    apply: Any, variables: Any, cache: Any, tokens: jax.Array, lengths: jax.Array
) -> tuple[Any, jax.Array]:
    """Reads tokens, ``(batch, length)``; the cache, and the likeliest next tokens, ``(batch,)``.

    Args:
      apply: a function of ``variables`` with a cache, tokens and lengths, which returns logits and
        what has changed. It is compiled once, so pass the same one each time.
      variables: what it is called with, but for the cache; here it is whatever the function takes.
      cache: of the tokens before these. It is donated.
      tokens: new ones, padded on the right.
      lengths: how many of each row are real.
    """
    logits, changed = apply(variables, cache, tokens, lengths)
    return changed["cache"], logits.argmax(-1)


def greedy(
    model: SmolLM2,
    apply: Any,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    end: int,
    most: int,
) -> list[list[int]]:
    """The likeliest token after the others, until there is an end or there are ``most``.

    Args:
      model: whose cache it is.
      apply: as for `step`.
      variables: as for `step`.
      prompts: tokens of each row.
      end: the token that ends an answer; it is left out.
      most: how many tokens an answer can have.

    Raises:
      ValueError: if the longest prompt and its answer do not fit in the cache.
    """
    tokens, lengths = pad(prompts)
    if (needed := int(lengths.max()) + most) > model.config.positions:
        raise ValueError(
            f"A prompt of {lengths.max()} tokens and an answer of {most} need {needed} positions, "
            f"and the cache has {model.config.positions}: use Config(positions=...)."
        )
    cache, last = step(apply, variables, empty_cache(model, len(prompts)), tokens, lengths)
    answers: list[list[int]] = [[] for _ in prompts]
    running = np.ones(len(prompts), np.int32)
    while True:
        last = np.asarray(last)
        running &= last != end
        for row in np.flatnonzero(running):
            answers[row].append(int(last[row]))
        running &= [len(answer) < most for answer in answers]
        if not running.any():
            return answers
        cache, last = step(apply, variables, cache, last[:, None], running)
