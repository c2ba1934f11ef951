"""What is refused of a variant that is not what it says."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import re
from typing import TYPE_CHECKING, Any

import chex
import jax
import jax.numpy as jnp

from lora_jax.core.variants._variant import NormalForm, Variant, sizes_of_any_kernel

if TYPE_CHECKING:
    from lora_jax.core.rules._rule import Rule

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_NOT_A_SETTING = (
    "{0}: {1!r} is not one of its settings, so that it is neither saved nor told apart. Decorate "
    "the class with @dataclasses.dataclass(frozen=True), with {1!r} as a field."
)
# What an adapter has besides its arrays, so that no array can have such a name.
RESERVED = frozenset(
    re.findall(
        r"\w+",
        "STATIC W s self key rule alpha alone arrays arrays_at arrays_of as_leaf as_parameter "
        "axes base_hash changes_base check check_alone check_arrays check_combines "
        "check_factors check_fits check_merges check_stacks count detach_norm dropout "
        "effective_kernel in_base in_layer kind materialize matrix_ndims matrix_sizes "
        "member members merge merged_dtype ndim one parts_of product rank replace rslora scale "
        "shapes stack_ndim substitute tree_flatten tree_flatten_with_keys tree_unflatten untied "
        "variant ",
    )
)


def check_class(cls: Any) -> None:
    """Raises an error if this is not a class of variants, with a name."""
    if not (isinstance(cls, type) and issubclass(cls, Variant)):
        raise TypeError(f"A variant is a class derived from lora_jax.Variant, got {cls!r}.")
    if abstract := sorted(getattr(cls, "__abstractmethods__", ())):
        raise TypeError(f"{cls.__name__} has no {abstract[0]}(), which every variant gives.")
    if not isinstance(getattr(cls, "name", None), str) or not _NAME.fullmatch(cls.name):
        raise ValueError(
            f"{cls.__name__}: name = {getattr(cls, 'name', None)!r} must be a word, as in files."
        )
    inherited = [base for base in cls.__mro__[1:] if getattr(base, "name", None) == cls.name]
    if inherited:
        raise ValueError(
            f"{cls.__name__} has the name {cls.name!r} of {inherited[0].__name__}: give it its own."
        )
    fields = {field.name for field in dataclasses.fields(cls)}
    if {"name", "takes_stacks", "takes_16_bits"} & fields:
        raise TypeError(f"{cls.__name__}: name is not a setting: leave out its type.")
    annotated = {
        name
        for base in cls.__mro__
        if issubclass(base, Variant)
        for name, kind in inspect.get_annotations(base).items()
        if "ClassVar" not in str(kind)
    }
    if lacking := sorted(annotated - fields):
        raise TypeError(_NOT_A_SETTING.format(cls.__name__, lacking[0]))


def check_variant(variant: Variant) -> None:
    """Checks the names and the shapes of a variant, and its normal form against its formula.

    Raises:
      TypeError: if something is of another type.
      ValueError: if something is wrong. The message names the variant.
    """
    check_class(type(variant))
    where = type(variant).__name__
    if more := sorted(set(vars(variant)) - set(variant.settings())):
        raise TypeError(_NOT_A_SETTING.format(where, more[0]))
    for field in dataclasses.fields(variant):
        setting, value = field.name, getattr(variant, field.name)
        if not isinstance(value, bool | int | float | str):
            raise TypeError(
                f"{where}: the setting {setting} must be a number, a string or a bool, to be in "
                f"files; got {value!r}."
            )
        default = field.default
        if default is not dataclasses.MISSING and type(value) is not type(default):
            raise TypeError(
                f"{where}: {setting} must be {type(default).__name__}, as its default is, got "
                f"{value!r}."
            )
    _check_functions(variant, where)


@functools.lru_cache(maxsize=256)
def _check_functions(variant: Variant, where: str) -> None:
    """The checks that compute something, once for each variant."""
    d, k, r = sizes_of_any_kernel(variant)
    shapes = variant.shapes(d, k, r)
    if not isinstance(shapes, dict) or not shapes:
        raise TypeError(f"{where}.shapes() must give a dict of shapes, got {shapes!r}.")
    for name, shape in shapes.items():
        if not (isinstance(name, str) and name.isidentifier()) or name in RESERVED:
            raise ValueError(f"{where}: an array cannot have the name {name!r}.")
        if not isinstance(shape, tuple) or not all(isinstance(size, int) for size in shape):
            raise TypeError(f"{where}.shapes(): {name} must be a tuple of ints, got {shape!r}.")


def check_start(variant: Variant, rule: Rule) -> None:
    """Checks that the arrays at the start are those of the variant, and change nothing.

    Args:
      variant: the variant.
      rule: that asks for it.

    Raises:
      TypeError: if ``init`` gives something else than arrays.
      ValueError: if they have other shapes, or ``W'`` is not ``W``, or what ``base`` says.
    """
    where = type(variant).__name__
    d, k, r = sizes_of_any_kernel(variant)
    rule = copy.copy(rule)
    object.__setattr__(rule, "rank", r)
    # In a trace these are numbers, too.
    with jax.ensure_compile_time_eval(), jax.default_matmul_precision("highest"):
        W = jax.random.normal(jax.random.key(0), (d, k))
        arrays = variant.init(jax.random.key(1), W, rule)
        check_arrays(variant, arrays, variant.shapes(d, k, r))
        arrays = {name: jnp.asarray(array, W.dtype) for name, array in arrays.items()}
        for give in (variant.normal_form, variant.exact_normal_form):
            if (form := give(W, rule.scale, **arrays)) is not None:
                check_form(form, (d, k), where)
        base = variant.base(W, rule.scale, **arrays)
        start = variant.kernel(base, rule.scale, **arrays)
        if jnp.shape(start) != (d, k):
            raise ValueError(f"{where}.kernel(): for a kernel {(d, k)} it gives {start.shape}.")
        if not jnp.allclose(start, W, rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"{where}: at the start W' is not W, for random numbers they differ by up to "
                f"{float(jnp.abs(start - W).max()):.2g}. Let init() give arrays that change "
                f"nothing, or let base() take from W what they add."
            )
        # Near the start, as elsewhere there may be no W': of the logarithm of a negative number.
        names = enumerate(sorted(arrays))
        near = {
            name: arrays[name] + 0.1 * jax.random.normal(jax.random.key(i), arrays[name].shape)
            for i, name in names
        }
        _check_normal_forms(variant, where, W, rule.scale, near)
        _check_traced_scale(variant, where, W, near)


def _check_normal_forms(
    variant: Variant, where: str, W: chex.Array, s: float, arrays: dict[str, chex.Array]
) -> None:
    """Raises an error if a normal form is not one, or gives another ``W'`` than the formula."""
    formula = variant.kernel(W, s, **arrays)
    for give in (variant.normal_form, variant.exact_normal_form):
        form = give(W, s, **arrays)
        if form is None:
            continue
        adapted = W if form.L is None else W + s * form.L @ form.R
        adapted = adapted if form.a is None else form.a[None, :] * adapted
        if not jnp.allclose(adapted, formula, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ValueError(
                f"{where}: normal_form() gives another W' than kernel(): for random numbers they "
                f"differ by up to {float(jnp.abs(adapted - formula).max()):.2g}."
            )


def _check_traced_scale(
    variant: Variant, where: str, W: chex.Array, arrays: dict[str, chex.Array]
) -> None:
    """Raises ValueError if ``s`` must be a number of Python: in a stack it may be an array."""

    def both(s: chex.Array) -> Any:
        return variant.normal_form(W, s, **arrays), variant.kernel(W, s, **arrays)

    try:
        jax.eval_shape(both, 1.0)
    except (TypeError, jax.errors.JAXTypeError) as error:
        raise ValueError(
            f"{where}: its functions cannot take the scale s as an array, which it is in a stack "
            f"of adapters of several scales. Compute with jax.numpy, and do not branch on s."
        ) from error


def check_arrays(variant: Variant, arrays: Any, expected: dict[str, tuple[int, ...]]) -> None:
    """Raises an error if ``init`` does not give what ``shapes`` says."""
    where = f"{type(variant).__name__}.init()"
    if not isinstance(arrays, dict):
        raise TypeError(
            f"{where} must give a dict of arrays, {sorted(expected)}, got {type(arrays).__name__}."
        )
    found = {name: tuple(jnp.shape(array)) for name, array in arrays.items()}
    if found != expected:
        raise ValueError(
            f"{where} gives arrays of the shapes {found}, and shapes() says {expected}."
        )
    for name, array in arrays.items():
        if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
            raise ValueError(
                f"{where} gives {jnp.result_type(array)} for {name!r}: it must be floating-point."
            )


def check_form(form: Any, shape: tuple[int, int], where: str) -> None:
    """Raises ValueError if a normal form is not one for a kernel of that shape."""
    d, k = shape
    if not isinstance(form, NormalForm):
        raise TypeError(
            f"{where}.normal_form() must give a lora_jax.NormalForm(a, L, R), or None where there "
            f"is none; got {type(form).__name__}."
        )
    a, L, R = form
    if (L is None) != (R is None):
        raise ValueError(
            f"{where}.normal_form() gives one of L and R without the other; the order is "
            f"NormalForm(a, L, R)."
        )
    found = [None if array is None else tuple(jnp.shape(array)) for array in (a, L, R)]
    q = () if L is None else tuple(jnp.shape(L))[-1:]
    expected = [None if a is None else (k,), (d, *q) if q else None, (*q, k) if q else None]
    if found != expected:
        raise ValueError(
            f"{where}.normal_form(): for a kernel {shape} a, L and R must be {(k,)}, (d, q) and "
            f"(q, k), and are {found[0]}, {found[1]} and {found[2]}."
        )
