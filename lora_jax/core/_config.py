"""What the user says: which parameters are adapted and how, and which are fully trained."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import operator
import re
from collections.abc import Iterable, Mapping, Sequence

from lora_jax._renamed import renamed_fields
from lora_jax.core._axes import ModelAxes
from lora_jax.core._hints import OF_A_RULE, as_glob, meant, refuse_words
from lora_jax.core._variants import VARIANTS

ALL_LINEAR = "all-linear"


@renamed_fields(
    {"product": {"merged": "dense"}, "tied": {"substitute": "materialize"}},
    stack_axes="batch_axes",
    substitute="materialize",
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
        embeddings and convolutions are none. Output heads are the layers behind which the model's
        result has no further layer: see :attr:`lora_jax.ModelAxes.heads`.
      rank: ``r``, the width of the factors: ``U`` is ``(d, r)`` and ``V`` is ``(r, k)`` for a
        kernel of shape ``(d, k)``; ``1 <= r <= min(d, k)``.
      only: regular expressions: of the paths that the pattern matches only those that match one of
        these, as ``only=[r".*/layer_[01]/.*"]``. The layers of an ``nn.scan`` are one kernel.
      exclude: likewise, those that match none of these.
      alpha: numerator of the scale ``s``; ``rank`` by default, so that ``s`` is 1.
      variant: ``"lora"`` (Hu et al. 2021): ``W' = W + s U V``; or ``"dora"`` (Liu et al. 2024):
        ``W' = m (W + s U V) / ||W + s U V||_c``.
      rslora: ``s = alpha / sqrt(rank)`` (Kalajdzievski 2023) instead of ``alpha / rank``.
      dropout: probability with which an input of the factors is dropped in training; see
        :func:`lora_jax.lora_apply` for when that is.
      zero: the factor that starts at zero, ``"U"`` or ``"V"``; the other one starts Gaussian.
        ``zero="V"`` is the orientation of the LoRA paper and of PEFT.
      std: standard deviation of the Gaussian factor. By default ``1 / sqrt(d)`` for both: see
        :func:`lora_jax.core._adapter.default_std`.
      detach_norm: DoRA only. Treat the column norm as a constant in the gradient (section 4.3
        of the DoRA paper, and what PEFT does). The default is the exact gradient.
      batch_axes: axes of the kernel that only stack several kernels, such as the layers of an
        ``nn.scan``: ``(0,)`` for ``variable_axes={"params": 0}``. Negative ones count from the
        end. Not needed with :func:`lora_jax.kernel_axes`.
      input_axes: axes of the kernel that are contracted with the layer's input; by default the
        first one that is no stack axis. Not needed with :func:`lora_jax.kernel_axes`.
      fused: number of kernels that lie side by side in the outputs, such as 3 where one kernel
        computes queries, keys and values; each has ``U`` and ``V`` of its own. They must be whole
        blocks of the flattened outputs, one after another, not interleaved within heads.
      parts: which of the fused kernels are adapted: ``fused=3, parts=(0, 2)`` leaves the keys
        frozen. All by default.
      materialize: put ``W'`` in place of the parameter before the model runs, instead of
        computing ``x W'`` in the layer. It is right for every parameter of every model, read by
        whatever code, but ``W'`` and its gradient are formed in full: the memory and the time of
        full fine-tuning for that parameter, and ``W'`` is rounded to the parameter's dtype.
      tied: what to do with a matched parameter that the model also reads outside of its layer, as
        tied embeddings are, which :func:`lora_jax.kernel_axes` finds. ``None``: an error.
        ``"materialize"``: as ``materialize=True``, for these parameters only, so that all uses see
        ``W'``. ``"untie"``: the layer's own use is adapted and the others keep the base; such an
        adapter cannot be merged.
      product: how the layer computes ``x W'``: ``"factored"``, ``x W + s (x U) V``; ``"outer"``,
        the same as ``x W + s sum_r (x U)_r V_r``, meant for TPUs and small ranks; ``"dense"``,
        ``x (W + s U V)``, which rounds small updates away in 16 bits and is refused there;
        or ``"auto"``: dense where that is exact and faster, else factored. Outputs and gradients
        are the same to rounding. (Second derivatives in a magnitude of zero need
        ``"factored"`` or ``"outer"``.)

    Raises:
      TypeError: a field of the wrong type.
      ValueError: a pattern that is no regular expression, a rank below 1, a variant or a factor
        that does not exist, a dropout outside ``[0, 1)``, an alpha or std that is not positive,
        fields that contradict each other.

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
    variant: str = "lora"
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
    product: str = "auto"

    def __post_init__(self) -> None:
        _check_regex(self.pattern, "Rule")
        where = f"Rule({self.pattern!r})"
        for name in ("only", "exclude"):
            object.__setattr__(self, name, _patterns(getattr(self, name), f"{where}: {name}"))
        for name in ("rank", "fused"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise TypeError(f"{where}: {name} must be an int, got {value!r}.")
            if value < 1:
                raise ValueError(f"{where}: {name} must be at least 1, got {value}.")
            object.__setattr__(self, name, int(value))
        for name in ("alpha", "std", "dropout"):
            value = getattr(self, name)
            optional = value is None and name != "dropout"
            if not optional and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
                raise TypeError(f"{where}: {name} must be a number, got {value!r}.")
        for name in ("alpha", "std"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                default = "the scale 1" if name == "alpha" else "1 / sqrt(d)"
                raise ValueError(
                    f"{where}: {name} must be positive and finite, got {value}. Leave it out for "
                    f"{default}."
                )
        for name in ("rslora", "detach_norm", "materialize"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{where}: {name} must be a bool, got {getattr(self, name)!r}.")
        trained = sorted(name for name, variant in VARIANTS.items() if variant.trained)
        if self.variant not in trained:
            same = [name for name in trained if name == str(self.variant).lower()]
            raise ValueError(
                f"{where}: there is no variant {self.variant!r}; there are {trained}."
                + (f" Did you mean {same[0]!r}?" if same else "")
            )
        if self.zero not in ("U", "V"):
            raise ValueError(f"{where}: zero must be 'U' or 'V', got {self.zero!r}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"{where}: dropout must be in [0, 1), got {self.dropout}.")
        if self.detach_norm and self.variant != "dora":
            raise ValueError(f"{where}: detach_norm is for variant='dora'; LoRA has no norm.")
        for name in ("batch_axes", "input_axes", "parts"):
            value = getattr(self, name)
            try:
                ints = None if value is None else tuple(map(operator.index, value))
            except TypeError:
                raise TypeError(
                    f"{where}: {name} must be a tuple of ints, got {value!r}."
                ) from None
            object.__setattr__(self, name, ints)
        if self.parts is not None and not (
            self.parts
            and all(0 <= part < self.fused for part in self.parts)
            and len(set(self.parts)) == len(self.parts)
        ):
            raise ValueError(
                f"{where}: parts must be some of 0 to {self.fused - 1}, each once, as fused is "
                f"{self.fused}; got {self.parts}."
            )
        if self.materialize and self.dropout:
            raise ValueError(
                f"{where}: materialize=True has no dropout, as the factors have no input of their "
                f"own: W' stands in place of the parameter."
            )
        if self.tied not in (None, "materialize", "untie"):
            raise ValueError(
                f"{where}: tied must be 'materialize', 'untie' or None, got {self.tied!r}."
            )
        if self.product not in (ways := ("auto", "factored", "outer", "dense")):
            raise ValueError(f"{where}: product must be one of {ways}, got {self.product!r}.")
        if self.materialize and self.product != "auto":
            raise ValueError(
                f"{where}: with materialize=True the layer computes with W' as it is, so that "
                f"there is no product={self.product!r} to choose; leave it out."
            )
        if self.product == "dense" and self.dropout:
            raise ValueError(
                f"{where}: product='dense' has no dropout, as the factors have no input of their "
                f"own."
            )
        if self.materialize and self.tied == "untie":
            raise ValueError(
                f"{where}: tied='untie' adapts one use of a parameter, materialize=True all of "
                "them."
            )
        if self.tied == "materialize" and self.dropout:
            raise ValueError(
                f"{where}: tied='materialize' would materialize W' for some parameters, where "
                f"there can be no dropout. Give tied parameters a rule of their own, with "
                "dropout=0."
            )

    @property
    def scale(self) -> float:
        """``s`` of ``W + s U V``."""
        return scale(self.rank, self.alpha, self.rslora)


def scale(rank: int, alpha: float | None, rslora: bool) -> float:
    """``alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA; 1 where alpha is not given."""
    if alpha is None:
        alpha = float(rank)
    return float(alpha) / (math.sqrt(rank) if rslora else rank)


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
      TypeError: a rule that is no :class:`Rule`, a pattern that is no string.
      ValueError: a pattern that is no regular expression; nothing to train.

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
                    f"LoraConfig(rules=...) holds {rule!r}, which is no Rule; write "
                    f"rules=[Rule({_example(rule)!r}, rank=8)]."
                )
        whole = _patterns(self.trainable, "LoraConfig(trainable=...)")
        object.__setattr__(self, "trainable", whole)
        if not self.rules and not self.trainable:
            raise ValueError("LoraConfig() would train nothing: give it rules or trainable.")


def check_config(config: object) -> None:
    """Errors where a config is none."""
    if not isinstance(config, LoraConfig):
        raise TypeError(
            f"config must be a LoraConfig, got {type(config).__name__}; write "
            f"lora_jax.LoraConfig([lora_jax.Rule('.*/kernel', rank=8)])."
        )


def _example(pattern: object) -> str:
    return pattern if isinstance(pattern, str) else ".*/kernel"


def _patterns(value: object, where: str) -> tuple[str, ...]:
    """A list of patterns."""
    if isinstance(value, str | Rule):
        name = where.removeprefix("LoraConfig(").split("=")[0].split(": ")[-1]
        raise TypeError(f"{where} is a list; write {name}=[{value!r}].")
    if not isinstance(value, Iterable):
        raise TypeError(f"{where} is a list of patterns, got {value!r}.")
    patterns = tuple(value)
    for pattern in patterns:
        _check_regex(pattern, where)
    return patterns


def _check_regex(pattern: object, where: str) -> None:
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
            f"{where}: {pattern!r} is no valid regular expression: {error}."
            + (f" Was it meant as a glob? Then write {glob!r}." if glob != pattern else "")
        ) from error


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
      ValueError: a pattern that matches nothing, or a rule that is never the one that counts.
        The message names the pattern and the nearest paths.
    """
    whole: dict[str, str] = {}
    for pattern in config.trainable:
        matched = _matches(pattern, paths)
        if not matched:
            what = f"trainable pattern {pattern!r}"
            raise ValueError(_matches_nothing(what, pattern, paths, leaves=".*"))
        whole |= dict.fromkeys(matched, f"trainable pattern {pattern!r}")
    taken = dict(whole)
    rules: dict[str, Rule] = {}
    for rule in config.rules:
        matched = matched_by(rule, paths, axes)
        won = [path for path in matched if path not in taken]
        if not won:
            raise ValueError(_never_wins(rule, {path: taken[path] for path in matched}))
        if rule.pattern == ALL_LINEAR and isinstance(axes, ModelAxes):
            _check_heads(axes, won)
        rules |= dict.fromkeys(won, rule)
        taken |= dict.fromkeys(won, f"Rule({rule.pattern!r})")
    return rules, set(whole)


