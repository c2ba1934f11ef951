"""The fast forms against the papers' formulas."""

from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error

import lora_jax
from lora_jax.core._adapter import Adapter
from lora_jax.core._equation import Equation
from lora_jax.core._product import (
    Factors,
    adapted_einsum,
    adapted_linear,
    chosen,
    dense_norm,
    factored_norm,
    factors_of,
    normalized,
)
from lora_jax.core._variants import column_norm, dora_kernel, lora_kernel, safe_sqrt


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
    m = dense_norm(W, Adapter(U, V, rank=r, alpha=2.0 * r))
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
    a = arrays(d=64)
    for W in (a["W"], 0.2 * a["W"] - a["U"] @ a["V"]):  # in the second the terms cancel
        norm = factored_norm(W, a["U"], a["V"], 1.0)
        for factor in (1.001, 0.9, 2.0):
            got = factored_norm(W, a["U"], a["V"], 1.0, factor * norm)
            assert jnp.array_equal(got, norm)


def test_safe_sqrt():
    x = jnp.array([4.0, 0.0, -1e-9])
    assert jnp.array_equal(safe_sqrt(x), jnp.array([2.0, 0.0, 0.0]))
    assert jnp.array_equal(jax.grad(lambda x: safe_sqrt(x).sum())(x), jnp.array([0.25, 0.0, 0.0]))


@pytest.mark.parametrize("detach_norm", [False, True])
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("form", ["factored", "outer", "dense", "transposed", "linear"])
def test_adapted_product(variant, detach_norm, form):
    a = arrays()
    if form == "transposed":
        a["x"] = a["x"][:, :5]

    def ours(x, W, U, V, m):
        m = m if variant == "dora" else None
        way = form if form in ("factored", "outer", "dense") else "auto"
        adapter = Adapter(
            U, V, m, variant=variant, rank=3, alpha=2.0, detach_norm=detach_norm, product=way
        )
        factors = factors_of(normalized(W, adapter))
        if form == "linear":
            return adapted_linear(jnp.matmul, x, W, factors, adapter.axes, base=jnp.matmul)
        if form != "transposed":
            equation = Equation.parse("nd,dk->nk", x.shape, W.shape)
            return adapted_einsum(equation, x, W, factors)
        equation = Equation.parse("nk,dk->nd", x.shape, W.shape)
        return adapted_einsum(equation, x, W, factors, base=lambda x, W: x @ W.T, transposed=True)

    def reference(x, W, U, V, m):
        formula = dora_kernel if variant == "dora" else lora_kernel
        W = formula(W, U, V, m, 2.0 / 3.0, detach_norm)
        return x @ (W.T if form == "transposed" else W)

    args = tuple(a.values())
    assert relative_error(ours(*args), reference(*args)) < 1e-5
    every = tuple(range(5)) if variant == "dora" else tuple(range(4))
    expected = jax.jacobian(reference, every)(*args)
    for got, want in zip(jax.jacobian(ours, every)(*args), expected, strict=True):
        assert relative_error(got, want) < 1e-5


def layer(way, variant="dora", s=2.0):
    """``x W'`` of arrays, computed in one way, and by the formula."""

    def ours(x, W, U, V, m):
        m = m if variant == "dora" else None
        r = U.shape[-1]
        adapter = Adapter(U, V, m, variant=variant, rank=r, alpha=s * r, product=way)
        equation = Equation.parse("...d,dk->...k", x.shape, W.shape)
        return adapted_einsum(equation, x, W, factors_of(normalized(W, adapter)))

    def reference(x, W, U, V, m):
        formula = dora_kernel if variant == "dora" else lora_kernel
        return x @ formula(W, U, V, m, s, False)

    return ours, reference


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("way", ["factored", "outer", "dense"])
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, args: jax.jvp(f, args, args),
        lambda f, args: jax.vmap(f, (0, None, None, None, None))(*args),
        lambda f, args: jax.vmap(f, (None, None, 0, 0, 0))(
            *args[:2], *(jnp.stack([a, 2 * a]) for a in args[2:])
        ),
        lambda f, args: jax.grad(lambda *args: jnp.sum(jax.checkpoint(f)(*args) ** 2), (0, 2))(
            *args
        ),
        lambda f, args: jax.hessian(lambda U, V: jnp.sum(f(*args[:2], U, V, args[4]) ** 3), (0, 1))(
            *args[2:4]
        ),
        lambda f, args: jax.grad(
            lambda U: jnp.sum(
                jax.lax.scan(lambda x, U: (f(x, args[1], U, *args[3:]), None), args[0], U)[0] ** 2
            )
        )(jnp.stack([args[2], -args[2]])),
    ],
    ids=["jvp", "vmap of inputs", "vmap of adapters", "remat", "hessian", "scan"],
)
def test_transforms_of_every_way(transform, way, variant):
    a = arrays(d=5, k=5, n=6)
    a["x"] = a["x"].reshape(2, 3, 5)
    ours, reference = layer(way, variant)
    got, expected = (
        jax.tree.leaves(jax.jit(lambda *args, f=f: transform(f, args))(*a.values()))
        for f in (ours, reference)
    )
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) < 1e-4


