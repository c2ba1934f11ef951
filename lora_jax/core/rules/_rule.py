"""One rule: which kernels are adapted, and how."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lora_jax._deprecated import removed_fields, renamed_fields
from lora_jax.core.rules._hints import OF_A_RULE, as_glob, refuse_words
from lora_jax.core.variants._cached_norm import CachedNorm
from lora_jax.core.variants._check_variant import check_start, check_variant
from lora_jax.core.variants._dora import DoRA
from lora_jax.core.variants._lora import LoRA
from lora_jax.core.variants._registry import trained_variants, variant_of
from lora_jax.core.variants._variant import Variant

# The pattern of a rule for the kernel of every linear layer but the output heads.
ALL_LINEAR = "all-linear"


@removed_fields(product="lora_apply(..., product=...)")
@renamed_fields(
    {"tied": {"substitute": "materialize"}}, stack_axes="batch_axes", substitute="materialize"
)
@refuse_words(OF_A_RULE)
@dataclasses.dataclass(frozen=True)
class Rule:
    r"""How the kernels whose path matches ``pattern`` are adapted.

    A path is the names in ``params`` joined by ``"/"``, as in ``"encoder/query/kernel"``. The
    pattern is a regular expression for the whole path (``re.fullmatch``).

    Attributes:
      pattern: regular expression, fullmatch on the path. Or ``"all-linear"``: the kernel of every
        linear layer but the output heads, as in PEFT; for that ``lora_init`` needs the model, or
        its :func:`lora_jax.kernel_axes`. A linear layer contracts its kernel: ``nn.Dense``,
        ``nn.DenseGeneral``, ``nn.Einsum``, attention, and layers registered with ``w.einsum``;
        embeddings and convolutions are not linear layers. Output heads are the layers behind which
        the model's result has no further layer: see :attr:`lora_jax.ModelAxes.heads`.
      rank: ``r``, the width of the factors: ``U`` is ``(d, r)`` and ``V`` is ``(r, k)`` for a
        kernel of shape ``(d, k)``; ``1 <= r <= min(d, k)``.
      only: regular expressions: of the paths that the pattern matches only those that match one of
        these, as ``only=[r".*/layer_[01]/.*"]``. The layers of an ``nn.scan`` are one kernel.
      exclude: likewise, those that match none of these.
      alpha: numerator of the scale ``s``; ``rank`` by default, so that ``s`` is 1.
      variant: ``"lora"`` (Hu et al. 2021): ``W' = W + s U V``; or ``"dora"`` (Liu et al. 2024):
        ``W' = m (W + s U V) / ||W + s U V||_c``. Or one of your own, a :class:`lora_jax.Variant`,
        or the name that :func:`lora_jax.register_variant` knows it by.
      rslora: ``s = alpha / sqrt(rank)`` (Kalajdzievski 2023) instead of ``alpha / rank``.
      dropout: probability with which an input of the factors is dropped in training; see
        :func:`lora_jax.lora_apply` for when that is.
      zero: the factor that starts at zero, ``"U"`` or ``"V"``; the other one starts Gaussian.
        ``zero="V"`` is the orientation of the LoRA paper and of PEFT.
      std: standard deviation of the Gaussian factor; by default ``1 / sqrt(d)``, whichever factor
        it is, with which both train alike at the learning rates that papers use.
      detach_norm: DoRA only. Treat the column norm as a constant in the gradient (section 4.3
        of the DoRA paper, and what PEFT does). The default is the exact gradient.
      batch_axes: axes of the kernel that stack several kernels, such as the layers of an
        ``nn.scan``: ``(0,)`` for ``variable_axes={"params": 0}``. Negative ones count from the
        end. Not needed with :func:`lora_jax.kernel_axes`.
      input_axes: axes of the kernel that are contracted with the layer's input; by default the
        first one that is not a batch axis. Not needed with :func:`lora_jax.kernel_axes`.
      fused: number of kernels that lie side by side in the outputs, such as 3 where one kernel
        computes queries, keys and values; each has its own ``U`` and ``V``. They must be
        contiguous blocks of the flattened outputs, not interleaved within heads.
      parts: which of the fused kernels are adapted: ``fused=3, parts=(0, 2)`` leaves the keys
        frozen. All by default.
      materialize: put ``W'`` in place of the parameter before the model runs, instead of
        computing ``x W'`` in the layer. It is right for every parameter of every model, read by
        whatever code, but ``W'`` and its gradient are formed in full: the memory and the time of
        full fine-tuning for that parameter, and ``W'`` is rounded to the parameter's dtype.
      tied: what to do with a matched parameter that the model also reads outside of its layer, as
        tied embeddings are; :func:`lora_jax.kernel_axes` finds them. ``None``: an error.
        ``"materialize"``: as ``materialize=True``, for these parameters only, so that all uses see
        ``W'``. ``"untie"``: the layer's own use is adapted and the others keep the base; such an
        adapter cannot be merged.

    Raises:
      TypeError: if a field has the wrong type.
      ValueError: if a pattern is not a regular expression; rank or fused is below 1; dropout is
        outside of ``[0, 1)``; alpha or std is not positive and finite; variant, zero or tied is
        none of those above; a variant of your own is not what it says; or fields contradict each
        other.

    Example:
      >>> import lora_jax
      >>> rule = lora_jax.Rule(r".*/(query|value)/kernel", rank=8, alpha=16.0)
      >>> rule.scale
      2.0
    """

    pattern: str
    rank: int
    _: dataclasses.KW_ONLY
    only: Sequence[str] = ()
    exclude: Sequence[str] = ()
    alpha: float | None = None
    variant: str | Variant = "lora"
    rslora: bool = False
    dropout: float = 0.0
    zero: str = "U"
    std: float | None = None
    detach_norm: bool = False
    batch_axes: tuple[int, ...] = ()
    input_axes: tuple[int, ...] | None = None
    fused: int = 1
    parts: tuple[int, ...] | None = None
    materialize: bool = False
    tied: str | None = None

    def __post_init__(self) -> None:
        check_regex(self.pattern, "Rule")
        where = f"Rule({self.pattern!r})"
        for name, checked in _CHECKED.items():
            value = checked(getattr(self, name), f"{where}: {name}")
            object.__setattr__(self, name, value)
        _check_together(self, where)
        variant = self.as_variant()
        if type(variant) not in (LoRA, DoRA):
            check_start(variant, self)

    @property
    def scale(self) -> float:
        """``s`` of ``W + s U V``."""
        return scale(self.rank, self.alpha, self.rslora)

    def as_variant(self) -> Variant:
        """The variant, also where it is given by its name."""
        settings = {"detach_norm": True} if self.detach_norm else {}
        return variant_of(self.variant, settings)


def scale(rank: int, alpha: float | None, rslora: bool) -> float:
    """``alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA; 1 where alpha is not given."""
    if alpha is None:
        alpha = float(rank)
    return float(alpha) / (math.sqrt(rank) if rslora else rank)


def as_patterns(value: object, where: str) -> tuple[str, ...]:
    """A list of regular expressions, as a tuple.

    Args:
      value: what the user gave.
      where: the field, for messages.
    """
    if isinstance(value, str | Rule):
        name = where.removeprefix("LoraConfig(").split("=")[0].split(": ")[-1]
        raise TypeError(f"{where} is a list; write {name}=[{value!r}].")
    if not isinstance(value, Iterable):
        raise TypeError(f"{where} is a list of patterns, got {value!r}.")
    patterns = tuple(value)
    for pattern in patterns:
        check_regex(pattern, where)
    return patterns


def check_regex(pattern: object, where: str) -> None:
    """Raises an error if a pattern is not a regular expression."""
    if not isinstance(pattern, str):
        one = ""
        if isinstance(pattern, Iterable) and not isinstance(pattern, Mapping | bytes):
            one = f" Write one for all: '.*({'|'.join(map(str, pattern))})/kernel'."
        raise TypeError(f"{where}: a pattern must be a string, got {pattern!r}.{one}")
    try:
        re.compile(pattern)
    except re.error as error:
        glob = as_glob(pattern)
        raise ValueError(
            f"{where}: {pattern!r} is not a valid regular expression: {error}."
            + (f" Was it meant as a glob? Then write {glob!r}." if glob != pattern else "")
        ) from error


# --- each field alone: the value as it is kept, or an error ---


def _count(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{where} must be an int, got {value!r}.")
    if value < 1:
        raise ValueError(f"{where} must be at least 1, got {value}.")
    return int(value)


def _check_number(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{where} must be a number, got {value!r}.")


def _positive(value: Any, where: str, *, default: str) -> Any:
    if value is None:
        return None
    _check_number(value, where)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"{where} must be positive and finite, got {value}. Leave it out for {default}."
        )
    return value


def _rate(value: Any, where: str) -> Any:
    _check_number(value, where)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{where} must be in [0, 1), got {value}.")
    return value


def _bool(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{where} must be a bool, got {value!r}.")
    return value


def _ints(value: Any, where: str) -> tuple[int, ...] | None:
    try:
        return None if value is None else tuple(map(operator.index, value))
    except TypeError:
        raise TypeError(f"{where} must be a tuple of ints, got {value!r}.") from None


def _one_of(value: Any, where: str, *, choices: tuple[Any, ...], words: str) -> Any:
    if value not in choices:
        raise ValueError(f"{where} must be {words}, got {value!r}.")
    return value


def _variant(value: Any, where: str) -> Any:
    if isinstance(value, Variant):
        check_variant(value)
        if isinstance(value, CachedNorm):
            raise ValueError(f"{where}: an adapter of cache_norm is not trained.")
        return value
    trained = list(trained_variants())
    if value not in trained:
        if isinstance(value, type) and issubclass(value, Variant):
            raise TypeError(f"{where} must be an instance: variant={value.__name__}().")
        same = [name for name in trained if name == str(value).lower()]
        raise ValueError(
            f"{where.removesuffix(': variant')}: there is no variant {value!r}; there are "
            f"{trained}."
            + (f" Did you mean {same[0]!r}?" if same else "")
            + " One of your own is given as an object, or registered: "
            "lora_jax.register_variant(MyVariant)."
        )
    return value


_CHECKED: dict[str, Callable[[Any, str], Any]] = {
    "only": as_patterns,
    "exclude": as_patterns,
    "rank": _count,
    "fused": _count,
    "alpha": functools.partial(_positive, default="the scale 1"),
    "std": functools.partial(_positive, default="1 / sqrt(d)"),
    "dropout": _rate,
    "rslora": _bool,
    "detach_norm": _bool,
    "materialize": _bool,
    "variant": _variant,
    "zero": functools.partial(_one_of, choices=("U", "V"), words="'U' or 'V'"),
    "batch_axes": _ints,
    "input_axes": _ints,
    "parts": _ints,
    "tied": functools.partial(
        _one_of, choices=(None, "materialize", "untie"), words="'materialize', 'untie' or None"
    ),
}


# --- the fields together ---


def _check_together(rule: Rule, where: str) -> None:
    """Raises ValueError if fields contradict each other."""
    if rule.detach_norm and not (isinstance(rule.variant, str) and rule.variant == "dora"):
        raise ValueError(
            f"{where}: detach_norm is for variant='dora'; LoRA has no norm, and a variant that is "
            f"given as an object has its own settings."
        )
    if rule.parts is not None and not (
        rule.parts
        and all(0 <= part < rule.fused for part in rule.parts)
        and len(set(rule.parts)) == len(rule.parts)
    ):
        raise ValueError(
            f"{where}: parts must be some of 0 to {rule.fused - 1}, each once, as fused is "
            f"{rule.fused}; got {rule.parts}."
        )
    if rule.materialize and rule.tied == "untie":
        raise ValueError(
            f"{where}: tied='untie' adapts one use of a parameter, materialize=True all of them."
        )
    if rule.dropout:
        _check_dropout(rule, where)


def _check_dropout(rule: Rule, where: str) -> None:
    """Raises ValueError if the rule has dropout where the factors have no input of their own."""
    if rule.materialize:
        raise ValueError(
            f"{where}: materialize=True has no dropout, as the factors have no input of their "
            f"own: W' stands in place of the parameter."
        )
    if rule.tied == "materialize":
        raise ValueError(
            f"{where}: tied='materialize' would materialize W' for some parameters, where "
            f"there can be no dropout. Give tied parameters a rule of their own, with "
            f"dropout=0."
        )
