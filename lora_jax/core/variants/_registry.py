"""The variants by their names, as rules and files say them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from lora_jax.core.variants._cached_norm import CachedNorm
from lora_jax.core.variants._check_variant import check_class, check_variant
from lora_jax.core.variants._dora import DoRA
from lora_jax.core.variants._lora import LoRA
from lora_jax.core.variants._variant import Variant

# One object of each, so that to compare structures is to compare objects.
_AS_THEY_ARE: dict[type[Variant], Variant] = {cls: cls() for cls in (LoRA, DoRA, CachedNorm)}

V = TypeVar("V", bound=type[Variant])

_VARIANTS: dict[str, type[Variant]] = {cls.name: cls for cls in (LoRA, DoRA, CachedNorm)}


def register_variant(cls: V) -> V:
    """Makes a variant known by its name: to rules, and to :func:`lora_jax.load`.

    A decorator for the class. Without it a rule takes an instance, and everything works but saving:
    whoever loads an adapter must have registered the class of its variant.

    Args:
      cls: the class.

    Raises:
      TypeError: if it is not a class of variants.
      ValueError: if another class has its name.

    Example:
      >>> import lora_jax
      >>> @lora_jax.register_variant
      ... class Tied(lora_jax.LoRA):
      ...     name = "tied_lora"
      >>> lora_jax.Rule("kernel", rank=2, variant="tied_lora").variant
      'tied_lora'
    """
    check_class(cls)
    known = _VARIANTS.get(cls.name)
    # A class that is defined once more, as in a cell of a notebook, takes the place of the old one.
    if known is not None and (known.__module__, known.__qualname__) != (
        cls.__module__,
        cls.__qualname__,
    ):
        raise ValueError(
            f"There is a variant {cls.name!r} already, {known.__module__}.{known.__qualname__}: "
            f"give {cls.__qualname__} another name."
        )
    _VARIANTS[cls.name] = cls
    return cls


def trained_variants() -> tuple[str, ...]:
    """The names that a rule may have."""
    return tuple(sorted(name for name, cls in _VARIANTS.items() if cls is not CachedNorm))


def is_registered(variant: Variant) -> bool:
    """Whether the name of a variant is that of its class."""
    return _VARIANTS.get(variant.name) is type(variant)


def variant_of(variant: str | Variant, settings: Mapping[str, Any] | None = None) -> Variant:
    """The variant of a name; one that is given already, as it is.

    Args:
      variant: its name, or the variant.
      settings: its own, for a name.

    Raises:
      ValueError: if there is no such variant, or a setting is not one of it, or of another type.
    """
    if isinstance(variant, Variant):
        return variant
    if variant not in _VARIANTS:
        raise ValueError(
            f"there is no variant {variant!r}; there are {', '.join(_VARIANTS)}. One of your own "
            f"has to be registered: lora_jax.register_variant(MyVariant)."
        )
    cls, settings = _VARIANTS[variant], settings or {}
    if not settings and cls in _AS_THEY_ARE:
        return _AS_THEY_ARE[cls]
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(settings) - set(fields)):
        raise ValueError(f"variant {variant!r} has no setting {unknown[0]!r}.")
    try:
        found = cls(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"variant {variant!r}: {error}") from error
    try:
        check_variant(found)
    except TypeError as error:
        raise ValueError(f"variant {variant!r}: {error}") from error
    return found
