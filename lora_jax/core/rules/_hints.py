"""What the likeliest mistakes are told: other libraries' words, and the pattern that was meant."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

# What PEFT, qwix and others call what a rule says here.
OF_A_RULE = {
    "r": "rank=",
    "lora_rank": "rank=",
    "lora_alpha": "alpha=",
    "lora_dropout": "dropout=",
    "use_dora": "variant='dora'",
    "use_rslora": "rslora=True",
    "init_lora_weights": "zero= and std=",
    "target_modules": "the pattern, a regular expression for whole paths or 'all-linear'",
    "module_path": "the pattern, a regular expression for whole paths",
    "exclude_modules": "exclude=, a list of patterns",
    "layers_to_transform": "only=, a list of patterns such as '.*layer_[01]/.*'",
    "modules_to_save": "LoraConfig(trainable=...), a list of patterns",
}

# Names that models give to one layer.
_SYNONYMS = (
    ("query", "q_proj", "q", "wq", "q_lin"),
    ("key", "k_proj", "k", "wk", "k_lin"),
    ("value", "v_proj", "v", "wv", "v_lin"),
    ("out", "o_proj", "out_proj", "o", "wo", "out_lin", "output"),
    ("up_proj", "fc1", "c_fc", "fc_in", "intermediate", "wi", "up"),
    ("down_proj", "fc2", "c_proj", "fc_out", "down"),
    ("gate_proj", "gate"),
    ("head", "lm_head", "classifier", "score"),
    ("kernel", "weight"),
)


def look_first(look: Callable[..., None]) -> Callable[[F], F]:
    """A decorator: ``look`` sees the arguments before Python binds them, and may raise.

    The signature stays what it is, for ``help``, for ``inspect`` and for type checkers.

    Example:
      >>> def no_strings(*args):
      ...     if any(isinstance(arg, str) for arg in args):
      ...         raise TypeError("numbers only")
      >>> @look_first(no_strings)
      ... def double(x: int) -> int:
      ...     return 2 * x
      >>> double(3)
      6
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def looked(*args: Any, **kwargs: Any) -> Any:
            look(*args, **kwargs)
            return function(*args, **kwargs)

        return cast(F, looked)

    return decorate


def refuse_words(words: Mapping[str, str], lead: str = "") -> Callable[[type[T]], type[T]]:
    """A class decorator: these keywords are not fields, and the error says what to write instead.

    Args:
      words: for each keyword what to write instead; empty where ``lead`` says it.
      lead: the first words of the advice.

    Example:
      >>> @refuse_words({"r": "rank="})
      ... class Adapter:
      ...     def __init__(self, rank):
      ...         self.rank = rank
      >>> Adapter(r=8)
      Traceback (most recent call last):
      TypeError: Adapter has no r. Here r is rank=.
    """

    def decorate(cls: type[T]) -> type[T]:
        def look(_: T, *args: Any, **kwargs: Any) -> None:
            del args
            if unknown := [name for name in kwargs if name in words]:
                advice = "; ".join(f"{name} is {words[name]}" for name in unknown if words[name])
                raise TypeError(
                    f"{cls.__name__} has no {', '.join(unknown)}. Here {lead}"
                    f"{': ' if lead and advice else ''}{advice}."
                )

        setattr(cls, "__init__", look_first(look)(cls.__init__))  # noqa: B010  (mypy)
        return cls

    return decorate


def key_comes_first(call: str) -> Callable[..., None]:
    """For :func:`look_first`: raises TypeError for parameters in the place of the random key.

    Args:
      call: how the function is called, for the message.
    """

    def look(*args: Any, **kwargs: Any) -> None:
        key = args[0] if args else kwargs.get("key")
        if isinstance(key, Mapping) or hasattr(key, "params") or hasattr(key, "apply"):
            raise TypeError(
                f"A random key comes first, {call}, as key = jax.random.key(0); got "
                f"{type(key).__name__}."
            )

    return look


def as_glob(pattern: str) -> str:
    """The regular expression for what was meant as a glob, or with dots between the names.

    Example:
      >>> as_glob("*.kernel"), as_glob("encoder/*/kernel"), as_glob("encoder.layer_0.query")
      ('.*/kernel', 'encoder/.*/kernel', 'encoder/layer_0/query')
    """
    slashes = re.sub(r"\\?\.(?![*+?{])", "/", pattern)
    return re.sub(r"(?<![.)\]\\*])\*+", ".*", slashes)


def meant(pattern: str, paths: Sequence[str], leaves: str = "kernel") -> tuple[str, list[str]]:
    """The pattern that was probably meant, and the paths that it does match.

    Args:
      pattern: a pattern that matches none of the paths.
      paths: every path.
      leaves: a regular expression for the leaves that the pattern shall find in a module.

    Returns:
      A pattern and its matches; ``("", [])`` if none is found that matches something.

    Example:
      >>> meant("query", ["encoder/query/kernel", "encoder/query/bias"])
      ('.*query/kernel', ['encoder/query/kernel'])
    """
    for base in _readings(pattern, paths):
        for whole_path in _for_whole_paths(base, leaves):
            try:
                found = [path for path in paths if re.fullmatch(whole_path, path)]
            except re.error:
                continue
            if found:
                return whole_path, found
    return "", []


def _readings(pattern: str, paths: Sequence[str]) -> Iterator[str]:
    """What the pattern may have been meant to say, the likeliest first."""
    parts = {part for path in paths for part in path.split("/")}
    for one in dict.fromkeys((as_glob(pattern), pattern)):
        for base in (one, re.sub(r"^(\.\*)?/?(params/)?|/$", "", one)):
            yield base
            yield _renamed(base, parts)


def _renamed(pattern: str, parts: Iterable[str]) -> str:
    """The pattern with the model's names in place of those that it does not have."""
    there = sorted(parts)

    def name(match: re.Match[str]) -> str:
        word = match[0]
        others = [s for group in _SYNONYMS if word in group for s in group if s in there]
        if word in there or (not others and any(word in part for part in there)):
            return word
        others = others or difflib.get_close_matches(word, there, n=1, cutoff=0.7) or [word]
        return others[0] if len(others) == 1 else f"({'|'.join(others)})"

    return re.sub(r"(?<!\\)[A-Za-z_]\w*", name, pattern)


def _for_whole_paths(base: str, leaves: str) -> Iterator[str]:
    """Patterns for whole paths, the narrowest first."""
    if "|" in base and not re.fullmatch(r"\([^()]*\)", base):
        base = f"({base})"
    anywhere = base if base.startswith(".*") else f".*{base}"
    if base.endswith(".*"):  # all of a module
        yield f"{anywhere}{leaves}"
    yield from (base, anywhere, f"{base}/{leaves}", f"{anywhere}/{leaves}")
    yield from (f"{anywhere}/.*{leaves}", f"{anywhere}.*/{leaves}", rf"{anywhere}/\w+")
