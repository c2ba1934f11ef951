"""The node of an adapted kernel: the arrays that are trained for it, and its static facts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._deprecated import warn, warn_removed
from lora_jax.core._array_node import ArrayNode
from lora_jax.core._axes import KernelAxes
from lora_jax.core._meshes import left_to_compiler
from lora_jax.core._numerics import float32_or_more
from lora_jax.core.rules._rule import Rule, scale
from lora_jax.core.variants._apply_variant import of_matrices
from lora_jax.core.variants._cached_norm import CachedNorm
from lora_jax.core.variants._check_variant import check_arrays
from lora_jax.core.variants._lora import LoRA
from lora_jax.core.variants._registry import variant_of
from lora_jax.core.variants._variant import Variant

_UNSET: Any = object()


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, init=False)
class Adapter(ArrayNode):
    """The trained arrays of one kernel, and what is static about them.

    A pytree: its leaves are the arrays of its variant, ``U`` and ``V`` for LoRA, with ``m`` for
    DoRA, as attributes and as ``arrays``. All are float32, but that those which depend on the
    kernel have its precision where that is more. The other fields are part of its structure, so
    that ``jax.jit`` traces again when one of them changes.

    Attributes:
      arrays: the arrays by their names. ``U`` is ``(d, r)``, input side; ``V`` is ``(r, k)``,
        output side; ``m`` is ``(k,)``, the magnitude of DoRA, and ``None`` for LoRA. With stacked
        kernels they are ``(*stack, d, r)``, wherever the kernel has its stack axes, and so on.
        Several adapters, as of ``jax.vmap(lora_init, ...)``, have one axis more in front.
      variant: the variant, as ``LoRA()`` or ``DoRA()``, with its settings.
      rank: ``r``.
      alpha: numerator of the scale.
      rslora: whether the scale is ``alpha / sqrt(r)``.
      dropout: probability of dropping an input of the factors in training. (In the layers of a
        mixed batch one for each adapter; ``None`` where it is not known which one it is.)
      axes: how the kernel is a matrix.
      materialize: whether ``W'`` stands in place of the parameter itself.
      untied: whether other readers of the parameter keep the base.
      base_hash: of the kernel, where the variant has changed it at the start, so that the adapter
        is refused for another one. ``None`` elsewhere, and inside of ``jax.jit``.

    Example:
      >>> adapter = Adapter(jnp.zeros((3, 1)), jnp.ones((1, 2)))
      >>> adapter.V, adapter.m, adapter.scale, str(adapter.variant)
      (Array([[1., 1.]], dtype=float32), None, 1.0, 'lora')
      >>> adapter.replace(V=jnp.zeros((1, 2)), alpha=2.0).scale
      2.0
    """

    arrays: Mapping[str, Any]
    variant: Variant
    rank: int
    alpha: float
    rslora: bool
    dropout: float | None
    axes: KernelAxes
    materialize: bool
    untied: bool
    base_hash: str | None

    def __init__(
        self,
        U: Any = _UNSET,
        V: Any = _UNSET,
        m: Any = _UNSET,
        variant: str | Variant = LoRA(),  # noqa: B008  (it is frozen)
        rank: int = 1,
        alpha: float = 1.0,
        rslora: bool = False,
        dropout: float | None = 0.0,
        axes: KernelAxes = KernelAxes(),  # noqa: B008
        materialize: bool = False,
        untied: bool = False,
        base_hash: str | None = None,
        arrays: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        as_variant = variant_of(variant)
        fields: dict[str, Any] = {
            "variant": as_variant,
            "rank": rank,
            "alpha": alpha,
            "rslora": rslora,
            "dropout": dropout,
            "axes": axes,
            "materialize": materialize,
            "untied": untied,
            "base_hash": base_hash,
        }
        more = _without_old_names(more, as_variant)
        fields |= {name: more.pop(name) for name in _STATIC if name in more}
        if unknown := sorted(set(more) - set(fields["variant"].names())):
            raise TypeError(
                f"Adapter() got {unknown[0]!r}, which is neither one of its arguments nor an array "
                f"of the variant {fields['variant']}."
            )
        given = {"U": U, "V": V, "m": m} | more
        given = {name: array for name, array in given.items() if array is not _UNSET}
        _set(self, {**(arrays or {}), **given}, fields)

    def replace(self, **changes: Any) -> Adapter:
        """A copy with other arrays or other fields; an array that is ``None`` is left out.

        Without a check, as arrays may be anything inside of JAX; :meth:`check` is called where a
        tree of adapters is used.
        """
        changes = _without_old_names(changes, self.variant)
        fields = {name: changes.pop(name, getattr(self, name)) for name in _STATIC}
        fields["variant"] = variant_of(fields["variant"])
        new: Adapter = object.__new__(type(self))
        _set(new, {**changes.pop("arrays", self.arrays), **changes}, fields)
        return new

    def __getattr__(self, name: str) -> Any:
        if name == "detach_norm" and "variant" in self.__dict__:
            warn("Adapter.detach_norm", "Adapter.variant.detach_norm")
            return getattr(self.variant, "detach_norm", False)
        if name in _OLD_NAMES:
            warn(f"Adapter.{name}", _OLD_NAMES[name])
            return getattr(self, _OLD_NAMES[name])
        return super().__getattr__(name)

    # --- what it means ---

    @property
    def scale(self) -> float:
        """``s`` of ``W + s U V``."""
        return scale(self.rank, self.alpha, self.rslora)

    @property
    def kind(self) -> str:
        """The name of the variant."""
        return self.variant.name

    @property
    def changes_base(self) -> bool:
        """Whether its variant, or the one that it was made from, has changed the base."""
        return self.variant.changes_base or self.base_hash is not None

    @property
    def count(self) -> int | None:
        """How many adapters are here, on the axis in front; ``None`` for one alone."""
        name, ndim = next(iter(self.matrix_ndims().items()))
        array = self.arrays[name]
        return int(array.shape[0]) if array.ndim == self.stack_ndim + ndim + 1 else None

    def matrix_ndims(self) -> dict[str, int]:
        """How many axes each array has for one matrix."""
        return self.variant.matrix_ndims()

    def shapes(self, kernel_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shapes that the arrays have for a kernel of this shape."""
        d, k = self.axes.matrix_shape(kernel_shape)
        stack = self.axes.batch_shape(kernel_shape)
        shapes = self.variant.shapes(d, k, self.rank)
        return {name: (*stack, *shape) for name, shape in shapes.items()}

    def merge(self, kernel: chex.Array) -> chex.Array:
        """``W'`` in float32, of the shape of the kernel, by the formula of the variant."""

        def merged(kernel: chex.Array, arrays: dict[str, Any]) -> chex.Array:
            kernel = kernel.astype(float32_or_more(kernel.dtype))
            W, variant = self.axes.as_matrix(kernel), self.variant
            adapted = of_matrices(variant, variant.kernel, W, self.scale, arrays)
            return self.axes.from_matrix(adapted, kernel)

        arrays = dict(self.arrays)
        W_: chex.Array = left_to_compiler(merged, kernel, arrays, like=kernel)
        return W_

    def matrix_sizes(self) -> tuple[int, ...] | None:
        """``(*stack, d, k)``, where ``U`` and ``V`` say it; ``None`` for variants without."""
        ndims = self.matrix_ndims()
        if ndims.get("U") != 2 or ndims.get("V") != 2:
            return None
        U, V = np.shape(self.arrays["U"]), np.shape(self.arrays["V"])
        return (*U[:-1], V[-1])

    # --- checks ---

    def check(self, path: str) -> None:
        """Raises ValueError if its arrays are not those of its variant."""
        names = self.variant.names()
        if lacking := [name for name in names if name not in self.arrays]:
            raise ValueError(
                f"The adapter for {path!r} is of variant {self.kind!r}, but has no {lacking[0]}. "
                f"Was it saved with another variant?"
            )
        if more := [name for name in self.arrays if name not in names]:
            raise ValueError(
                f"The adapter for {path!r} is of variant {self.kind!r}, but also has {more[0]!r}. "
                f"Was it saved with another variant?"
            )

    def check_fits(
        self, path: str, shape: tuple[int, ...], count: int | None = None, name: str = "the base"
    ) -> None:
        """Checks the shapes of the arrays against that of the kernel."""
        if len(shape) != self.axes.ndim:
            raise ValueError(
                f"The adapter for {path!r} is for a kernel of {self.axes.ndim} axes, but the base "
                f"has {shape} there. Was it made for another model?"
            )
        self.check(path)
        try:
            shapes = self.shapes(shape)
        except ValueError as error:
            raise ValueError(f"The adapter for {path!r} does not fit: {error}") from None
        for field, expected in shapes.items():
            found = tuple(self.arrays[field].shape)
            if count is not None:
                expected = (count, *expected)
            if len(found) > len(expected) and found[1:] == expected and count is None:
                raise ValueError(
                    f"The adapter for {path!r} is a stack of {found[0]}. Say which one each "
                    f"example of the batch shall have, lora_apply(..., adapter_ids=ids), or take "
                    f"one alone: jax.tree.map(lambda x: x[i], stacked)."
                )
            if found != expected:
                raise ValueError(
                    f"The adapter for {path!r} does not fit the kernel {shape}: {field} is "
                    f"{found}, but should be {expected}. Was it made for another model?"
                )

    def check_merges(self, path: str) -> None:
        """Raises ValueError if the adapter is for one of several uses of the kernel."""
        if self.untied:
            raise ValueError(
                f"The adapter of {path!r} has tied='untie': it adapts one of several uses of the "
                f"parameter, so no merged parameter gives the same model."
            )

    def check_alone(self, path: str) -> None:
        """Raises ValueError if this is a stack, or an adapter of :func:`lora_jax.cache_norm`."""
        if self.count is not None:
            raise ValueError(
                f"The adapter of {path!r} is a stack of {self.count}: save each one alone, "
                f"jax.tree.map(lambda x: x[i], stacked)."
            )
        if isinstance(self.variant, CachedNorm):
            raise ValueError(
                f"The adapter of {path!r} is of cache_norm: save the adapter as it was before, "
                f"from which cache_norm makes it again."
            )

    def check_combines(self, path: str, name: str) -> None:
        """Raises ValueError if this is not one adapter of one rank."""
        if self.count is not None:
            raise ValueError(
                f"{name} is a stack of {self.count} adapters, at {path!r}: combine each one alone, "
                f"jax.tree.map(lambda x: x[i], stacked)."
            )
        self.check_factors(path, name)

    def check_stacks(self, path: str, name: str) -> None:
        """Raises ValueError if this is not one adapter of one rank."""
        if self.count is not None:
            raise ValueError(
                f"{name} is a stack of {self.count} adapters already, at {path!r}: take each one "
                f"alone, jax.tree.map(lambda x: x[i], stacked)."
            )
        self.check_factors(path, name)

    def check_factors(self, path: str, name: str) -> None:
        """Raises ValueError if the arrays are not those of one stack of kernels and of its rank."""
        if not self._are_of_one_kernel():
            shapes = " and ".join(f"{field} {np.shape(a)}" for field, a in self.arrays.items())
            raise ValueError(
                f"{name} has {shapes} at {path!r}, which are not of one stack and of rank "
                f"{self.rank}."
            )

    def check_arrays(self, where: str) -> None:
        """Checks the arrays where the kernel is not known, as for a file.

        Args:
          where: the adapter is, for messages.

        Raises:
          ValueError: if their shapes do not fit each other, or one is empty or of integers.
        """
        shapes = {name: np.shape(array) for name, array in self.arrays.items()}
        if not self._are_of_one_kernel():
            raise ValueError(
                f"{where}: the shapes {shapes} are not those of an adapter of rank {self.rank} for "
                f"{self.axes}."
            )
        for name, shape in shapes.items():
            if 0 in shape:
                raise ValueError(f"{where}: {name} is {shape}, in which there are no numbers.")
            if not jnp.issubdtype(self.arrays[name].dtype, jnp.floating):
                raise ValueError(f"{where}: {name} is of dtype {self.arrays[name].dtype}.")

    def _are_of_one_kernel(self) -> bool:
        """Whether there can be a kernel that the arrays are for.

        Of a variant with other arrays than ``U`` and ``V`` only the axes that stack are known.
        """
        ndims, stack_ndim = self.matrix_ndims(), self.stack_ndim
        found = {name: tuple(np.shape(array)) for name, array in self.arrays.items()}
        stacks = {shape[:stack_ndim] for shape in found.values()}
        if len(stacks) != 1 or any(len(found[n]) != stack_ndim + ndims[n] for n in ndims):
            return False
        if self.axes.fused > 1 and stacks.pop()[-1] != len(self.axes.parts):
            return False
        if not {"U", "V"} <= ndims.keys() or ndims["U"] != 2 or ndims["V"] != 2:
            return True
        d, k = found["U"][-2], found["V"][-1]
        expected = self.variant.shapes(d, k, self.rank)
        return all(found[name][stack_ndim:] == shape for name, shape in expected.items())


