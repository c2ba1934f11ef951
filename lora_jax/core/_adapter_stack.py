"""The node of several adapters of one kernel: their arrays side by side, and what each is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core._adapter import Adapter, restored_arrays
from lora_jax.core._array_node import ArrayNode
from lora_jax.core._axes import KernelAxes
from lora_jax.core.rules._rule import scale
from lora_jax.core.variants._cached_norm import CachedNorm
from lora_jax.core.variants._dora import DoRA
from lora_jax.core.variants._lora import LoRA
from lora_jax.core.variants._variant import Variant


class Member(NamedTuple):
    """What is static about one adapter of a stack.

    Attributes:
      variant: its variant.
      rank: its own rank; its arrays are padded with zeros to the largest.
      alpha: numerator of the scale.
      rslora: whether the scale is ``alpha / sqrt(r)``.
      dropout: probability of dropping an input of the factors in training.
      parts: which of the fused kernels it adapts.
      shapes: of its arrays for one matrix, by their names.
      present: whether there is such an adapter; else it changes nothing.
    """

    variant: Variant
    rank: int
    alpha: float
    rslora: bool
    dropout: float | None
    parts: tuple[int, ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    present: bool = True

    @property
    def scale(self) -> float:
        """``s`` of ``W + s U V``."""
        return scale(self.rank, self.alpha, self.rslora)

    @classmethod
    def of(cls, adapter: Adapter) -> Member:
        """What is static about an adapter, or about each of several that are alike."""
        ndims = adapter.matrix_ndims()
        shapes = {n: tuple(np.shape(a)[np.ndim(a) - ndims[n] :]) for n, a in adapter.arrays.items()}
        return cls(
            adapter.variant,
            adapter.rank,
            adapter.alpha,
            adapter.rslora,
            adapter.dropout,
            adapter.axes.parts,
            tuple(shapes.items()),
        )

    def may_be_padded(self) -> bool:
        """Whether it computes the same with zeros behind the columns of its own rank.

        What a variant of a user computes may depend on the rank, or on the shapes.
        """
        return type(self.variant) in (LoRA, DoRA, CachedNorm)


@functools.lru_cache(maxsize=1024)
def same(members: tuple[Member, ...]) -> tuple[Member, ...]:
    """Members that are equal as one object, so that to compare structures is to compare objects."""
    return members


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class AdapterStack(ArrayNode):
    """Several adapters of one kernel, on an axis in front, as :func:`lora_jax.stack` makes them.

    A pytree, whose leaves are the arrays that are trained. Each member computes and trains as it
    would alone: with its own variant, scale and dropout, and the arrays of its variant. What
    another member has besides, it does not read, and zeros behind its own rank stay zero.

    Attributes:
      arrays: the arrays of all variants by their names, also as attributes: ``U`` is
        ``(n, *stack, d, r)`` for ``n`` members, and so on.
      members: what is static about each.
      axes: how the kernel is a matrix; its parts are those of all members.
      materialize: whether ``W'`` stands in place of the parameter itself.
      untied: whether other readers of the parameter keep the base.
      base_hash: of the kernel, where the variant of all has changed it at the start.
    """

    arrays: Mapping[str, Any]
    members: tuple[Member, ...]
    axes: KernelAxes
    materialize: bool
    untied: bool
    base_hash: str | None = None

    def replace(self, **changes: Any) -> AdapterStack:
        """A copy with other arrays or other fields."""
        fields = {name: changes.pop(name, getattr(self, name)) for name in _STATIC}
        return AdapterStack({**changes.pop("arrays", self.arrays), **changes}, **fields)

    @property
    def kind(self) -> str:
        """The names of the variants."""
        return ", ".join(sorted({member.variant.name for member in self.members}))

    @property
    def count(self) -> int | None:
        """How many adapters are here; ``None`` where one was taken, as inside of ``jax.vmap``."""
        name, ndim = next(iter(self.matrix_ndims().items()))
        stacked = np.ndim(self.arrays[name]) == self.stack_ndim + ndim + 1
        return len(self.members) if stacked else None

    def matrix_ndims(self) -> dict[str, int]:
        """How many axes each array has for one matrix."""
        found: dict[str, int] = {}
        for member in self.members:
            found |= member.variant.matrix_ndims()
        return {name: found[name] for name in self.arrays}

    def merge(self, leaf: Any) -> chex.Array:
        """Of one adapter that was taken out of the stack, ``W'``."""
        return self.one("").merge(leaf)

    def one(self, path: str) -> Adapter:
        """The adapter that was taken out of the stack, where it does not matter which one it is.

        Inside of ``jax.vmap`` over a stack, or behind ``jax.tree.map(lambda x: x[i], stack)``, the
        arrays do not say which member they are of.

        Args:
          path: of the kernel, for messages.

        Raises:
          ValueError: if the members differ in more than a rank that zeros make up for.
        """
        first = self.members[0]
        alike = {
            (m.variant, m.scale, m.dropout, m.parts, None if m.may_be_padded() else m.rank)
            for m in self.members
        }
        if len(alike) > 1:
            words = ("variant", "scale", "dropout", "part of fused kernels", "rank")
            columns = zip(words, zip(*alike, strict=True), strict=True)
            differ = [word for word, values in columns if len(set(values)) > 1]
            raise ValueError(
                f"The adapters of {path!r} in a stack differ in {' and '.join(differ)}, and one of "
                f"its rows does not say which of them it is. Take them apart with "
                f"lora_jax.unstack(stacked); or train and serve the stack as it is, by "
                f"lora_apply(..., adapter_ids=ids), in place of jax.vmap."
            )
        rank = max(m.rank for m in self.members)
        if {(m.rank, m.alpha, m.rslora) for m in self.members if m.rank == rank} == {
            (rank, first.alpha, first.rslora)
        }:
            alpha, rslora = first.alpha, first.rslora
        else:
            alpha, rslora = rank * first.scale, False
        arrays = {name: self.arrays[name] for name in first.variant.names()}
        return self.alone(first, arrays).replace(rank=rank, alpha=alpha, rslora=rslora)

    def member(self, i: int) -> Adapter | None:
        """Member ``i`` as it is alone; ``None`` where it does not adapt this kernel."""
        member = self.members[i]
        if not member.present:
            return None
        return self.alone(
            member, self._cut({n: self.arrays[n][i] for n, _ in member.shapes}, member)
        )

    def alone(self, member: Member, arrays: Mapping[str, Any]) -> Adapter:
        """An adapter with what is static about a member, and such arrays."""
        return Adapter(
            arrays=arrays,
            variant=member.variant,
            rank=member.rank,
            alpha=member.alpha,
            rslora=member.rslora,
            dropout=member.dropout,
            axes=dataclasses.replace(self.axes, parts=member.parts),
            materialize=self.materialize,
            untied=self.untied,
            base_hash=self.base_hash,
        )

    def parts_of(self, member: Member) -> np.ndarray[Any, Any] | None:
        """The places of a member's parts of fused kernels among all; ``None`` where it has all."""
        if member.parts == self.axes.parts:
            return None
        return np.array([self.axes.parts.index(part) for part in member.parts])

    def arrays_at(self, index: chex.Array) -> dict[str, chex.Array]:
        """The arrays of the member at an index that may be traced, padded as they are."""
        return {name: jnp.take(a, index, axis=0, mode="clip") for name, a in self.arrays.items()}

    def arrays_of(self, which: Sequence[int], like: Member | None = None) -> dict[str, Any]:
        """The arrays of members that are alike, ``(n, *stack, ...)``, as each has them alone.

        Args:
          which: their places.
          like: one of them, whose rank all get; by default the first.
        """
        member = like or self.members[which[0]]
        if tuple(which) == tuple(range(len(self.members))):
            arrays = {name: self.arrays[name] for name, _ in member.shapes}
        else:
            arrays = {name: self.arrays[name][np.array(which)] for name, _ in member.shapes}
        return self._cut(arrays, member)

    def _cut(self, arrays: Mapping[str, Any], member: Member) -> dict[str, Any]:
        """Arrays without what a member does not have: other parts, and what is behind its rank."""
        parts, out = self.parts_of(member), {}
        for name, shape in member.shapes:
            array = arrays[name]
            lead = array.ndim - len(shape)
            if parts is not None:
                array = array.take(parts, axis=lead - 1)
            if array.shape[lead:] != shape:
                array = array[(..., *(slice(0, size) for size in shape))]
            out[name] = array
        return out

    # --- checks ---

    def check(self, path: str) -> None:
        """Raises ValueError if an array is missing."""
        for member in self.members:
            for name, _ in member.shapes:
                if name not in self.arrays:
                    raise ValueError(f"The stack of adapters for {path!r} has no {name}.")

    def check_fits(
        self, path: str, shape: tuple[int, ...], count: int | None = None, name: str = "the base"
    ) -> None:
        """Checks the shapes of the arrays against that of the kernel."""
        if count is None and self.count is not None:
            raise ValueError(
                f"The adapter for {path!r} is a stack of {self.count}. Say which one each example "
                f"of the batch shall have, lora_apply(..., adapter_ids=ids), or take one alone: "
                f"lora_jax.unstack(stacked)[i]."
            )
        if count is not None and count != self.count:
            raise ValueError(f"The stack of adapters for {path!r} is of {self.count}, not {count}.")
        if len(shape) != self.axes.ndim:
            raise ValueError(
                f"The adapters for {path!r} are for a kernel of {self.axes.ndim} axes, but the "
                f"base has {shape} there. Were they made for another model?"
            )
        self.check(path)
        d, k = self.axes.matrix_shape(shape)
        stack = self.axes.batch_shape(shape)
        for member in self.members:
            expected = member.variant.shapes(d, k, member.rank)
            if member.present and dict(member.shapes) != expected:
                raise ValueError(
                    f"The adapters for {path!r} are for matrices of other shapes than those of the "
                    f"kernel {shape}. Were they made for another model?"
                )
        for field, array in self.arrays.items():
            found = tuple(array.shape)
            if found[: len(stack) + 1] != (len(self.members), *stack):
                raise ValueError(
                    f"The adapters for {path!r} do not fit the kernel {shape}: {field} is {found}, "
                    f"but should begin with {(len(self.members), *stack)}. Were they made for "
                    f"another model?"
                )

    def check_merges(self, path: str) -> None:
        """Raises ValueError, as they are several."""
        raise ValueError(
            f"The adapters of {path!r} are a stack: merge one, lora_jax.unstack(stacked)[i]."
        )

    def check_alone(self, path: str) -> None:
        """Raises ValueError, as they are several."""
        raise ValueError(
            f"The adapter of {path!r} is a stack of {len(self.members)}: save each one alone, "
            f"lora_jax.unstack(stacked)[i]."
        )

    def check_combines(self, path: str, name: str) -> None:
        """Raises ValueError, as they are several."""
        raise ValueError(
            f"{name} is a stack of {len(self.members)} adapters, at {path!r}: combine each one "
            f"alone, lora_jax.unstack(stacked)[i]."
        )

    def check_stacks(self, path: str, name: str) -> None:
        """Raises ValueError, as they are stacked."""
        raise ValueError(
            f"{name} is a stack of {len(self.members)} adapters already, at {path!r}: take each "
            f"one alone, lora_jax.unstack(stacked)[i]."
        )


_STATIC = tuple(f.name for f in dataclasses.fields(AdapterStack) if f.name != "arrays")
AdapterStack.STATIC = _STATIC


def stack_of(adapter: Adapter) -> AdapterStack:
    """Adapters that are alike, on an axis in front, as a stack that says so."""
    count = adapter.count
    assert count is not None
    members = same((Member.of(adapter),) * count)
    settings = adapter.materialize, adapter.untied, adapter.base_hash
    return AdapterStack(adapter.arrays, members, adapter.axes, *settings)


flax.serialization.register_serialization_state(
    AdapterStack,
    lambda stack: {n: flax.serialization.to_state_dict(a) for n, a in stack.arrays.items()},
    lambda stack, state: stack.replace(arrays=restored_arrays(stack, state)),
)
