"""Which inputs of a traced function come unchanged to the places where they are marked.

A parameter that the model computes with before its layer does, as ``nnx.WeightNorm`` does, is
another kernel there. It is one still where it is sliced by a loop, has its axes in another order
for one, or is converted to another dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_jax._compat import Branches, Loop, is_literal, mark_of, passed_on, written


def changed_marks(jaxpr: Any, marks: Sequence[str | None]) -> set[str]:
    """The marks that are on something else than the input that is marked so.

    Args:
      jaxpr: of the function.
      marks: for each of its inputs the name of its mark, ``None`` for those that have none.

    Example:
      >>> import jax
      >>> from jax.ad_checkpoint import checkpoint_name
      >>> def function(W, x):
      ...     checkpoint_name(W.astype("bfloat16"), "W")
      ...     checkpoint_name(2 * x, "x")
      ...     return x
      >>> changed_marks(jax.make_jaxpr(jax.jit(function))(1.0, 2.0).jaxpr, ["W", "x"])
      {'x'}
    """
    changed: set[str] = set()
    _outputs(jaxpr, marks, frozenset(filter(None, marks)), changed)
    return changed


def _outputs(
    jaxpr: Any, marks: Sequence[str | None], all_marks: frozenset[str], changed: set[str]
) -> list[str | None]:
    """Which inputs the outputs are."""
    known = {v: mark for v, mark in zip(jaxpr.invars, marks, strict=True) if mark is not None}

    def marks_of(variables: Sequence[Any]) -> list[str | None]:
        return [None if is_literal(v) else known.get(v) for v in variables]

    for eqn in jaxpr.eqns:
        given = marks_of(eqn.invars)
        mark = mark_of(eqn)
        if mark in all_marks and given[0] != mark:
            changed.add(mark)
        for v, out in zip(eqn.outvars, _outputs_of(eqn, given, all_marks, changed), strict=True):
            if out is not None:
                known[v] = out
    return marks_of(jaxpr.outvars)


def _outputs_of(
    eqn: Any, given: list[str | None], all_marks: frozenset[str], changed: set[str]
) -> list[str | None]:
    match written(eqn):
        case Branches(functions, deciding):
            each = [_outputs(f, given[deciding:], all_marks, changed) for f in functions]
            return [outs[0] if len(set(outs)) == 1 else None for outs in zip(*each, strict=True)]
        case Loop() as loop:
            return _outputs_of_loop(loop, given, all_marks, changed)
    return passed_on(eqn, given)


def _outputs_of_loop(
    loop: Loop, given: list[str | None], all_marks: frozenset[str], changed: set[str]
) -> list[str | None]:
    of_test = 0 if loop.test is None else len(loop.test.invars) - loop.carry
    start, kept = of_test + loop.consts, of_test + loop.consts + loop.carry
    consts, carried, xs = given[of_test:start], given[start:kept], given[kept:]
    while True:  # until what is carried is the same behind the body
        inside: set[str] = set()
        outs = _outputs(loop.body, consts + carried + xs, all_marks, inside)
        before = carried
        carried = [a if a == b else None for a, b in zip(before, outs[: loop.carry], strict=True)]
        if carried == before:
            break
    if loop.test is not None:
        _outputs(loop.test, given[:of_test] + carried, all_marks, inside)
    changed |= inside
    whole = set(consts + carried)  # many of one are not that one
    return carried + [y if y in xs and y not in whole else None for y in outs[loop.carry :]]
