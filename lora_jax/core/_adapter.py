"""The node of an adapted kernel: its factors ``U`` and ``V``, and the magnitude ``m`` of DoRA."""

from __future__ import annotations

import math
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._deprecated import renamed_fields
from lora_jax.core._axes import KernelAxes
from lora_jax.core._meshes import left_to_compiler
from lora_jax.core._node import Node
from lora_jax.core._variants import VARIANTS, float32_or_more
from lora_jax.core.rules._rule import Rule, scale


@renamed_fields(
    {"product": {"merged": "dense"}}, substitute="materialize", effective_kernel="merge"
)
@flax.struct.dataclass
class Adapter(Node):
    """The trained arrays of one kernel, and what is static about them.

    A pytree: its leaves are ``U``, ``V`` and, for DoRA, ``m``, all float32, but that ``m`` has the
    precision of the kernel where that is more; the other fields are part of its structure, so that
    ``jax.jit`` traces again when one of them changes.

    Attributes:
      U: ``(d, r)``, input side. With stacked kernels ``(*stack, d, r)``, wherever the kernel has
        its stack axes; alike below. Several adapters, as of :func:`lora_jax.stack`, have one axis
        more in front.
      V: ``(r, k)``, output side.
      m: ``(k,)``, the magnitude of DoRA; ``None`` for LoRA.
      variant: ``"lora"`` or ``"dora"``; ``"scaled"`` after :func:`lora_jax.cache_norm`.
      rank: ``r``.
      alpha: numerator of the scale.
      rslora: whether the scale is ``alpha / sqrt(r)``.
      dropout: probability of dropping an input of the factors in training; ``None`` where several
        adapters have several, so that it cannot be active.
      detach_norm: whether DoRA's norm is a constant in the gradient.
      axes: how the kernel is a matrix.
      materialize: whether ``W'`` stands in place of the parameter itself.
      untied: whether other readers of the parameter keep the base.
      product: how the layer computes its product, as the rule says.
    """

    U: Any
    V: Any
    m: Any = None
    variant: str = flax.struct.field(pytree_node=False, default="lora")
    rank: int = flax.struct.field(pytree_node=False, default=1)
    alpha: float = flax.struct.field(pytree_node=False, default=1.0)
    rslora: bool = flax.struct.field(pytree_node=False, default=False)
    dropout: float | None = flax.struct.field(pytree_node=False, default=0.0)
    detach_norm: bool = flax.struct.field(pytree_node=False, default=False)
    axes: KernelAxes = flax.struct.field(pytree_node=False, default=KernelAxes())
    materialize: bool = flax.struct.field(pytree_node=False, default=False)
    untied: bool = flax.struct.field(pytree_node=False, default=False)
    product: str = flax.struct.field(pytree_node=False, default="auto")

    @property
    def scale(self) -> float:
        """``s`` of ``W + s U V``."""
        return scale(self.rank, self.alpha, self.rslora)

    @property
    def count(self) -> int | None:
        """How many adapters are here, on the axis in front; ``None`` for one alone."""
        return int(self.U.shape[0]) if self.U.ndim == self.ndim + 1 else None

    @property
    def ndim(self) -> int:
        """How many axes ``U`` and ``V`` of one adapter have."""
        return len(self.axes.batch) + (self.axes.fused > 1) + 2

    def shapes(self, kernel_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shapes that ``U``, ``V`` and ``m`` have for a kernel of this shape."""
        d, k = self.axes.matrix_shape(kernel_shape)
        stack = self.axes.batch_shape(kernel_shape)
        shapes = {"U": (d, self.rank), "V": (self.rank, k), "m": (k,)}
        if self.m is None:
            del shapes["m"]
        return {name: (*stack, *shape) for name, shape in shapes.items()}

    @property
    def arrays(self) -> dict[str, Any]:
        """``U``, ``V`` and, for DoRA, ``m``."""
        arrays = {"U": self.U, "V": self.V, "m": self.m}
        return {name: array for name, array in arrays.items() if array is not None}

    def merge(self, kernel: chex.Array) -> chex.Array:
        """``W'`` in float32, of the shape of the kernel, by the formula of the variant."""

        def merged(kernel: chex.Array, U: chex.Array, V: chex.Array, m: Any) -> chex.Array:
            kernel = kernel.astype(float32_or_more(kernel.dtype))
            W = self.axes.as_matrix(kernel)
            U, V, m = jax.tree.map(lambda array: array.astype(W.dtype), (U, V, m))
            adapted = VARIANTS[self.variant].kernel(W, U, V, m, self.scale, self.detach_norm)
            return self.axes.from_matrix(adapted, kernel)

        W_: chex.Array = left_to_compiler(merged, kernel, self.U, self.V, self.m, like=kernel)
        return W_

    def check(self, path: str) -> None:
        """Raises ValueError if there is no such variant, or its arrays are not there."""
        if self.variant not in VARIANTS:
            raise ValueError(
                f"The adapter for {path!r} is of variant {self.variant!r}; there are "
                f"{', '.join(VARIANTS)}."
            )
        if (self.m is None) != (VARIANTS[self.variant].magnitude is None):
            has = "no m" if self.m is None else "an m"
            raise ValueError(
                f"The adapter for {path!r} is of variant {self.variant!r}, but has {has}. Was it "
                f"saved with another variant?"
            )

    def check_fits(
        self, path: str, shape: tuple[int, ...], count: int | None = None, name: str = "the base"
    ) -> None:
        """Checks the shapes of ``U``, ``V`` and ``m`` against that of the kernel."""
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
            found = tuple(getattr(self, field).shape)
            if count is not None:
                expected = (count, *expected)
            if found[1:] == expected and count is None:
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
        """Raises ValueError if ``U`` and ``V`` are not factors of one product of rank ``rank``."""
        U, V = np.shape(self.U), np.shape(self.V)
        if U[:-2] != V[:-2] or not U[-1] == V[-2] == self.rank:
            raise ValueError(
                f"{name} has U {U} and V {V} at {path!r}, which are not of one stack and of rank "
                f"{self.rank}."
            )


def default_std(d: int) -> float:
    """Standard deviation of the Gaussian factor for a kernel with ``d`` inputs: ``1 / sqrt(d)``.

    With ``V`` Gaussian and ``U`` at zero, all ``d`` entries of a column of ``U`` move by the
    learning rate at once, so the larger ``V`` is, the lower is the learning rate at which
    training breaks (Hayou et al. 2024). With this one, both orientations train alike over the
    learning rates that papers use; ``benchmarks/learning_rates.py`` measures it.
    """
    return 1.0 / math.sqrt(d)


def init_adapter(
    key: chex.PRNGKey, kernel: chex.Array, rule: Rule, axes: KernelAxes, untied: bool = False
) -> Adapter:
    """An adapter that changes nothing yet.

    Args:
      key: for the Gaussian factor.
      kernel: the kernel, stack axes included.
      rule: rank, variant and initial values.
      axes: how the kernel is a matrix.
      untied: whether other readers of the kernel keep the base.
    """
    d, k = axes.matrix_shape(kernel.shape)
    stack = axes.batch_shape(kernel.shape)
    std = default_std(d) if rule.std is None else rule.std

    def gaussian(shape: tuple[int, ...]) -> chex.Array:
        return std * jax.random.normal(key, shape, jnp.float32)

    shape_U, shape_V = (*stack, d, rule.rank), (*stack, rule.rank, k)
    if rule.zero == "U":
        U, V = jnp.zeros(shape_U, jnp.float32), gaussian(shape_V)
    else:
        U, V = gaussian(shape_U), jnp.zeros(shape_V, jnp.float32)
    magnitude = VARIANTS[rule.variant].magnitude
    m = None
    if magnitude is not None:
        m = magnitude(axes.as_matrix(kernel).astype(float32_or_more(kernel.dtype)))
    return Adapter(
        U=U,
        V=V,
        m=m,
        variant=rule.variant,
        rank=rule.rank,
        alpha=float(rule.rank if rule.alpha is None else rule.alpha),
        rslora=rule.rslora,
        dropout=rule.dropout,
        detach_norm=rule.detach_norm,
        axes=axes,
        materialize=rule.materialize,
        untied=untied,
        product=rule.product,
    )
