"""A model of Flax, called with adapters as one more argument."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import chex

from lora_jax.core.products._product import PRODUCTS
from lora_jax.core.products._row_ids import checked_ids
from lora_jax.layers._handlers import Handlers, handlers_of_call
from lora_jax.layers._place_adapters import CallIds, is_complete
from lora_jax.models._front_end import front_end
from lora_jax.tracing._map_rows import over_rows
from lora_jax.trees._pair import base_of, nodes_of
from lora_jax.trees._stack_size import stack_size


def lora_apply(
    model: Any,
    variables: Any,
    adapters: chex.ArrayTree,
    /,
    *args: Any,
    adapter_ids: Any = None,
    in_axes: Any = ...,
    out_axes: Any = ...,
    variable_axes: Mapping[str, Any] | None = None,
    spmd_axis_name: Any = None,
    adapter_dropout: bool | None = None,
    dropout_key: chex.PRNGKey | None = None,
    allow_unused: bool = False,
    handlers: Handlers | None = None,
    product: str = "auto",
    **kwargs: Any,
) -> Any:
    """The adapted model, called: ``model.apply(variables, *args, **kwargs)`` of a Linen model.

    A Flax NNX model is called as ``model(*args, **kwargs)``. It is given as ``graphdef`` and
    ``state``, ``graphdef, state = nnx.split(model)``; the model object may stand for the graphdef.
    No object of yours is changed.

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
    one for adapters.) With an NNX model it is active when the call passes ``dropout_key``.

    With ``adapter_ids`` each example of the batch has its own adapter, of a stack
    (:func:`lora_jax.stack`), or with the id -1 the base alone. By definition that is ``jax.vmap``
    of a call with one row, a batch of the size 1, over ``(id, row)``, so every row has what it
    would have alone, and the product with ``W`` is computed once for all of them. One array among
    the arguments has its rows in the first axis. Where there are several, or a cache, ``in_axes``
    and ``variable_axes`` say it. Numbers are for all rows, and each row has its own key of
    every one in ``rngs``, and of the ``nnx.RngKey`` in a state. Ids may be traced: other ids, and
    other adapters of the same shapes, are no other program. An id that is of no adapter is an
    error, or, traced, gives NaN in its row.

    Args:
      model: the model; it need not know of this library. A ``flax.linen`` module; a Flax model
        of Hugging Face, which is called as ``model(*args, params=..., **kwargs)``; or the
        ``nnx.GraphDef`` of an NNX model, or that model.
      variables: its variables, with the frozen base: ``{"params": frozen}``; other collections
        (``batch_stats``, ``cache``) as for ``model.apply``. Of an NNX model its ``nnx.State``, as
        :func:`lora_jax.lora_init` returned it.
      adapters: the adapters from :func:`lora_jax.lora_init`.
      *args: for ``model.apply``, or for the NNX model.
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
        ``{"cache": 0}``, of an NNX model by the types of variables, ``{nnx.Cache: 0}``, or ``None``
        or a tree in the place of ``0``. Arrays that have no such axis are one for all rows.
        ``batch_stats`` has no rows. Those that the call makes have them in the axis of the batch,
        unless it says another.
      spmd_axis_name: the axis of a mesh that the rows are sharded by, as for ``jax.vmap``: for
        models that say how their activations are sharded, and leave the batch out of it.
      adapter_dropout: whether adapters have their dropout; by default as above.
      dropout_key: a key for the dropout of adapters in an NNX model. (A Linen model has ``rngs``.)
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
        ``capture_intermediates``, and the model's own. For an NNX model ``method``, a name or a
        function of the model; ``mutable``, ``True`` or a filter of NNX such as ``nnx.BatchStat``;
        and the model's own.

    Returns:
      What ``model.apply`` returns. Of an NNX model what it returns; with ``mutable`` that and its
      state after the call, of what the filter says, with the frozen base as it was given.

    Raises:
      TypeError: if ``model`` is not a model of Flax, or ``variables`` not of its library, or
        ``handlers`` not :class:`lora_jax.Handlers`, or if a tree is not a nested dict, or one as a
        file has it, of arrays only.
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

      An NNX model:

      >>> from flax import nnx
      >>> graphdef, state = nnx.split(nnx.Linear(5, 3, rngs=nnx.Rngs(0)))
      >>> frozen, adapters = lora_jax.lora_init(jax.random.key(1), state, config)
      >>> lora_jax.lora_apply(graphdef, frozen, adapters, x).shape
      (2, 3)
    """
    called = front_end(model, variables, "lora_apply")
    if product not in PRODUCTS:
        raise ValueError(f"lora_apply(product=...) must be one of {PRODUCTS}, got {product!r}.")
    handlers = handlers_of_call(handlers)
    kwargs = called.with_keys(dropout_key, kwargs)
    one = functools.partial(
        called.apply,
        dropout=called.has_dropout(adapter_dropout, args, kwargs),
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
        return called.result(one(called.rest, adapters, args, kwargs), kwargs)

    base = base_of(called.base)
    nodes = nodes_of(adapters, base=base)
    count = stack_size(list(nodes.values()), "adapter_ids is")
    ids = checked_ids(adapter_ids, count)
    call_ids = functools.partial(
        CallIds, count=count, base_is_complete=is_complete(base, nodes, ids), of_row=ids.ndim > 0
    )
    if ids.ndim == 0:
        return called.result(one(called.rest, adapters, args, kwargs, call_ids(ids)), kwargs)

    def row(id_: chex.Array, rest: Any, args: Any, kwargs: Any) -> Any:
        id_ = id_[None] if id_.ndim else id_  # (1, tokens)
        return one(rest, adapters, args, kwargs, call_ids(id_))

    out = over_rows(
        row,
        ids,
        called.rest,
        args,
        kwargs,
        in_axes=in_axes,
        out_axes=out_axes,
        variable_axes=called.axes_by_name(variable_axes or {}),
        spmd_axis_name=spmd_axis_name,
        keys=called.KEYS,
        gives_variables=called.gives_variables(kwargs),
    )
    return called.result(out, kwargs)
