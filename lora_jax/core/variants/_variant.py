"""What a variant gives: its arrays, its formula, and, where it has one, its normal form."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
import warnings
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import chex
import jax
import jax.numpy as jnp

from lora_jax.core._numerics import product

if TYPE_CHECKING:
    from lora_jax.core.rules._rule import Rule


class NormalForm(NamedTuple):
    """``W' = a (W + s L R)``.

    Attributes:
      a: ``(k,)``, one number for each column of ``W``, that is, for each output; ``None`` for 1.
      L: ``(d, q)``, the left factor, of any ``q``; ``None`` where there is no product.
      R: ``(q, k)``, the right factor.
    """

    a: Any = None
    L: Any = None
    R: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Variant(abc.ABC):
    """How ``W'`` is made of a kernel ``W`` and the arrays that are trained for it.

    A variant is a class with this one as its base. Its own settings are the fields of a frozen
    dataclass, numbers, strings or bools: they are a part of an adapter's static structure, and in
    its files. Its functions get one kernel as a matrix ``W`` of shape ``(d, k)``, inputs first, and
    the arrays of the variant by their names, all in float32 or more. Layers with kernels of other
    shapes, stacked kernels, transforms and batches of several adapters are the library's care.

    Where a variant has a *normal form* ``W' = a (W + s L R)``, every layer computes with it as
    fast as with LoRA. Where it has none, the layer forms ``W' - W`` in each call, of the size of
    the kernel.

    Arrays are trained, all of them. What is not trained is no array: let it be made from ``W`` or
    from a setting, as random factors are from a seed.

    Attributes:
      name: in rules, in files and in reports; a class attribute.
      takes_stacks: whether the functions themselves take kernels and arrays that are stacked on
        leading axes. By default they are mapped over these. Not inherited.
      takes_16_bits: whether :meth:`normal_form` itself takes kernels as they are stored, in 16
        bits or less. By default they are in float32 there too. Not inherited.

    Example:
      A LoRA with one more number for each output, as in IA3 (Liu et al. 2022):

      >>> import flax.linen as nn, jax, jax.numpy as jnp, lora_jax
      >>> class ScaledLoRA(lora_jax.Variant):
      ...     name = "scaled_lora"
      ...     def shapes(self, d, k, r):
      ...         return {"U": (d, r), "V": (r, k), "l": (k,)}
      ...     def init(self, key, W, rule):
      ...         U, V = self.init_factors(key, W, rule)
      ...         return {"U": U, "V": V, "l": jnp.ones(W.shape[1])}
      ...     def kernel(self, W, s, U, V, l):
      ...         return l * (W + s * U @ V)
      ...     def normal_form(self, W, s, U, V, l):
      ...         return lora_jax.NormalForm(l, U, V)
      >>> model, x = nn.Dense(3), jnp.ones((2, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> rule = lora_jax.Rule("kernel", rank=2, variant=ScaledLoRA())
      >>> frozen, adapters = lora_jax.lora_init(
      ...     jax.random.key(1), params, lora_jax.LoraConfig([rule])
      ... )
      >>> adapters["kernel"].l
      Array([1., 1., 1.], dtype=float32)
    """

    name: ClassVar[str]
    takes_stacks: ClassVar[bool] = False
    takes_16_bits: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Whoever overrides a function writes it for one matrix, unless it is said again.
        cls.takes_stacks = cls.__dict__.get("takes_stacks", False)
        cls.takes_16_bits = cls.__dict__.get("takes_16_bits", False)

    @abc.abstractmethod
    def shapes(self, d: int, k: int, r: int) -> dict[str, tuple[int, ...]]:
        """The names and the shapes of the arrays for a kernel ``(d, k)`` and the rank ``r``."""

    @abc.abstractmethod
    def init(self, key: chex.PRNGKey, W: chex.Array, rule: Rule) -> dict[str, chex.Array]:
        """The arrays at the start, where ``W'`` is ``W``, or what :meth:`base` says.

        Args:
          key: a random key.
          W: the kernel, ``(d, k)``.
          rule: has the rank, and ``zero`` and ``std`` for the two factors of
            :meth:`init_factors`.
        """

    def kernel(self, W: chex.Array, s: float, **arrays: chex.Array) -> chex.Array:
        """The formula: ``W'``, of the shape of ``W``. By default that of the normal form.

        Args:
          W: the kernel, ``(d, k)``.
          s: the scale, ``alpha / r`` or, for rsLoRA, ``alpha / sqrt(r)``.
          **arrays: of the variant, by their names.
        """
        form = self.normal_form(W, s, **arrays)
        if form is None:
            raise TypeError(f"{type(self).__name__} gives neither kernel() nor normal_form().")
        adapted = W if form.L is None else W + s * product(form.L, form.R)
        return adapted if form.a is None else form.a[..., None, :] * adapted

    def normal_form(self, W: chex.Array, s: float, **arrays: chex.Array) -> NormalForm | None:
        """``a``, ``L`` and ``R`` of ``W' = a (W + s L R)``; by default ``None``: there is none.

        Args:
          W: the kernel, ``(d, k)``; what it is used for here is computed in every call.
          s: the scale.
          **arrays: of the variant, by their names.
        """
        return None

    def exact_normal_form(self, W: chex.Array, s: float, **arrays: chex.Array) -> NormalForm | None:
        """The normal form where it is computed once and kept, by default the same.

        A variant whose normal form in each call saves time or memory and loses digits gives
        another one here.
        """
        return self.normal_form(W, s, **arrays)

    def base(self, W: chex.Array, s: float, **arrays: chex.Array) -> chex.Array:
        """What stays in the base at the start; by default the kernel ``W`` itself.

        A variant that starts with ``W' != W`` can take from ``W`` what it adds, as PiSSA (Meng et
        al. 2024) does: ``return W - s * U @ V``.

        Args:
          W: the kernel, ``(d, k)``.
          s: the scale.
          **arrays: of the variant at the start.
        """
        return W

    @property
    def changes_base(self) -> bool:
        """Whether :meth:`base` is not the kernel itself."""
        return type(self).base is not Variant.base

    def init_factors(
        self, key: chex.PRNGKey, W: chex.Array, rule: Rule
    ) -> tuple[chex.Array, chex.Array]:
        """``U`` of shape ``(d, r)`` and ``V`` of shape ``(r, k)``: one Gaussian, the other zero.

        Args:
          key: a random key.
          W: the kernel, ``(d, k)``.
          rule: its ``zero`` says which one starts at zero, ``std`` the deviation of the other one.
        """
        *stack, d, k = W.shape
        std = default_std(d) if rule.std is None else rule.std
        shape_U, shape_V = (*stack, d, rule.rank), (*stack, rule.rank, k)

        def gaussian(shape: tuple[int, ...]) -> chex.Array:
            return std * jax.random.normal(key, shape, jnp.float32)

        if rule.zero == "U":
            return jnp.zeros(shape_U, jnp.float32), gaussian(shape_V)
        return gaussian(shape_U), jnp.zeros(shape_V, jnp.float32)

    def names(self) -> tuple[str, ...]:
        """The names of the arrays."""
        return tuple(_shapes_for_any_kernel(self))

    def matrix_ndims(self) -> dict[str, int]:
        """How many axes each array has."""
        return {name: len(shape) for name, shape in _shapes_for_any_kernel(self).items()}

    def settings(self) -> dict[str, Any]:
        """The variant's own settings, by the names of its fields."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __str__(self) -> str:
        return self.name

    def __hash__(self) -> int:
        return hash((type(self), *self.settings().values()))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str):
            warnings.warn(
                f"The variant of an adapter is an object now: compare its name, variant.name == "
                f"{other!r}. Comparing it with a string will be false in the next version.",
                DeprecationWarning,
                stacklevel=2,
            )
            return self.name == other
        if self is other:
            return True
        if type(self) is not type(other):
            return NotImplemented
        return self.settings() == other.settings()


# Some kernel and rank, (d, k, r), where it does not matter which: the first that a variant takes.
ANY = ((8, 16, 4), (16, 16, 4), (16, 16, 16))


@functools.lru_cache(maxsize=1024)
def _shapes_for_any_kernel(variant: Variant) -> dict[str, tuple[int, ...]]:
    return variant.shapes(*sizes_of_any_kernel(variant))


def sizes_of_any_kernel(variant: Variant) -> tuple[int, int, int]:
    """``(d, k, r)`` that a variant takes."""
    for sizes in ANY[:-1]:
        try:
            variant.shapes(*sizes)
        except ValueError:
            continue
        return sizes
    return ANY[-1]


def default_std(d: int) -> float:
    """Standard deviation of the Gaussian factor for a kernel with ``d`` inputs: ``1 / sqrt(d)``.

    With ``V`` Gaussian and ``U`` at zero, all ``d`` entries of a column of ``U`` move by the
    learning rate at once, so the larger ``V`` is, the lower is the learning rate at which
    training breaks (Hayou et al. 2024). With this one, both orientations train alike over the
    learning rates that papers use; ``benchmarks/learning_rates.py`` measures it.
    """
    return 1.0 / math.sqrt(d)
