"""The fast products against the papers' formulas."""

import contextlib
import functools
from unittest import mock

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import pytest
from helpers import layer_arrays, relative_error

import lora_jax
from lora_jax.core._adapter import Adapter
from lora_jax.core.products._einsum_equation import Equation
from lora_jax.core.products._factored import scaled
from lora_jax.core.products._layer_factors import LayerFactors, layer_factors
from lora_jax.core.products._normal_form import normalized
from lora_jax.core.products._product import adapted_einsum, adapted_linear, choose_product
from lora_jax.core.variants._dora import DoRA
from lora_jax.core.variants._lora import LoRA


@pytest.mark.parametrize("detach_norm", [False, True])
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("form", ["factored", "outer", "dense", "transposed", "linear"])
def test_adapted_product(variant, detach_norm, form):
    a = layer_arrays()
    if form == "transposed":
        a["x"] = a["x"][:, :5]

    def ours(x, W, U, V, m):
        m = m if variant == "dora" else None
        product = form if form in ("factored", "outer", "dense") else "auto"
        kind = DoRA(detach_norm) if variant == "dora" else LoRA()
        adapter = Adapter(U, V, m, variant=kind, rank=3, alpha=2.0)
        factors = layer_factors(W, normalized(W, adapter), product)
        if form == "linear":
            return adapted_linear(jnp.matmul, x, W, factors, adapter.axes, base=jnp.matmul)
        if form != "transposed":
            equation = Equation.parse("nd,dk->nk", x.shape, W.shape)
            return adapted_einsum(equation, x, W, factors)
        equation = Equation.parse("nk,dk->nd", x.shape, W.shape)
        return adapted_einsum(equation, x, W, factors, base=lambda x, W: x @ W.T, transposed=True)

    def reference(x, W, U, V, m):
        W = formula(variant, detach_norm)(W, 2.0 / 3.0, U, V, m)
        return x @ (W.T if form == "transposed" else W)

    args = tuple(a.values())
    assert relative_error(ours(*args), reference(*args)) < 1e-5
    every = tuple(range(5)) if variant == "dora" else tuple(range(4))
    jacobians = (jax.jit(jax.jacobian(f, every))(*args) for f in (ours, reference))
    for got, want in zip(*jacobians, strict=True):
        assert relative_error(got, want) < 1e-5


def formula(variant, detach_norm=False):
    if variant == "dora":
        return DoRA(detach_norm).kernel
    return lambda W, s, U, V, m: LoRA().kernel(W, s, U, V)


def layer(product, variant="dora", s=2.0):
    """``x W'`` of arrays, computed as one product is, and by the formula."""

    def ours(x, W, U, V, m):
        m = m if variant == "dora" else None
        r = U.shape[-1]
        adapter = Adapter(U, V, m, variant=variant, rank=r, alpha=s * r)
        equation = Equation.parse("...d,dk->...k", x.shape, W.shape)
        return adapted_einsum(equation, x, W, layer_factors(W, normalized(W, adapter), product))

    def reference(x, W, U, V, m):
        return x @ formula(variant)(W, s, U, V, m)

    return ours, reference


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("product", ["factored", "outer", "dense"])
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
def test_transforms_of_every_product(transform, product, variant):
    a = layer_arrays(d=5, k=5, n=6)
    a["x"] = a["x"].reshape(2, 3, 5)
    ours, reference = layer(product, variant)
    got, expected = (
        jax.tree.leaves(jax.jit(lambda *args, f=f: transform(f, args))(*a.values()))
        for f in (ours, reference)
    )
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) < 1e-4


@pytest.mark.parametrize("tiny", [0.0, 1e-37])
def test_magnitudes_of_zero_learn_in_every_product(tiny):
    """The dense product recovers ``da`` by dividing the output by ``a``."""
    a = layer_arrays()
    a["m"] = a["m"].at[::2].set(tiny)
    *others, m = a.values()
    for product in ("factored", "outer", "dense"):
        ours, reference = layer(product)
        got, expected = (
            jax.grad(lambda m, f=f: jnp.sum(jnp.exp(f(*others, m))))(m) for f in (ours, reference)
        )
        assert jnp.all(expected != 0)
        assert relative_error(got, expected) < 1e-5, product
        assert relative_error(ours(*others, m), reference(*others, m)) < 1e-5


@pytest.mark.parametrize("size", [1.0, 0.0, 1e-30])
def test_magnitudes_in_16_bits_learn_from_the_result(size):
    """The gradient of `a` is recovered from the result, also where that is next to nothing."""
    a = jnp.array([0.9, 1.1, -1.0]) * size
    y, g = (jax.random.normal(jax.random.key(i), (64, 3)).astype(jnp.bfloat16) for i in range(2))

    def loss(a, y, from_result):
        return jnp.sum(g.astype(jnp.float32) * scaled(a, y, from_result=from_result))

    got, expected = (jax.grad(loss, (0, 1))(a, y, how) for how in (True, False))
    assert relative_error(got[0], expected[0]) < 1e-2
    assert jnp.all(expected[0] != 0)
    assert jnp.abs(got[1] - expected[1]).max() < 1e-2 * size + 1e-18
    # Only the magnitudes: nothing of the product is kept, and the result is.
    kept = [leaf.shape for leaf in jax.tree.leaves(jax.vjp(lambda a: loss(a, y, True), a)[1])]
    assert kept.count((64, 3)) <= 2  # the result, and g