def matched_by(rule: Rule, paths: Sequence[str], axes: object = None) -> list[str]:
    """The paths that a rule matches, whoever has them.

    Raises:
      ValueError: there are none, or one of its patterns matches nothing.
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
                f"output heads: {heads}. Write a pattern for what shall be adapted."
            )
    else:
        matched = _matches(rule.pattern, paths)
        if not matched:
            raise ValueError(_matches_nothing(where, rule.pattern, paths))
    for name, patterns in (("only", rule.only), ("exclude", rule.exclude)):
        for pattern in patterns:
            if not _matches(pattern, paths):
                what = f"{where}: {name}={pattern!r}"
                raise ValueError(_matches_nothing(what, pattern, paths, leaves=".*"))
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


def _matches(pattern: str, paths: Iterable[str]) -> list[str]:
    fullmatch = re.compile(pattern).fullmatch
    return [path for path in paths if fullmatch(path)]


def _matches_nothing(what: str, pattern: str, paths: Sequence[str], leaves: str = "kernel") -> str:
    suggested, found = meant(pattern, paths, leaves)
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    hint = f"Did you mean {suggested!r}? It matches {found[0]!r}{more}. " if found else ""
    if not found and re.sub(r"\W|_", "", pattern).lower() in ("alllinear", "linear"):
        hint = f"Did you mean {ALL_LINEAR!r}? "
    return (
        f"{what} matches no parameter. Patterns are regular expressions that must match a whole "
        f"path. {hint}Nearest paths: {', '.join(nearest(pattern, paths)) or 'none'}."
    )


def _check_heads(axes: ModelAxes, paths: Iterable[str]) -> None:
    """Errors where nobody can know whether a layer is an output head."""
    unsure = [path for path in paths if path in axes.unsure]
    if unsure:
        raise ValueError(
            f"Rule({ALL_LINEAR!r}): whether {', '.join(map(repr, unsure))} is the kernel of an "
            f"output head, which would stay frozen, cannot be known, as the model computes more "
            f"behind it. Add exclude={[re.escape(path) for path in unsure]}, and to adapt it, a "
            f"rule of its own."
        )


def _never_wins(rule: Rule, taken: Mapping[str, str]) -> str:
    some = [f"{path!r} has {owner}" for path, owner in list(taken.items())[:3]]
    more = f" and {len(taken) - 3} more" if len(taken) > 3 else ""
    owners = set(taken.values())
    if all(owner.startswith("trainable") for owner in owners):
        advice = "Those leaves would be both adapted and fully trained: remove one of the two"
    else:
        advice = "The first match wins: put the more special rule first, or remove this one"
    return f"Rule({rule.pattern!r}) never has a leaf of its own: {'; '.join(some)}{more}. {advice}."


def nearest(pattern: str, paths: Iterable[str], count: int = 4) -> list[str]:
    """The paths most like a pattern, as candidates for an error message; first those that hold it.

    Example:
      >>> nearest(r".*/qeury/kernel", ["encoder/query/kernel", "head/bias"], count=1)
      ['encoder/query/kernel']
    """
    literal = re.sub(r"\\(.)", r"\1", re.sub(r"\.[*+]|[()^$?\[\]{}]", "", pattern))

    def likeness(path: str) -> tuple[bool, float]:
        return literal in path, difflib.SequenceMatcher(None, literal, path).ratio()

    return sorted(paths, key=likeness, reverse=True)[:count]
