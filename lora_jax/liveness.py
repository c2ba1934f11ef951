"""Which inputs of a traced function its outputs depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


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
            uses = zip(eqn.invars, _inputs_of(eqn, outputs), strict=True)
            live |= {v for v, is_live in uses if is_live and _is_var(v)}
    return [v in live for v in jaxpr.invars]


def _inputs_of(eqn: Any, outputs: list[bool]) -> list[bool]:
    params = eqn.params
    if eqn.primitive.name == "scan":
        consts, carry = params["num_consts"], params["num_carry"]
        while True:
            inputs = live_inputs(params["jaxpr"].jaxpr, outputs)
            carried = inputs[consts : consts + carry]
            if _join(outputs[:carry], carried) == outputs[:carry]:
                return inputs[:consts] + outputs[:carry] + inputs[consts + carry :]
            outputs = _join(outputs[:carry], carried) + outputs[carry:]
    if eqn.primitive.name == "while":
        of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
        cond = live_inputs(params["cond_jaxpr"].jaxpr, [True])
        outputs = _join(outputs, cond[of_cond:])
        while True:
            body = live_inputs(params["body_jaxpr"].jaxpr, outputs)
            if _join(outputs, body[of_body:]) == outputs:
                return cond[:of_cond] + body[:of_body] + outputs
            outputs = _join(outputs, body[of_body:])
    if eqn.primitive.name == "cond":
        inputs = [False] * (len(eqn.invars) - 1)
        for branch in params["branches"]:
            inputs = _join(inputs, live_inputs(branch.jaxpr, outputs))
        return [True, *inputs]
    called = [getattr(value, "jaxpr", value) for value in params.values()]
    called = [value for value in called if hasattr(value, "eqns")]
    if len(called) != 1:
        return [True] * len(eqn.invars)
    sizes = len(called[0].invars), len(called[0].outvars)
    if sizes != (len(eqn.invars), len(eqn.outvars)):
        return [True] * len(eqn.invars)
    return live_inputs(called[0], outputs)


def _join(a: Sequence[bool], b: Sequence[bool]) -> list[bool]:
    return [x or y for x, y in zip(a, b, strict=True)]


def _is_var(v: Any) -> bool:
    return not hasattr(v, "val")  # a literal has one, and cannot be hashed
