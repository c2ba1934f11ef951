"""What is to be done with the kernels of a layer, in the call of a model that is under way.

A layer looks here for its kernels when it computes (``_adapted_class.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lora_jax._compat import trace_state
from lora_jax.core._boxes import is_quantized
from lora_jax.core.products._adapted_kernel import AdaptedKernel
from lora_jax.core.products._observer import Unseen
from lora_jax.core.products._shared_input import SharedInputs
from lora_jax.layers._entry import Entry
from lora_jax.layers._handlers import Handlers
from lora_jax.layers._place_adapters import Placed
from lora_jax.nnx._variables import raw_value_of, value_of
from lora_jax.tracing._as_given import changed_marks
from lora_jax.trees._paths import Key, path_of
from lora_jax.trees._quantized_leaf import is_quantized_variable

# Something next to a kernel is called as its parameter and this.
SUFFIX = "@lora"

# The name of the kernel that a layer has is this and its path.
KERNEL = "lora_jax: the kernel "

CHANGED = (
    "its value is another one when its layer is called, as nnx.WeightNorm and nnx.SpectralNorm "
    "change it, and an adapter would not be changed alike"
)

FOUND = (
    "the model computes with all variables that it finds in its layer, as one that sums up their "
    "squares, and would find the adapter among them"
)


class Call(Protocol):
    """A call that is under way."""

    @property
    def handlers(self) -> Handlers:
        """Those of the call."""

    def called(self, module: nnx.Module, entry: Entry) -> None:
        """A module is called, by a method that has this handler."""

    def kernel(
        self, module: nnx.Module, method: str, entry: Entry, name: str
    ) -> AdaptedKernel | None:
        """The kernel of a module for its handler; ``None`` where the module does not have it."""


class _Active(threading.local):
    """The calls under way: of one call inside another, the inner one adapts."""

    stack: tuple[Call, ...] = ()


_ACTIVE = _Active()


@contextlib.contextmanager
def under_way(call: Call) -> Iterator[None]:
    """For the time of a call of a model."""
    _ACTIVE.stack = (*_ACTIVE.stack, call)
    try:
        yield
    finally:
        _ACTIVE.stack = _ACTIVE.stack[:-1]


def call_under_way() -> Call | None:
    """The innermost call; ``None`` where a model that has its adapters in it is called."""
    return _ACTIVE.stack[-1] if _ACTIVE.stack else None


@dataclasses.dataclass
class AdaptedCall:
    """A call of ``lora_apply``, and what was seen in it.

    Attributes:
      handlers: of the call.
      reached: the paths of the kernels whose layer was called.
      used: the paths of the kernels that a handler has computed with.
    """

    handlers: Handlers
    reached: set[str] = dataclasses.field(default_factory=set)
    used: set[str] = dataclasses.field(default_factory=set)
    _draws: dict[str, int] = dataclasses.field(default_factory=dict)
    _inputs: tuple[Any, SharedInputs] | None = None

    def called(self, module: nnx.Module, entry: Entry) -> None:
        """Notes it, by the paths of its kernels."""
        for name, variable in vars(module).items():
            if name.endswith(SUFFIX):
                self.reached.add(value_of(variable).path)

    def kernel(
        self, module: nnx.Module, method: str, entry: Entry, name: str
    ) -> AdaptedKernel | None:
        """The kernel with its adapter, if it has one."""
        del method
        value = value_in(module, name)
        if value is None:
            return None
        beside = vars(module).get(name + SUFFIX)
        of_handler: dict[str, Any] = {"built_in": entry.built_in}
        if beside is None:
            alone = not any(n + SUFFIX in vars(module) for n in entry.names(module))
            optional = alone and is_quantized(value)
            return AdaptedKernel(name, value, **of_handler, optional=optional)
        placed: Placed = value_of(beside)
        path, adapter = placed.path, placed.adapter
        if placed.cut:
            checkpoint_name(value, KERNEL + path)
            return AdaptedKernel(path, value, observer=Unseen())
        return AdaptedKernel(
            path,
            value,
            adapter,
            self._dropout_key(placed),
            use=functools.partial(self.used.add, path),
            ids=placed.ids,
            product=placed.product,
            inputs=self._shared_inputs(),
            **of_handler,
        )

    def _shared_inputs(self) -> SharedInputs:
        """The inputs that layers have read in the trace that is going on."""
        now = trace_state()
        if self._inputs is None or self._inputs[0] != now:
            self._inputs = now, SharedInputs()
        return self._inputs[1]

    def _dropout_key(self, placed: Placed) -> chex.PRNGKey | None:
        """A key for one use of a kernel."""
        if placed.rng is None or not placed.adapter.dropout:
            return None
        draws = self._draws[placed.path] = self._draws.get(placed.path, 0) + 1
        key = jnp.ravel(placed.rng)[0]
        return jax.random.fold_in(key, zlib.crc32(f"{placed.path}{draws}".encode()))


def refuse_changed(jaxpr: Any, kernels: Mapping[Key, Any]) -> None:
    """Refuses kernels that the model has changed before their layers are called.

    Args:
      jaxpr: of a call with zeros in the place of kernels, which are its first inputs.
      kernels: them.

    Raises:
      ValueError: if there is one.
    """
    for path in changed_kernels(jaxpr, kernels):
        raise ValueError(
            f"The kernel {path!r} cannot be adapted in its layer: {CHANGED}. Give it a rule "
            f"with materialize=True."
        )


def changed_kernels(jaxpr: Any, kernels: Mapping[Key, Any]) -> list[str]:
    """The paths of kernels that the model has changed before their layers are called.

    Args:
      jaxpr: of a call, in which the kernels of layers are marked.
      kernels: its first inputs.
    """
    name = {
        key: jax.tree.map(lambda _, k=key: KERNEL + path_of(k), kernels[key]) for key in kernels
    }
    names = jax.tree.leaves(name)
    changed = changed_marks(jaxpr, [*names, *[None] * (len(jaxpr.invars) - len(names))])
    return [name.removeprefix(KERNEL) for name in sorted(changed)]


def value_in(module: nnx.Module, name: str) -> Any:
    """The value of a variable, as a layer sees it; a quantized one as it is stored."""
    variable = vars(module).get(name)
    if not isinstance(variable, nnx.Variable):
        return None
    return raw_value_of(variable) if is_quantized_variable(variable) else value_of(variable)
