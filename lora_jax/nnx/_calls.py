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

from lora_jax._compat import trace_state
from lora_jax.core.products._adapted_kernel import AdaptedKernel
from lora_jax.core.products._observer import Unseen
from lora_jax.core.products._shared_input import SharedInputs
from lora_jax.layers._entry import Entry
from lora_jax.layers._handlers import Handlers
from lora_jax.layers._place_adapters import Placed
from lora_jax.nnx._variables import value_of

# Something next to a kernel is called as its parameter and this.
SUFFIX = "@lora"

CHANGED = (
    "its value is another one when its layer is called, as nnx.WeightNorm and nnx.SpectralNorm "
    "change it, and an adapter would not be changed alike"
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
      given: the kernels as the model was given them, by their paths.
      reached: the paths of the kernels whose layer was called.
      used: the paths of the kernels that a handler has computed with.
    """

    handlers: Handlers
    given: Mapping[str, Any]
    reached: set[str] = dataclasses.field(default_factory=set)
    used: set[str] = dataclasses.field(default_factory=set)
    _draws: dict[str, int] = dataclasses.field(default_factory=dict)
    _state: Any = dataclasses.field(default_factory=trace_state)
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
        del method, entry
        value = _value_in(module, name)
        if value is None:
            return None
        beside = vars(module).get(name + SUFFIX)
        if beside is None:
            return AdaptedKernel(name, value)
        placed: Placed = value_of(beside)
        path, adapter = placed.path, placed.adapter
        if placed.cut:
            return AdaptedKernel(path, value, observer=Unseen())
        if changed_by_model(self.given.get(path), value, self._state):
            raise ValueError(
                f"The kernel {path!r} cannot be adapted in its layer: {CHANGED}. Give it a rule "
                f"with materialize=True."
            )
        return AdaptedKernel(
            path,
            value,
            adapter,
            self._dropout_key(placed),
            use=functools.partial(self.used.add, path),
            ids=placed.ids,
            product=placed.product,
            inputs=self._shared_inputs(),
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


def changed_by_model(given: Any, value: Any, state: Any) -> bool:
    """Whether the model has changed a kernel before its layer is called, as far as it is known.

    Args:
      given: the kernel as the model was given it.
      value: as the layer has it.
      state: of JAX's traces where the model was called. Inside of a transform that has begun since
        every array is another one.
    """
    return (
        given is not None
        and value is not given
        and value.shape == given.shape
        and trace_state() == state
    )


def _value_in(module: nnx.Module, name: str) -> Any:
    variable = vars(module).get(name)
    return value_of(variable) if isinstance(variable, nnx.Variable) else None
