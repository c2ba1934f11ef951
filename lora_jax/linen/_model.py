"""A Flax Linen model with adapters in its variables: what ``lora_apply`` needs to know of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import chex

from lora_jax.core._boxes import content, is_quantized
from lora_jax.core._model_axes import ModelAxes
from lora_jax.layers._check_use import (
    check_ties,
    check_used,
    name_of_call,
    not_called,
    not_computed,
)
from lora_jax.layers._handlers import Handlers
from lora_jax.layers._place_adapters import CallIds, Placed, place
from lora_jax.linen._dropout_is_active import dropout_is_active, has_dropout_rng
from lora_jax.linen._interceptor import Interceptor
from lora_jax.linen._kernel_axes import axes_of_call
from lora_jax.linen._model_call import (
    call_model,
    check_model,
    gives_variables,
)
from lora_jax.linen._params import restored, with_adapters
from lora_jax.tracing._arrays_in import arrays_in
from lora_jax.trees._paths import Key


@dataclasses.dataclass(frozen=True)
class LinenModel:
    """A model and its variables.

    Attributes:
      model: a ``flax.linen`` module, or a Flax model of Hugging Face.
      base: the frozen base.
      rest: the other collections.
    """

    model: Any
    base: chex.ArrayTree
    rest: Mapping[str, Any]

    # Arguments with keys of random numbers: of a mixed batch each row gets its own keys.
    KEYS = ("rngs", "dropout_rng")

    @property
    def params(self) -> chex.ArrayTree:
        """What ``lora_init`` splits."""
        return self.base

    @classmethod
    def of(cls, model: Any, variables: Any, name: str) -> LinenModel:
        """The first two arguments of a function, checked.

        Raises:
          TypeError: if the model is not one.
          ValueError: if the variables lack the collection ``"params"``.
        """
        check_model(model, variables, name)
        rest = {name: tree for name, tree in variables.items() if name != "params"}
        return cls(model, variables["params"], rest)

    def axes(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], handlers: Handlers
    ) -> ModelAxes:
        """The axes of the kernels, from one abstract call."""
        variables = {**self.rest, "params": self.base}
        return axes_of_call(self.model, variables, args, kwargs, handlers)

    def with_keys(self, key: chex.PRNGKey | None, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments, with all keys of random numbers among them, as they are.

        Raises:
          TypeError: if there is a key for the dropout of adapters, which is one of ``rngs``.
        """
        if key is not None:
            raise TypeError(
                "dropout_key= is for NNX models. A Linen model has it in rngs: pass "
                "rngs={'dropout': key}."
            )
        return dict(kwargs)

    def has_dropout(self, wanted: bool | None, args: Any, kwargs: Mapping[str, Any]) -> bool:
        """Whether adapters have their dropout in a call.

        Raises:
          ValueError: if it is wanted, and the call has no key for it.
        """
        if wanted is None:
            return dropout_is_active(self.model, args, kwargs)
        if wanted and not has_dropout_rng(kwargs):
            raise ValueError("adapter_dropout=True needs a key: pass rngs={'dropout': key}.")
        return wanted

    def apply(
        self,
        rest: Mapping[str, Any],
        adapters: chex.ArrayTree,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        ids: CallIds | None = None,
        *,
        dropout: bool,
        allow_unused: bool,
        handlers: Handlers,
        product: str,
    ) -> Any:
        """``model.apply`` with one adapter, or of one row of the batch.

        Args:
          rest: the other collections.
          adapters: the adapters, stacked if there are ids.
          args: of the model.
          kwargs: of the model and of ``apply``.
          ids: which of the adapters the call has.
          dropout: whether adapters have their dropout.
          allow_unused: allow adapters that the call does not use.
          handlers: of the call.
          product: how layers compute products of two matrices.
        """
        params, placed = place(
            self.base, adapters, ids, dropout=dropout, handlers=handlers, product=product
        )

        def call(tree: chex.ArrayTree, interceptor: Interceptor) -> Any:
            with interceptor.active():
                return call_model(self.model, {**rest, "params": tree}, args, kwargs)

        leaves = [content(leaf) for leaf in params.values()]
        codes = {id(leaf.codes) for leaf in leaves if is_quantized(leaf)}

        def results(params: Mapping[Key, Any], placed: Mapping[Key, Placed]) -> list[Any]:
            out = call(with_adapters(params, placed, self.base), Interceptor(handlers, {}, codes))
            if gives_variables(kwargs):  # that the parameters are given back is no use of them
                out = out[0], {name: tree for name, tree in out[1].items() if name != "params"}
            return list(arrays_in(out))

        interceptor = Interceptor(handlers, placed, codes)
        tree = with_adapters(params, placed, self.base)
        out = call(tree, interceptor)
        if not allow_unused:

            def message(key: Key, more: str) -> str:
                classes = interceptor.classes.get(key[:-1])
                if classes is not None:
                    return not_computed(key, more, classes[-1], handlers, other_than="nnx.")
                method = kwargs.get("method")
                reached = getattr(method, "__name__", method or "__call__")
                return not_called(key, more, f"{type(self.model).__name__}.{reached}")

            check_used(results, params, placed, interceptor.used, message)
        given = tree, rest, args, kwargs

        def name() -> str | None:
            with_variables = gives_variables(kwargs)
            return name_of_call(self.model, args, kwargs, kwargs.get("method"), with_variables)

        check_ties(results, params, placed, name, self.model, given)
        if not gives_variables(kwargs):
            return out
        y, changed = out
        if "params" not in changed:
            return out
        return y, {**changed, "params": restored(changed["params"], self.base, tree)}

    def gives_variables(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a call gives a result and variables, by its arguments."""
        return gives_variables(kwargs)

    def result(self, out: Any, kwargs: Mapping[str, Any]) -> Any:
        """What ``lora_apply`` returns, from what :meth:`apply` gives."""
        return out

    def axes_by_name(self, variable_axes: Mapping[Any, Any]) -> dict[str, Any]:
        """Axes of the collections by their names, as they are."""
        return dict(variable_axes)