def test_which_product():
    def choice(product, dtype=jnp.float32, rows=64, *more, platform="cpu"):
        U, V = jnp.zeros((64, 2)), jnp.zeros((2, 64))
        factors = LayerFactors(U, V, None, 1.0, product, "a/kernel")
        return choose_product(factors, dtype, rows, *more, platform=platform)

    dropout = {"of dropout": True, "of something else": False}
    assert choice("auto") == "dense"
    assert choice("auto", jnp.float32, 63) == choice("auto", jnp.bfloat16) == "factored"
    assert choice("auto", jnp.float32, 64, None, dropout) == "factored"
    assert choice("factored") == "factored"
    assert choice("outer", jnp.bfloat16, 64, None, dropout) == "outer"
    assert choice("dense", jnp.float32, 1) == "dense"
    with pytest.raises(ValueError, match=r"for 'a/kernel', as in bfloat16 a small update of W"):
        choice("dense", jnp.bfloat16)
    with pytest.raises(ValueError, match=r"product='dense'\) is not possible .* as of dropout"):
        choice("dense", jnp.float32, 64, None, dropout)
    for platform in ("gpu", "tpu"):  # float32 in bfloat16
        on_it = functools.partial(choice, "auto", jnp.float32, 64, platform=platform)
        assert on_it() == on_it(jax.lax.Precision.HIGH) == "factored"
        assert on_it(jax.lax.Precision.HIGHEST) == on_it("highest") == "dense"
        for precision in (("high", "high"), "F32_F32_F32", [jax.lax.Precision.HIGHEST] * 2):
            assert on_it(precision) == "factored"


@contextlib.contextmanager
def compiled_for(platform):
    """What is lowered is as for a platform, and still runs on a CPU."""

    def choose(*args, default, **forms):
        name = {"gpu": "cuda"}.get(platform, platform)
        return forms.get(name, default)(*args)

    with mock.patch("jax.lax.platform_dependent", choose):
        jax.clear_caches()
        yield
    jax.clear_caches()


@pytest.mark.parametrize("product", ["auto", "factored", "outer", "dense"])
@pytest.mark.parametrize("variant", [pytest.param("lora", marks=pytest.mark.slow), "dora"])
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_every_platform_computes_the_same(platform, variant, product):
    a = layer_arrays(n=6)
    a["x"] = a["x"].reshape(2, 3, 7)
    ours, reference = layer(product, variant)
    with compiled_for(platform):
        got = jax.grad(lambda *args: jnp.sum(ours(*args) ** 2), (0, 2, 3))(*a.values())
    expected = jax.grad(lambda *args: jnp.sum(reference(*args) ** 2), (0, 2, 3))(*a.values())
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_platform_is_that_which_is_compiled_for(platform):
    """Not that which traces: see `jax.export`. On a GPU factors contract other axes than `W`."""
    x, W = jnp.ones((3, 5, 4)), jnp.ones((4, 6))
    factors = LayerFactors(jnp.ones((4, 2)), jnp.ones((2, 6)), None, 1.0, "auto")
    eq = Equation.parse("bnd,dk->bnk", x.shape, W.shape)

    def product(x, W, U, V):
        return adapted_einsum(eq, x, W, factors._replace(U=U, V=V))

    args = x, W, factors.U, factors.V
    text = jax.export.export(jax.jit(product), platforms=[platform])(*args).mlir_module()
    assert ("optimization_barrier" in text) == (platform == "cuda")
    # 15 rows are more than 4 inputs, so that on CPUs it is dense.
    assert text.count("stablehlo.dot_general") == (2 if platform == "cpu" else 3)


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

    def loss(product, *args):
        return jnp.sum(adapted_einsum(eq, x, W, LayerFactors(*args, None, 2.0, product)) ** 3)

    for i in range(3):
        expected, got = (
            jax.grad(loss, i)(product, U, V) if i else loss(product, U, V)
            for product in ("factored", "outer")
        )
        assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("product", ["outer", "dense"])
def test_a_convolution_has_one_product(product):
    """What a call says is of products of two matrices."""
    model, x = nn.Conv(3, (2,)), jnp.ones((1, 4, 2))
    params = model.init(jax.random.key(0), x)["params"]
    axes = lora_jax.kernel_axes(model, {"params": params}, x)
    config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=1, alpha=1)])
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config, axes=axes)
    y = lora_jax.lora_apply(model, {"params": frozen}, adapters, x, product=product)
    assert jnp.array_equal(y, lora_jax.lora_apply(model, {"params": frozen}, adapters, x))


def test_kernel_of_16_bits_with_an_input_of_32_is_not_dense():
    x, W = jnp.ones((64, 2)), jnp.ones((2, 1), "bfloat16")
    factors = LayerFactors(jnp.full((2, 1), 2.0**-10), jnp.ones((1, 1)), None, 1.0)
    equation = Equation.parse("nd,dk->nk", x.shape, W.shape)
    y = adapted_einsum(equation, x, W, factors, base=None)
    assert jnp.array_equal(y, jnp.full((64, 1), 2 + 2.0**-9))


def test_updates_that_the_kernel_cannot_hold_are_seen_in_sixteen_bits():
    """In bfloat16 1 + 2^-9 is 1, so that a dense kernel of ones would not be trained at all."""
    x, W = jnp.array([[1.0, -1.0]], "bfloat16"), jnp.ones((2, 1), "bfloat16")
    factors = LayerFactors(jnp.array([[2.0**-9], [0.0]]), jnp.ones((1, 1)), None, 1.0)
    equation = Equation.parse("nd,dk->nk", x.shape, W.shape)
    assert jnp.array_equal(adapted_einsum(equation, x, W, factors), [[2.0**-9]])
