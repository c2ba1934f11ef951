"""The interceptor of one ``lora_apply``: it gives each adapted layer to its handler.

A layer is adapted where the function in the layer's own class body runs, as
``_handler_entry.py`` finds it. Its adapter is read from the scope of the module, so it is the one
that the transforms around the layer have sliced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import chex
import flax.linen as nn
import jax

from lora_jax import _compat as compat
from lora_jax.core._adapter import Adapter
from lora_jax.core._boxes import content, is_quantized
from lora_jax.core.products._adapted_kernel import AdaptedKernel, ComputesItself
from lora_jax.core.products._observer import Unseen
from lora_jax.core.products._shared_input import SharedInputs
from lora_jax.layers._entry import Entry
from lora_jax.layers._handlers import Handlers, entry_of
from lora_jax.layers._place_adapters import Placed
from lora_jax.linen._layer_output import layer_output
from lora_jax.linen._params import SUFFIX
from lora_jax.linen._refuse_mapped import OF_NNX, refuse_mapped
from lora_jax.trees._paths import Key, path_of


class _Active(threading.local):
    """The interceptors that are active: of one call inside another, the inner one adapts."""

    stack: tuple[Interceptor, ...] = ()


_ACTIVE = _Active()


@dataclasses.dataclass(eq=False)
class Interceptor:
    """The interceptor of one call, and what it saw.

    Attributes:
      handlers: of the call.
      placed: the adapters next to kernels, as no transform has sliced them yet.
      codes: the identities of the codes of quantized kernels, likewise.
      classes: of the modules that were called, by their paths.
      used: the paths of the kernels that a handler has computed with.
    """

    handlers: Handlers
    placed: Mapping[Key, Placed] = dataclasses.field(default_factory=dict)
    codes: Collection[int] = ()
    classes: dict[Key, list[type[nn.Module]]] = dataclasses.field(default_factory=dict)
    used: set[str] = dataclasses.field(default_factory=set)
    _draws: dict[str, int] = dataclasses.field(default_factory=dict)
    _inputs: SharedInputs = dataclasses.field(default_factory=SharedInputs)
    _maps: compat.Maps = dataclasses.field(default_factory=compat.Maps)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Intercepts the calls of modules."""
        _ACTIVE.stack = (*_ACTIVE.stack, self)
        try:
            with nn.intercept_methods(self._intercept):
                yield
        finally:
            _ACTIVE.stack = _ACTIVE.stack[:-1]

    def _intercept(
        self,
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        adapts = _ACTIVE.stack[-1] is self and not isinstance(module, compat.Probe)
        if module.scope is None or not adapts:
            return next_fun(*args, **kwargs)
        if isinstance(module, nn.WeightNorm | nn.SpectralNorm):
            refuse_mapped(module.layer_instance)
        if compat.is_nnx_in_linen(module):
            refuse_mapped(module, OF_NNX)
        classes = self.classes.setdefault(module.path, [])
        if type(module) not in classes:
            classes.append(type(module))
        entry = entry_of(self.handlers, context.orig_method)
        names = entry.names(module) if entry else ()
        if entry is None or not any(map(functools.partial(_is_for_handler, module), names)):
            return self._inside(next_fun, args, kwargs)
        adapted = any(module.has_variable("params", n + SUFFIX) for n in names)
        kernels = tuple(self._kernel(module, name, entry, adapted) for name in names)
        try:
            return layer_output(entry, kernels, next_fun, args, kwargs, context)
        except ComputesItself:
            return self._inside(next_fun, args, kwargs)

    def _inside(
        self, next_fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Calls a module whose layers may share inputs."""
        outside, self._inputs = self._inputs, SharedInputs()
        try:
            return next_fun(*args, **kwargs)
        finally:
            self._inputs = outside

    def _kernel(
        self, module: nn.Module, name: str, entry: Entry, adapted: bool
    ) -> AdaptedKernel | None:
        """A kernel of a module for its handler, with its adapter if there is one.

        Args:
          module: the layer.
          name: of its parameter.
          entry: has the handler.
          adapted: whether a kernel of the layer has an adapter.
        """
        if not module.has_variable("params", name):
            return None
        value = content(module.get_variable("params", name))
        if is_quantized(value) and self._maps_codes(module, value):
            raise ValueError(
                f"{path_of((*module.path, name))!r} is quantized, and its layer is inside of "
                f"nn.map_variables, which would map codes and scales: leave it out of what is "
                f"quantized."
            )
        of_handler: dict[str, Any] = {"built_in": entry.built_in}
        if not module.has_variable("params", name + SUFFIX):
            path = path_of((*module.path, name))
            return AdaptedKernel(path, value, **of_handler, optional=not adapted)
        placed: Placed = module.get_variable("params", name + SUFFIX)
        path, adapter = placed.path, placed.adapter
        if placed.cut:
            return AdaptedKernel(path, value, observer=Unseen())
        if id(_first(adapter)) not in self._as_placed and self._maps.may_be_of_params(module):
            refuse_mapped(module)

        rng = self._dropout_rng(module, path) if adapter.dropout else None
        use = functools.partial(self.used.add, path)
        return AdaptedKernel(
            path,
            value,
            adapter,
            rng,
            use=use,
            ids=placed.ids,
            product=placed.product,
            inputs=self._inputs,
            **of_handler,
        )

    def _maps_codes(self, module: nn.Module, value: Any) -> bool:
        """Whether a map of variables has changed codes, which no other transform has made."""
        return id(value.codes) not in self.codes and self._maps.may_be_of_params(module)

    @functools.cached_property
    def _as_placed(self) -> set[int]:
        """The factors that no transform has replaced."""
        return {id(_first(node.adapter)) for node in self.placed.values()}

    def _dropout_rng(self, module: nn.Module, path: str) -> chex.PRNGKey:
        """A key from the module's own stream, which then goes on as if it had not been asked."""
        if not module.has_rng("dropout"):
            raise ValueError(
                f"The adapter of {path!r} has dropout, but its module has no 'dropout' rng. If an "
                f"nn.scan or nn.vmap around it does not pass it on, add "
                f"split_rngs={{'dropout': True}} there; else set dropout=0 in the rule."
            )
        rng = compat.key_aside(module, "dropout")
        self._draws[path] = self._draws.get(path, 0) + 1
        return jax.random.fold_in(rng, zlib.crc32(f"{path}{SUFFIX}{self._draws[path]}".encode()))


def _first(adapter: Adapter) -> Any:
    return next(iter(adapter.arrays.values()))


def _is_for_handler(module: nn.Module, name: str) -> bool:
    """Whether a kernel has an adapter, or is quantized, so that its layer must not keep it."""
    return module.has_variable("params", name + SUFFIX) or (
        module.has_variable("params", name)
        and is_quantized(content(module.get_variable("params", name)))
    )
