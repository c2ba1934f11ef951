"""What an output depends on, seen through everything that jax has for control flow."""

import jax
import jax.numpy as jnp
import pytest

from lora_jax.tracing._liveness import live_inputs


@jax.custom_vjp
def own_gradient(x, y):
    return x * 2


own_gradient.defvjp(lambda x, y: (x * 2, None), lambda _, g: (g, g))


@jax.custom_jvp
def own_tangent(x, y):
    return x * 2


own_tangent.defjvps(lambda t, out, x, y: t, lambda t, out, x, y: t)


def scan(x, y, z):
    """z goes into the carry after one step, y nowhere."""

    def body(carry, x):
        a, b = carry
        return (a + b, b), y

    return jax.lax.scan(body, (x.sum(), z.sum()), x)[0][0]


def while_loop(x, y, z):
    """z decides when it ends."""
    return jax.lax.while_loop(
        lambda c: c[0] < z.sum(), lambda c: (c[0] + 1, c[1] * 2, y.sum()), (0.0, x, 1.0)
    )[1]


CASES = {
    "dead code": (lambda x, y, z: (y + z, x + 1)[1], (True, False, False)),
    "literal": (lambda x, y, z: 1.0, (False, False, False)),
    "identity": (lambda x, y, z: y, (False, True, False)),
    "jit": (jax.jit(lambda x, y, z: (x, y)[0] + z), (True, False, True)),
    "checkpoint": (jax.checkpoint(lambda x, y, z: (x * z, y * 2)[0]), (True, False, True)),
    "custom_vjp": (lambda x, y, z: own_gradient(x, y) + z, (True, False, True)),
    "custom_jvp": (lambda x, y, z: own_tangent(x, y) + z, (True, False, True)),
    "scan": (scan, (True, False, True)),
    "while_loop": (while_loop, (True, False, True)),
    "cond": (
        lambda x, y, z: jax.lax.cond(z.sum() > 0, lambda x, y: x, lambda x, y: 2 * x, x, y),
        (True, False, True),
    ),
    "one branch": (
        lambda x, y, z: jax.lax.cond(True, lambda x, y: x, lambda x, y: y, x, y),
        (True, True, False),
    ),
    "unknown": (
        lambda x, y, z: jax.pure_callback(lambda x, y: x, x, x, y),
        (True, True, False),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_live_inputs(case):
    function, expected = CASES[case]
    args = [jnp.ones(3) for _ in range(3)]
    for f in (function, jax.jit(jax.checkpoint(function))):
        jaxpr = jax.make_jaxpr(f)(*args).jaxpr
        assert tuple(live_inputs(jaxpr, [True] * len(jaxpr.outvars))) == expected
