"""DoRA's norm without the product, against the norm of the product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import layer_arrays, random_like, relative_error

from lora_jax._compat import defined_bilinear, wide_product
from lora_jax.core._numerics import column_norm
from lora_jax.core._split_product import _split_product, exact_product
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


def on_an_accelerator(A, W):
    """`exact_product` as it is elsewhere than on a CPU."""
    return defined_bilinear(_split_product, {})(A, W)


@pytest.mark.parametrize("function", [exact_product, on_an_accelerator])
def test_products_with_a_kernel_of_16_bits_are_exact(function):
    A = jax.random.normal(jax.random.key(0), (3, 256)) * 10.0 ** jnp.arange(-1, 2)[:, None]
    W = jax.random.normal(jax.random.key(1), (256, 40)).astype(jnp.bfloat16)
    exact_A, exact_W = np.asarray(A, np.float64), np.asarray(W, np.float64)

    def loss(A, W):
        return jnp.sum(jnp.sin(function(A, W)))

    def error(got, expected):
        return np.abs(np.asarray(got, np.float64) - expected).max() / np.abs(expected).max()

    exact = exact_A @ exact_W
    assert function(A, W).dtype == jnp.float32
    assert error(jax.jit(function)(A, W), exact) < 1e-6
    # Of one that is rounded to 16 bits it would be 1e-3.
    g = jax.random.normal(jax.random.key(2), exact.shape)
    back_A, back_W = jax.jit(lambda A, W, g: jax.vjp(function, A, W)[1](g))(A, W, g)
    assert error(back_A, np.asarray(g, np.float64) @ exact_W.T) < 1e-6
    assert back_W.dtype == jnp.bfloat16
    assert error(back_W, exact_A.T @ np.asarray(g, np.float64)) < 1e-2
    dA = 0.1 * A
    assert error(jax.jvp(function, (A, W), (dA, 0 * W))[1], 0.1 * exact) < 1e-6
    second = jax.jvp(jax.grad(loss), (A, W), (dA, 0 * W))[1]
    expected = (-np.sin(exact) * (0.1 * exact)) @ exact_W.T
    assert error(second, expected) < 1e-2  # sin of numbers of 1e3


@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0), (1, 2)])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_with_a_kernel_of_16_bits_can_be_mapped(in_axes, transposed):
    A, W = jnp.ones((2, 3, 5)), jnp.ones((2, 5, 4), jnp.bfloat16)
    A, W = (random_like(leaf, scale=1.0).astype(leaf.dtype) for leaf in (A, W))
    W = W.swapaxes(-1, -2) if transposed else W
    A = A[0] if in_axes[0] is None else jnp.moveaxis(A, 0, in_axes[0])
    W = W[0] if in_axes[1] is None else jnp.moveaxis(W, 0, in_axes[1])
    got, expected = (
        jax.vmap(lambda A, W, f=f: f(A, W, transposed), in_axes)(A, W)
        for f in (defined_bilinear(_split_product, {}), wide_product)
    )
    assert got.shape == expected.shape
    assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("stack", [(), (2,)])
def test_norm_of_a_kernel_of_16_bits(stack):
    """As it is stored: what is computed is the norm of its numbers in float32."""
    a = layer_arrays(d=32, r=2)
    W = jnp.broadcast_to(a["W"], (*stack, *a["W"].shape)).astype(jnp.bfloat16)
    U, V = (jnp.broadcast_to(a[name], (*stack, *a[name].shape)) for name in "UV")
    got = factored_norm(W, U, V, 0.5)
    assert got.dtype == jnp.float32
    assert relative_error(got, factored_norm(W.astype(jnp.float32), U, V, 0.5)) < 1e-6


@pytest.mark.parametrize("huge", [jnp.inf, -jnp.inf, 3.4e38, jnp.nan])
def test_what_is_not_finite_stays_what_it_is(huge):
    W = jnp.array([[1.0], [2.0]], jnp.bfloat16)
    A = jnp.array([[huge, 0.5], [0.25, 0.5]])
    got, expected = on_an_accelerator(A, W), wide_product(A, W)
    if abs(huge) < jnp.inf:  # rounded to 16 bits it is infinite
        expected = expected.at[0].set(jnp.inf)
    assert jnp.array_equal(got, expected, equal_nan=True)


def test_products_of_nothing_can_be_mapped():
    A, W = jnp.ones((2, 3, 0)), jnp.ones((0, 4), jnp.bfloat16)
    assert jnp.array_equal(jax.vmap(on_an_accelerator, (0, None))(A, W), jnp.zeros((2, 3, 4)))
