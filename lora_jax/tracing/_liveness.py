"""Which inputs of a traced function its outputs depend on.

Nothing public in JAX tells. So this goes through what ``jax.make_jaxpr`` gives, and counts every
input as used where it does not know how jax writes something down
(:func:`lora_jax._compat.written`). :func:`lora_jax.kernel_axes` may then say of a kernel that it is
read in another place too, and ``lora_init`` asks for ``tied=`` in its rule: an error too many, and
never an adapter that silently changes one use of two. And a parameter that is not read may pass for
one that is.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from typing import Any

from lora_jax._compat import Branches, Loop, is_jit, is_literal, mark_of, written


def live_inputs(jaxpr: Any, live_outputs: Sequence[bool], *, effects: bool = True) -> list[bool]:
    """Says of every input of a jaxpr whether one of the live outputs, or an effect, depends on it.

    It looks into loops, branches, and calls, and so into functions with their own gradient,
    for which the tools of jax assume that every input is used.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> jaxpr = jax.make_jaxpr(jax.jit(lambda x, y: (x + 1, y * 0 + x)))(1.0, 2.0).jaxpr
      >>> live_inputs(jaxpr, [True, False]), live_inputs(jaxpr, [True, True])
      ([True, False], [True, True])
    """
    return _inputs(jaxpr, live_outputs, _Dead.NONE if effects else _Dead.NOT_EVEN_EFFECTS)


def read_inputs(jaxpr: Any) -> list[bool]:
    """Says of every input of a jaxpr whether an output depends on it, or what ``jax.jit`` holds.

    Inside ``jax.jit`` it counts as well where nothing comes of it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> dead = jax.jit(lambda x, y: (2 * x, y)[1])
      >>> read_inputs(jax.make_jaxpr(lambda x, y, z: (dead(x, y), z + 1)[0])(1.0, 2.0, 3.0).jaxpr)
      [True, True, False]
    """
    return _inputs(jaxpr, [True] * len(jaxpr.outvars), _Dead.IN_JIT)


def marked_inputs(jaxpr: Any) -> tuple[list[bool], set[str]]:
    """Says of every input of a jaxpr whether a marked value may depend on it; and the marks' names.

    Example:
      >>> import jax
      >>> from jax.ad_checkpoint import checkpoint_name
      >>> def product(x, y, z):
      ...     checkpoint_name(x + y, "lora_jax: input")
      ...     return z
      >>> marked_inputs(jax.make_jaxpr(jax.jit(product))(1.0, 2.0, 3.0).jaxpr)
      ([True, True, False], {'lora_jax: input'})
    """
    return _inputs(jaxpr, [False] * len(jaxpr.outvars), _Dead.MARKED), set(_marks(jaxpr))


# How names of marks begin.
OURS = "lora_jax: "


class _Dead(enum.Enum):
    """Which equations count as used although nothing comes of them."""

    NOT_EVEN_EFFECTS = enum.auto()  # none, also not those that have effects
    NONE = enum.auto()  # those that have effects
    MARKED = enum.auto()  # the marks
    IN_JIT = enum.auto()  # those inside of jax.jit, and those that have effects
    ALL = enum.auto()


def _inputs(jaxpr: Any, live_outputs: Sequence[bool], dead: _Dead) -> list[bool]:
    outputs = zip(jaxpr.outvars, live_outputs, strict=True)
    live = {v for v, is_live in outputs if is_live and not is_literal(v)}
    for eqn in reversed(jaxpr.eqns):
        given, how = [v in live for v in eqn.outvars], written(eqn)
        looked_into = (
            dead is _Dead.ALL
            or (dead in (_Dead.IN_JIT, _Dead.MARKED) and how is not None)
            or (dead is _Dead.MARKED and _mark(eqn) is not None)
        )
        has_effects = bool(eqn.effects) and dead not in (_Dead.NOT_EVEN_EFFECTS, _Dead.MARKED)
        if any(given) or has_effects or looked_into:
            uses = zip(eqn.invars, _inputs_of(eqn, how, given, dead), strict=True)
            live |= {v for v, is_live in uses if is_live and not is_literal(v)}
    return [v in live for v in jaxpr.invars]


def _inputs_of(
    eqn: Any, how: Branches | Loop | None, outputs: list[bool], dead: _Dead
) -> list[bool]:
    match how:
        case Branches(functions, deciding):
            if dead is _Dead.IN_JIT and is_jit(eqn):
                dead = _Dead.ALL
            inputs = [False] * (len(eqn.invars) - deciding)
            for function in functions:
                inputs = _join(inputs, _inputs(function, outputs, dead))
            return [True] * deciding + inputs
        case Loop() as loop:
            return _inputs_of_loop(loop, outputs, dead)
        case _:
            return [True] * len(eqn.invars)


def _inputs_of_loop(loop: Loop, outputs: list[bool], dead: _Dead) -> list[bool]:
    consts, kept = loop.consts, loop.consts + loop.carry
    carried, results = outputs[: loop.carry], outputs[loop.carry :]
    of_test: list[bool] = []
    if loop.test is not None:
        used = _inputs(loop.test, [True] * len(loop.test.outvars), dead)
        of_test = used[: len(used) - loop.carry]
        carried = _join(carried, used[len(of_test) :])
    while True:  # until one round more finds nothing new
        inputs = _inputs(loop.body, carried + results, dead)
        before, carried = carried, _join(carried, inputs[consts:kept])
        if carried == before:
            return of_test + inputs[:consts] + carried + inputs[kept:]


def _join(a: Sequence[bool], b: Sequence[bool]) -> list[bool]:
    return [x or y for x, y in zip(a, b, strict=True)]


def _mark(eqn: Any) -> str | None:
    """The name of a mark: one of ours, as a model may have names of its own."""
    name = mark_of(eqn)
    return name if name is not None and name.startswith(OURS) else None


def _marks(jaxpr: Any) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        if name := _mark(eqn):
            yield name
        match written(eqn):
            case Branches(functions):
                for function in functions:
                    yield from _marks(function)
            case Loop() as loop:
                yield from _marks(loop.body)
                if loop.test is not None:
                    yield from _marks(loop.test)
