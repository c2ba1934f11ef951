"""``model.apply`` of a Flax Linen model, with adapters as one more argument."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import chex

from lora_jax.core.products._product import PRODUCTS
from lora_jax.core.products._row_ids import checked_ids
from lora_jax.linen._check_use import check_ties, check_used
from lora_jax.linen._dropout_is_active import dropout_is_active, has_dropout_rng
from lora_jax.linen._handlers import Handlers, handlers_of_call
from lora_jax.linen._interceptor import Interceptor
from lora_jax.linen._model_call import (
    call_model,
    check_model,
)
from lora_jax.linen._place_adapters import CallIds, is_complete, place, restored
from lora_jax.tracing._map_rows import gives_variables, over_rows
from lora_jax.trees._pair import base_of, nodes_of
from lora_jax.trees._stack_size import stack_size


def lora_apply(
    model: Any,
    variables: Mapping[str, Any],
    adapters: chex.ArrayTree,
    /,
    *args: Any,
    adapter_ids: Any = None,
    in_axes: Any = ...,
    out_axes: Any = ...,
    variable_axes: Mapping[str, Any] | None = None,
    spmd_axis_name: Any = None,
    adapter_dropout: bool | None = None,
    allow_unused: bool = False,
    handlers: Handlers | None = None,
    product: str = "auto",
    **kwargs: Any,
) -> Any:
    """``model.apply(variables, *args, **kwargs)`` of the adapted model.

    Every layer that has an adapter computes ``x W'`` in place of ``x W``, in its own dtype; the
    model's code is not changed and the base is not copied. (With ``Rule(materialize=True)`` the
    parameter itself is replaced by ``W'``.) Differentiate with respect to
    ``adapters``, and pass the base as an argument to the jitted function: what a jitted function
    closes over is compiled into it as a constant.

    Adapter dropout (``Rule(dropout=...)``) is active when the call passes a ``dropout`` rng,
    ``rngs={"dropout": key}``; ``adapter_dropout`` says whether it is. As a convenience it is off
    as well where the call evaluates in Flax's words: ``deterministic=True``, ``train=False``,
    ``training=False``, ``is_training=False`` or ``enable_dropout=False``, as an argument or as the
    default of the model's method. (An rng by another name, on which Flax would fall back, is not
    one for adapters.)

    With ``adapter_ids`` each example of the batch has its own adapter, of a stack
    (:func:`lora_jax.stack`), or with the id -1 the base alone. By definition that is ``jax.vmap``
    of a call with one row, a batch of the size 1, over ``(id, row)``, so every row has what it
    would have alone, and the product with ``W`` is computed once for all of them. One array among
    the arguments has its rows in the first axis. Where there are several, or a cache, ``in_axes``
    and ``variable_axes`` say it. Numbers are for all rows, and each row has its own key of
    every one in ``rngs``. Ids may be traced: other ids, and other adapters of the same shapes, are
    no other program. An id that is of no adapter is an error, or, traced, gives NaN in its row.

    Args:
      model: the model; it need not know of this library. A ``flax.linen`` module, or a Flax model
        of Hugging Face, which is called as ``model(*args, params=..., **kwargs)``.
      variables: its variables, with the frozen base: ``{"params": frozen}``; other collections
        (``batch_stats``, ``cache``) as for ``model.apply``.
      adapters: the adapters from :func:`lora_jax.lora_init`.
      *args: for ``model.apply``.
      adapter_ids: integers, ``(batch,)`` for one adapter for each example, ``(batch, tokens)`` for
        one for each token, where these are the axes behind the batch of every adapted layer's
        input; or one number, for one adapter for all. With it ``adapters`` are stacked, and
        ``variables`` may have all parameters: a leaf that was fully trained is there for the rows
        with the base alone.
      in_axes: where arguments have the rows of ``adapter_ids``, as for ``jax.vmap``: an axis for
        all, with ``None`` for what is one for all rows; or a tuple with one for each of ``args``,
        and behind them a dict for keyword arguments; or that dict alone. In the place of an axis
        may be a tree of them.
      out_axes: where the result has the rows, as for ``jax.vmap``. By default it is the axis of
        the batch, for which the model is traced with two rows where it is not plainly the first.
      variable_axes: where the other collections have them, as for ``flax.linen.vmap``:
        ``{"cache": 0}``, or ``None`` or a tree in the place of ``0``. Arrays that have no such axis
        are one for all rows. ``batch_stats`` has no rows. Those that the call makes have them in
        the axis of the batch, unless it says another.
      spmd_axis_name: the axis of a mesh that the rows are sharded by, as for ``jax.vmap``: for
        models that say how their activations are sharded, and leave the batch out of it.
      adapter_dropout: whether adapters have their dropout; by default as above.
      allow_unused: allow adapters that this call does not use, for a ``method`` that runs a part
        of the model. Otherwise they are an error: they would not be trained.
      handlers: which layers can be adapted, and by which handlers, in place of those that are
        registered (:func:`lora_jax.register`). An argument of the model with this name, as with
        the others here, can be passed by position only.
      product: how a layer that is a product of two matrices computes ``x W'``: ``"factored"``,
        ``x W + s (x U) V``; ``"outer"``, the same as ``x W + s sum_r (x U)_r V_r``, meant for TPUs
        and small ranks; ``"dense"``, ``x (W + s U V)``, which rounds small updates away in 16 bits
        and is refused there; or ``"auto"``: dense where that is exact and faster, else factored.
        Outputs and gradients are the same to rounding. (Second derivatives in a magnitude of zero
        need ``"factored"`` or ``"outer"``.)
      **kwargs: for ``model.apply``: ``rngs``, ``mutable``, ``method``,
        ``capture_intermediates``, and the model's own.

    Returns:
      What ``model.apply`` returns.

    Raises:
      TypeError: if ``model`` is not a ``flax.linen`` module, or ``handlers`` not
        :class:`lora_jax.Handlers`, or if a tree is not a nested dict, or one as a file has it, of
        arrays only.
      ValueError: if the adapters do not fit the base or the model, if the base has integers, as
        the codes of a quantized one are, if an adapter was not used, or if ``product`` is not
        possible. The message names the culprit.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lora_jax
      >>> model, x = nn.Dense(3), jnp.ones((2, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=2)])
      >>> frozen, adapters = lora_jax.lora_init(jax.random.key(1), params, config)
      >>> def loss(adapters, frozen):
      ...     return jnp.mean(lora_jax.lora_apply(model, {"params": frozen}, adapters, x) ** 2)
      >>> grads = jax.grad(loss)(adapters, frozen)
      >>> grads["kernel"].U.shape
      (5, 2)
    """
    check_model(model, variables, "lora_apply")
    if product not in PRODUCTS:
        raise ValueError(f"lora_apply(product=...) must be one of {PRODUCTS}, got {product!r}.")
    handlers = handlers_of_call(handlers)
    if adapter_dropout is None:
        adapter_dropout = dropout_is_active(model, args, kwargs)
    elif adapter_dropout and not has_dropout_rng(kwargs):
        raise ValueError("adapter_dropout=True needs a key: pass rngs={'dropout': key}.")
    one = functools.partial(
        _apply,
        model,
        dropout=adapter_dropout,
        allow_unused=allow_unused,
        handlers=handlers,
        product=product,
    )
    if adapter_ids is None:
        if any(axes is not Ellipsis for axes in (in_axes, out_axes)) or variable_axes:
            raise ValueError(
                "in_axes, out_axes and variable_axes say where the rows of adapter_ids are: pass "
                "adapter_ids too, or leave them out."
            )
        return one(variables, adapters, args, kwargs)

    base = base_of(variables["params"])
    nodes = nodes_of(adapters, base=base)
    count = stack_size(list(nodes.values()), "adapter_ids is")
    ids = checked_ids(adapter_ids, count)
    call_ids = functools.partial(
        CallIds, count=count, base_is_complete=is_complete(base, nodes, ids), of_row=ids.ndim > 0
    )
    if ids.ndim == 0:
        return one(variables, adapters, args, kwargs, call_ids(ids))

    def row(id_: chex.Array, rest: Any, args: Any, kwargs: Any) -> Any:
        of_row = {**rest, "params": variables["params"]}
        id_ = id_[None] if id_.ndim else id_  # (1, tokens)
        return one(of_row, adapters, args, kwargs, call_ids(id_))

    return over_rows(
        row,
        ids,
        {name: tree for name, tree in variables.items() if name != "params"},
        args,
        kwargs,
        in_axes=in_axes,
        out_axes=out_axes,
        variable_axes=variable_axes or {},
        spmd_axis_name=spmd_axis_name,
    )


def _apply(
    model: Any,
    variables: Mapping[str, Any],
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
    """:func:`lora_apply` with one adapter, or of one row of the batch."""
    frozen = variables["params"]
    params, placed = place(
        frozen, adapters, ids, dropout=dropout, handlers=handlers, product=product
    )

    def call(params: chex.ArrayTree, interceptor: Interceptor) -> Any:
        with interceptor.active():
            return call_model(model, {**variables, "params": params}, args, kwargs)

    interceptor = Interceptor(handlers, placed)
    out = call(params, interceptor)
    if not allow_unused:
        check_used(call, params, interceptor, model, kwargs.get("method"))
    given = params, {**variables, "params": None}, args, kwargs
    check_ties(call, params, placed, model, given, kwargs)
    if not gives_variables(kwargs):
        return out
    y, changed = out
    if "params" not in changed:
        return out
    return y, {**changed, "params": restored(changed["params"], frozen, params)}