@pytest.mark.parametrize("tiny", [0.0, 1e-37])
def test_magnitudes_of_zero_learn_in_every_way(tiny):
    """The dense form recovers ``da`` by dividing the output by ``a``."""
    a = arrays()
    a["m"] = a["m"].at[::2].set(tiny)
    *others, m = a.values()
    for way in ("factored", "outer", "dense"):
        ours, reference = layer(way)
        got, expected = (
            jax.grad(lambda m, f=f: jnp.sum(jnp.exp(f(*others, m))))(m) for f in (ours, reference)
        )
        assert jnp.all(expected != 0)
        assert relative_error(got, expected) < 1e-5, way
        assert relative_error(ours(*others, m), reference(*others, m)) < 1e-5


def test_which_way():
    def way(said, dtype=jnp.float32, rows=64, *more):
        U, V = jnp.zeros((64, 2)), jnp.zeros((2, 64))
        return chosen(Factors(U, V, None, 1.0, said, "a/kernel"), dtype, rows, *more)

    dropout = {"of dropout": True, "of something else": False}
    assert jax.default_backend() == "cpu"
    assert way("auto") == "dense"
    assert way("auto", jnp.float32, 63) == way("auto", jnp.bfloat16) == "factored"
    assert way("auto", jnp.float32, 64, None, dropout) == "factored"
    assert way("factored") == "factored"
    assert way("outer", jnp.bfloat16, 64, None, dropout) == "outer"
    assert way("dense", jnp.float32, 1) == "dense"
    with pytest.raises(ValueError, match=r"'a/kernel' says .* as in bfloat16 a small update of W"):
        way("dense", jnp.bfloat16)
    with pytest.raises(ValueError, match=r"product='dense', which is not possible, as of dropout"):
        way("dense", jnp.float32, 64, None, dropout)
    with mock.patch("jax.default_backend", return_value="tpu"):  # float32 in bfloat16
        assert way("auto") == way("auto", jnp.float32, 64, jax.lax.Precision.HIGH) == "factored"
        assert way("auto", jnp.float32, 64, jax.lax.Precision.HIGHEST) == "dense"
        assert way("auto", jnp.float32, 64, "highest") == "dense"
        for precision in (("high", "high"), "F32_F32_F32", [jax.lax.Precision.HIGHEST] * 2):
            assert way("auto", jnp.float32, 64, precision) == "factored"


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_accelerators_compute_the_same(variant):
    """Where the default backend is none of CPUs, inputs keep their axes."""
    a = arrays(n=6)
    a["x"] = a["x"].reshape(2, 3, 7)
    ours, reference = layer("auto", variant)
    with mock.patch("jax.default_backend", return_value="tpu"):
        got = jax.grad(lambda *args: jnp.sum(ours(*args) ** 2), (0, 2, 3))(*a.values())
    expected = jax.grad(lambda *args: jnp.sum(reference(*args) ** 2), (0, 2, 3))(*a.values())
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize("equation", ["sbnd,sdk->sbnk", "d,dk->k"])
def test_outer_products_of_stacks_and_of_vectors(equation):
    letters = {"s": 2, "b": 3, "n": 4, "d": 5, "k": 6, "r": 2}
    x_letters, W_letters = equation.split("->")[0].split(",")
    stack = "s" if "s" in W_letters else ""
    x, W, U, V = (
        jax.random.normal(jax.random.key(i), [letters[c] for c in string])
        for i, string in enumerate((x_letters, W_letters, f"{stack}dr", f"{stack}rk"))
    )
    eq = Equation.parse(equation, x.shape, W.shape)

    def loss(way, *args):
        return jnp.sum(adapted_einsum(eq, x, W, Factors(*args, None, 2.0, way)) ** 3)

    for i in range(3):
        expected, got = (
            jax.grad(loss, i)(way, U, V) if i else loss(way, U, V) for way in ("factored", "outer")
        )
        assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("way", ["outer", "dense"])
def test_a_convolution_has_one_way_only(way):
    model, x = nn.Conv(3, (2,)), jnp.ones((1, 4, 2))
    rule = lora_jax.Rule("kernel", rank=1, alpha=1, product=way)
    params = model.init(jax.random.key(0), x)["params"]
    axes = lora_jax.kernel_axes(model, {"params": params}, x)
    frozen, adapters = lora_jax.lora_init(
        jax.random.key(0), params, lora_jax.LoraConfig([rule]), axes=axes
    )
    with pytest.raises(ValueError, match=f"product='{way}', which is not possible, as the layer"):
        lora_jax.lora_apply(model, {"params": frozen}, adapters, x)


def test_kernel_of_16_bits_with_an_input_of_32_is_not_dense():
    x, W = jnp.ones((64, 2)), jnp.ones((2, 1), "bfloat16")
    factors = Factors(jnp.full((2, 1), 2.0**-10), jnp.ones((1, 1)), None, 1.0)
    equation = Equation.parse("nd,dk->nk", x.shape, W.shape)
    y = adapted_einsum(equation, x, W, factors, base=None)
    assert jnp.array_equal(y, jnp.full((64, 1), 2 + 2.0**-9))


def test_updates_that_the_kernel_cannot_hold_are_seen_in_sixteen_bits():
    """In bfloat16 1 + 2^-9 is 1, so that a dense kernel of ones would not be trained at all."""
    x, W = jnp.array([[1.0, -1.0]], "bfloat16"), jnp.ones((2, 1), "bfloat16")
    factors = Factors(jnp.array([[2.0**-9], [0.0]]), jnp.ones((1, 1)), None, 1.0)
    equation = Equation.parse("nd,dk->nk", x.shape, W.shape)
    assert jnp.array_equal(adapted_einsum(equation, x, W, factors), [[2.0**-9]])
