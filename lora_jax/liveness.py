"""Which inputs of a traced function its outputs depend on.

Nothing public in JAX tells, so this reads what ``jax.make_jaxpr`` gives. How a loop, a branch or a
call is written down there is nobody's promise: jax 0.11 changed it for ``jax.lax.scan``. So each is
known by its name, and its functions must take and give the very types that they would if it were
as it is known here. Where they do not, and for whatever has another name, every input counts as
used. :func:`lora_jax.kernel_axes` may then say of a kernel that it is read in another place too,
and ``lora_init`` asks for ``tied=`` in its rule: an error too many, and never an adapter that
silently changes one use of two. And a parameter that is never read may pass for one that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax.extend.core import Literal


def live_inputs(jaxpr: Any, live_outputs: Sequence[bool]) -> list[bool]:
    """Says of every input of a jaxpr whether one of the live outputs may depend on it.

    It looks into loops, branches, and calls, and so into functions with a gradient of their own,
    for which the tools of jax assume that every input is used.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> jaxpr = jax.make_jaxpr(jax.jit(lambda x, y: (x + 1, y * 0 + x)))(1.0, 2.0).jaxpr
      >>> live_inputs(jaxpr, [True, False]), live_inputs(jaxpr, [True, True])
      ([True, False], [True, True])
    """
    live = {
        v for v, is_live in zip(jaxpr.outvars, live_outputs, strict=True) if is_live and _is_var(v)
    }
    for eqn in reversed(jaxpr.eqns):
        outputs = [v in live for v in eqn.outvars]
        if any(outputs) or eqn.effects:
            look_into = _KNOWN.get(eqn.primitive.name)
            inputs = look_into(eqn, outputs) if look_into else None
            if inputs is None:
                inputs = [True] * len(eqn.invars)
            uses = zip(eqn.invars, inputs, strict=True)
            live |= {v for v, is_live in uses if is_live and _is_var(v)}
    return [v in live for v in jaxpr.invars]


def _is_var(v: Any) -> bool:
    return not isinstance(v, Literal)  # which cannot be hashed


# --- what is known of jax; each gives None where it is not so ---


def _call(eqn: Any, outputs: list[bool]) -> list[bool] | None:
    """One function, of all inputs, that gives all outputs."""
    called = _functions(eqn.params.values())
    # No types, as those inside shard_map are of one device.
    if len(called) != 1 or _sizes(called[0]) != _sizes(eqn):
        return None
    return live_inputs(called[0], outputs)


def _scan(eqn: Any, outputs: list[bool]) -> list[bool] | None:
    """``consts, carry, xs -> carry, ys``: the body has an axis less of ``xs`` and of ``ys``."""
    called = _functions(eqn.params.values())
    if len(called) != 1 or _sizes(called[0]) != _sizes(eqn):
        return None
    body = called[0]
    carry = _alike(_types(body.outvars), _types(eqn.outvars))
    kept = _alike(_types(body.invars), _types(eqn.invars))
    consts = kept - carry
    takes = _types(eqn.invars[:kept]) + _sliced(eqn.invars[kept:])
    gives = _types(eqn.outvars[:carry]) + _sliced(eqn.outvars[carry:])
    if consts < 0 or not _runs(body, takes, gives) or takes[consts:kept] != gives[:carry]:
        return None
    inputs, carried = _round(body, consts, outputs[:carry], outputs[carry:])
    return inputs[:consts] + carried + inputs[kept:]


def _while(eqn: Any, outputs: list[bool]) -> list[bool] | None:
    """``consts of the condition, consts of the body, carry -> carry``."""
    called = _functions(eqn.params.get(name) for name in ("cond_jaxpr", "body_jaxpr"))
    if len(called) != 2:
        return None
    cond, body = called
    carry = _types(eqn.outvars)
    of_cond, of_body = (len(one.invars) - len(carry) for one in called)
    if (
        min(of_cond, of_body) < 0
        or _types(cond.invars) != _types(eqn.invars[:of_cond]) + carry
        or not _runs(body, _types(eqn.invars[of_cond:]), carry)
    ):
        return None
    decides = live_inputs(cond, [True] * len(cond.outvars))
    inputs, carried = _round(body, of_body, _join(outputs, decides[of_cond:]), [])
    return decides[:of_cond] + inputs[:of_body] + carried


def _cond(eqn: Any, outputs: list[bool]) -> list[bool] | None:
    """``index, operands -> results``, each branch from the operands to the results."""
    branches = _functions(eqn.params.get("branches") or ())
    operands, results = _types(eqn.invars[1:]), _types(eqn.outvars)
    if not branches or not all(_runs(branch, operands, results) for branch in branches):
        return None
    inputs = [False] * len(operands)
    for branch in branches:
        inputs = _join(inputs, live_inputs(branch, outputs))
    return [True, *inputs]


# What only calls a function, in any version of jax that is supported.
_CALLS = (
    "jit pjit call closed_call core_call remat remat2 checkpoint compute_on xla_metadata_call "
    "custom_jvp_call custom_vjp_call custom_vmap_call custom_dce_call shard_map"
)
_KNOWN: dict[str, Callable[[Any, list[bool]], list[bool] | None]] = {
    **dict.fromkeys(_CALLS.split(), _call),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}


def _round(
    body: Any, consts: int, carry: list[bool], results: list[bool]
) -> tuple[list[bool], list[bool]]:
    """The inputs that the body of a loop uses, and what goes round, in however many rounds."""
    while True:
        inputs = live_inputs(body, carry + results)
        before, carry = carry, _join(carry, inputs[consts : consts + len(carry)])
        if carry == before:
            return inputs, carry


def _functions(values: Iterable[Any]) -> list[Any]:
    """The jaxprs in parameters of an equation."""
    # With constants, which a closed one has, or without.
    return [one for value in values if hasattr(one := getattr(value, "jaxpr", value), "eqns")]


def _runs(function: Any, takes: list[Any], gives: list[Any]) -> bool:
    """Whether a function takes and gives these types."""
    return (_types(function.invars), _types(function.outvars)) == (takes, gives)


def _sizes(eqn: Any) -> tuple[int, int]:
    return len(eqn.invars), len(eqn.outvars)


def _types(variables: Iterable[Any]) -> list[tuple[Any, Any]]:
    avals = (v.aval for v in variables)
    return [(getattr(aval, "shape", None), getattr(aval, "dtype", None)) for aval in avals]


def _sliced(variables: Iterable[Any]) -> list[tuple[Any, Any]]:
    return [(shape[1:] if shape else None, dtype) for shape, dtype in _types(variables)]


def _alike(a: Sequence[Any], b: Sequence[Any]) -> int:
    return sum(x == y for x, y in zip(a, b, strict=True))


def _join(a: Sequence[bool], b: Sequence[bool]) -> list[bool]:
    return [x or y for x, y in zip(a, b, strict=True)]