# Attributes that had other names.
_OLD_NAMES = {"substitute": "materialize", "effective_kernel": "merge"}
_STATIC = tuple(field.name for field in dataclasses.fields(Adapter) if field.name != "arrays")
Adapter.STATIC = _STATIC


def _set(adapter: Adapter, arrays: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Sets the fields of a new adapter, its arrays in the order of the variant."""
    order = fields["variant"].names()
    known = [name for name in order if arrays.get(name) is not None]
    others = [name for name in arrays if name not in order and arrays[name] is not None]
    object.__setattr__(adapter, "arrays", {name: arrays[name] for name in (*known, *others)})
    for name, value in fields.items():
        object.__setattr__(adapter, name, value)


def _without_old_names(given: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    """Arguments by the names that they have now."""
    new = dict(given)
    if "product" in new:
        warn_removed("Adapter(product=...)", "lora_apply(..., product=...)", stacklevel=4)
        del new["product"]
    if "substitute" in new:
        warn("Adapter(substitute=...)", "materialize=", stacklevel=4)
        new["materialize"] = new.pop("substitute")
    if "detach_norm" in new:
        warn("Adapter(detach_norm=...)", "variant=lora_jax.DoRA(detach_norm=...)", stacklevel=4)
        detach = new.pop("detach_norm")
        variant = variant_of(new.get("variant", variant))
        if "detach_norm" in variant.settings():
            new["variant"] = dataclasses.replace(variant, detach_norm=detach)  # type: ignore[call-arg]
    return new


# As a dict of its arrays, with which flax.serialization.from_bytes restores it.


def _to_state_dict(adapter: Adapter) -> dict[str, Any]:
    return {name: flax.serialization.to_state_dict(a) for name, a in adapter.arrays.items()}


def restored_arrays(node: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a node of adapters, out of a state that Flax has made of it."""
    # A state of an older version has m = None for LoRA.
    found = {name: value for name, value in state.items() if value is not None}
    if set(found) != set(node.arrays):
        raise ValueError(
            f"The state of an adapter of variant {node.kind!r} has {sorted(found)}, but should "
            f"have {sorted(node.arrays)}."
        )
    return {
        name: flax.serialization.from_state_dict(array, found[name], name=name)
        for name, array in node.arrays.items()
    }


flax.serialization.register_serialization_state(
    Adapter,
    _to_state_dict,
    lambda adapter, state: adapter.replace(arrays=restored_arrays(adapter, state)),
)


def init_adapter(
    key: chex.PRNGKey, kernel: chex.Array, rule: Rule, axes: KernelAxes, untied: bool = False
) -> Adapter:
    """An adapter that changes nothing yet.

    Args:
      key: for its random numbers.
      kernel: the kernel, stack axes included.
      rule: rank, variant and initial values.
      axes: how the kernel is a matrix.
      untied: whether other readers of the kernel keep the base.

    Raises:
      ValueError: if the variant gives other arrays than it says.
    """
    variant = rule.as_variant()
    W = axes.as_matrix(kernel).astype(float32_or_more(kernel.dtype))
    init = functools.partial(variant.init, rule=rule)
    if variant.takes_stacks or W.ndim == 2:
        arrays = init(key, W)
    else:
        stack = W.shape[:-2]
        keys = jax.random.split(key, stack)
        for _ in stack:
            init = jax.vmap(init)
        arrays = init(keys, W)
    if isinstance(arrays, dict):  # else check_arrays says so
        arrays = {name: _at_least_float32(array) for name, array in arrays.items()}
    adapter = Adapter(
        arrays=arrays if isinstance(arrays, dict) else {},
        variant=variant,
        rank=rule.rank,
        alpha=float(rule.rank if rule.alpha is None else rule.alpha),
        rslora=rule.rslora,
        dropout=rule.dropout,
        axes=axes,
        materialize=rule.materialize,
        untied=untied,
    )
    check_arrays(variant, arrays, adapter.shapes(kernel.shape))
    return adapter


def _at_least_float32(array: Any) -> Any:
    array = jnp.asarray(array)
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    return array.astype(float32_or_more(array.dtype)) if floating else array


def base_at_start(adapter: Adapter, kernel: chex.Array) -> chex.Array:
    """What stays in the base when training starts, in the dtype of the kernel."""
    W = adapter.axes.as_matrix(kernel).astype(float32_or_more(kernel.dtype))
    variant = adapter.variant
    base = of_matrices(variant, variant.base, W, adapter.scale, adapter.arrays)
    wide = kernel.astype(base.dtype)
    return adapter.axes.from_matrix(base, wide).astype(kernel.dtype)
