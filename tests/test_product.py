"""The fast forms against the papers' formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error

from lora_jax.adapter import Adapter
from lora_jax.equation import Equation
from lora_jax.product import adapted_einsum, adapted_linear, factored_norm, factors_of
from lora_jax.variants import column_norm, dora_kernel, lora_kernel, safe_sqrt


def arrays(d=7, k=5, r=3, n=4, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"x": (n, d), "W": (d, k), "U": (d, r), "V": (r, k), "m": (k,)}
    return {name: jnp.asarray(rng.standard_normal(s), "float32") for name, s in shapes.items()}


def test_norm_is_of_the_columns_one_for_each_output():
    """Axis 0 of a Flax kernel (in, out), where PyTorch's (out, in) has dim=1."""
    W = jnp.array([[3.0, 1.0, 0.0], [4.0, 0.0, 2.0]])
    assert jnp.array_equal(column_norm(W), jnp.array([5.0, 1.0, 2.0]))
    zeros = jnp.zeros((2, 1))
    m = jnp.array([10.0, 1.0, 2.0])
    W_ = dora_kernel(W, zeros, jnp.zeros((1, 3)), m, 1.0, False)
    assert jnp.allclose(W_, W * jnp.array([2.0, 1.0, 1.0]))


def test_scale_acts_inside_the_norm():
    a = arrays()
    got = dora_kernel(a["W"], a["U"], a["V"], a["m"], 3.0, False)
    adapted = a["W"] + 3.0 * a["U"] @ a["V"]
    assert relative_error(got, a["m"] * adapted / jnp.linalg.norm(adapted, axis=0)) < 1e-6
    assert relative_error(jnp.linalg.norm(got, axis=0), jnp.abs(a["m"])) < 1e-6


@pytest.mark.parametrize("r", [1, 3, 5])
@pytest.mark.parametrize("s", [1.0, 0.25, 4.0])
def test_factored_norm(r, s):
    a = arrays(r=r)

    def dense(W, U, V):
        return column_norm(W + s * U @ V)

    def factored(W, U, V):
        return factored_norm(W, U, V, s)

    args = a["W"], a["U"], a["V"]
    assert relative_error(factored(*args), dense(*args)) < 1e-6
    expected = jax.jacobian(dense, (0, 1, 2))(*args)
    for got, want in zip(jax.jacobian(factored, (0, 1, 2))(*args), expected, strict=True):
        assert relative_error(got, want) < 1e-5


def test_factored_norm_survives_cancellation():
    """W + U V = 0 up to rounding: the square may come out negative, the norm must not be NaN."""
    for seed in range(20):
        a = arrays(d=64, seed=seed)
        norm, grads = jax.value_and_grad(
            lambda U, V: factored_norm(-U @ V, U, V, 1.0).sum(),
            (0, 1),
        )(a["U"], a["V"])
        assert 0 <= norm < 1e-2 * jnp.linalg.norm(a["U"] @ a["V"], axis=0).sum()
        assert all(jnp.isfinite(g).all() for g in grads)


def test_safe_sqrt():
    x = jnp.array([4.0, 0.0, -1e-9])
    assert jnp.array_equal(safe_sqrt(x), jnp.array([2.0, 0.0, 0.0]))
    assert jnp.array_equal(jax.grad(lambda x: safe_sqrt(x).sum())(x), jnp.array([0.25, 0.0, 0.0]))


@pytest.mark.parametrize("detach_norm", [False, True])
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("form", ["einsum", "transposed einsum", "linear"])
def test_adapted_product(variant, detach_norm, form):
    a = arrays()
    if form == "transposed einsum":
        a["x"] = a["x"][:, :5]

    def ours(x, W, U, V, m):
        m = m if variant == "dora" else None
        adapter = Adapter(U, V, m, variant=variant, rank=3, alpha=2.0, detach_norm=detach_norm)
        factors = factors_of(adapter)
        if form == "linear":
            return adapted_linear(jnp.matmul, x, W, factors, adapter.axes, base=jnp.matmul)
        if form == "einsum":
            equation = Equation.parse("nd,dk->nk", x.shape, W.shape)
            return adapted_einsum(equation, x, W, factors, base=jnp.matmul)
        equation = Equation.parse("nk,dk->nd", x.shape, W.shape)
        return adapted_einsum(equation, x, W, factors, base=lambda x, W: x @ W.T, transposed=True)

    def reference(x, W, U, V, m):
        formula = dora_kernel if variant == "dora" else lora_kernel
        W = formula(W, U, V, m, 2.0 / 3.0, detach_norm)
        return x @ (W.T if form == "transposed einsum" else W)

    args = tuple(a.values())
    assert relative_error(ours(*args), reference(*args)) < 1e-5
    every = tuple(range(5)) if variant == "dora" else tuple(range(4))
    expected = jax.jacobian(reference, every)(*args)
    for got, want in zip(jax.jacobian(ours, every)(*args), expected, strict=True):
        assert relative_error(got, want) < 1e-5
