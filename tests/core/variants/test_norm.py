"""DoRA's norm without the product, against the norm of the product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import layer_arrays, relative_error

from lora_jax.core._numerics import column_norm
from lora_jax.core.variants._dora import factored_norm


@pytest.mark.parametrize("r", [1, 3, 5])
@pytest.mark.parametrize("s", [1.0, 0.25, 4.0])
def test_factored_norm(r, s):
    a = layer_arrays(r=r)

    def dense(W, U, V):
        return column_norm(W + s * U @ V)

    def factored(W, U, V):
        return factored_norm(W, U, V, s)

    args = a["W"], a["U"], a["V"]
    assert relative_error(factored(*args), dense(*args)) < 1e-6
    ours, expected = (
        jax.jit(jax.jacobian(function, (0, 1, 2)))(*args) for function in (factored, dense)
    )
    for got, want in zip(ours, expected, strict=True):
        assert relative_error(got, want) < 1e-5


def test_factored_norm_survives_cancellation():
    """W + U V = 0 up to rounding: the square may come out negative, the norm must not be NaN."""
    for seed in range(20):
        a = layer_arrays(d=64, seed=seed)
        norm, grads = jax.value_and_grad(
            lambda U, V: factored_norm(-U @ V, U, V, 1.0).sum(),
            (0, 1),
        )(a["U"], a["V"])
        assert 0 <= norm < 1e-2 * jnp.linalg.norm(a["U"] @ a["V"], axis=0).sum()
        assert all(jnp.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("left", [1e-1, 1e-2, 1e-3, 1e-4, 0.0])
@pytest.mark.parametrize("d", [5, 64, 1024])
@pytest.mark.parametrize("r", [1, 4])
def test_factored_norm_takes_a_magnitude_that_is_the_norm(d, r, left):
    """Where terms cancel, it is told by its rounding errors; and the derivative is that of it."""
    rng = np.random.default_rng(d)
    U, V, rest = (rng.standard_normal(shape) for shape in ((d, r), (r, 32), (d, 32)))
    U, V = np.float32(U), np.float32(V)
    W = np.float32(left * rest - 2.0 * (np.float64(U) @ V))
    adapted = np.float64(W) + 2.0 * (np.float64(U) @ V)
    m = column_norm(W + 2.0 * jnp.matmul(U, V, precision="highest"))
    norm, back = jax.vjp(lambda W, U, V, m: factored_norm(W, U, V, 2.0, m), W, U, V, m)
    assert relative_error(norm, m) < 1e-6
    dW, dU, dV, dm = back(jnp.ones_like(norm))
    assert not dm.any()
    if left >= 1e-2:
        direction = adapted / np.linalg.norm(adapted, axis=0)
        assert relative_error(dW, direction) < 1e-2
        assert relative_error(dU, 2.0 * direction @ V.T) < 1e-2
        assert relative_error(dV, 2.0 * U.T @ direction) < 1e-2


def test_factored_norm_does_not_take_another_magnitude():
    a = layer_arrays(d=64)
    for W in (a["W"], 0.2 * a["W"] - a["U"] @ a["V"]):  # in the second the terms cancel
        norm = factored_norm(W, a["U"], a["V"], 1.0)
        for factor in (1.001, 0.9, 2.0):
            got = factored_norm(W, a["U"], a["V"], 1.0, factor * norm)
            assert jnp.array_equal(got, norm)
