"""The policy that keeps ``x U`` of a rematerialised layer: nothing else is kept, all is equal."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import random_like, random_variables, relative_error

import lora_jax
from lora_jax import LoraConfig, Rule

KEY = jax.random.key(0)
WIDTH, HIDDEN, RANK, LAYERS = 8, 16, 3, 2
RULES = {
    variant: LoraConfig([Rule(".*kernel", rank=RANK, variant=variant)])
    for variant in ("lora", "dora")
}
# Rows below the inputs and above: factored everywhere, and dense where float32 is exact.
ROWS = {"few rows": (1, 6), "many rows": (3, 10)}


class Layer(nn.Module):
    """Two kernels, ``down`` with two input axes."""

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.gelu(nn.DenseGeneral((2, HIDDEN // 2), dtype=x.dtype, name="up")(x))
        return x + nn.DenseGeneral(WIDTH, (-2, -1), dtype=x.dtype, name="down")(y), None


class Model(nn.Module):
    """Layers that are scanned or not, and rematerialised or not."""

    scanned: bool = False
    remat: bool = True
    policy: object = None

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Layer, policy=self.policy) if self.remat else Layer
        if self.scanned:
            scan = nn.scan(layer, {"params": 0}, split_rngs={"params": True}, length=LAYERS)
            return scan(name="layers")(x, None)[0]
        for i in range(LAYERS):
            x, _ = layer(name=f"layers_{i}")(x)
        return x


def problem(variant, x, product="auto", **model):
    """The loss of adapters, and adapters; the same of all policies."""
    model = Model(**model)
    params = random_variables(model, x)["params"]
    axes = lora_jax.kernel_axes(model, {"params": params}, x)
    frozen, adapters = lora_jax.lora_init(KEY, params, RULES[variant], axes=axes)

    def loss(adapters):
        y = lora_jax.lora_apply(model, {"params": frozen}, adapters, x, product=product)
        return jnp.mean(jnp.sin(y.astype(jnp.float32)))

    return loss, random_like(adapters)


def saved(loss, adapters, rows):
    """Shapes of the activations that are kept for the gradient."""
    _, pullback = jax.vjp(loss, adapters)
    shapes = [leaf.shape for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "shape")]
    return sorted(shape for shape in shapes if rows in (shape[:-1], shape[1:-1]))


@pytest.mark.parametrize(
    ("variant", "scanned", "rows"),
    [
        ("lora", False, "few rows"),
        ("lora", True, "many rows"),
        ("dora", True, "few rows"),
        ("dora", False, "many rows"),
    ],
)
def test_it_keeps_xU_and_nothing_else(variant, scanned, rows):
    x = jax.random.normal(KEY, (*ROWS[rows], WIDTH))
    found = []
    for policy in (None, lora_jax.save_only_xU):
        loss, adapters = problem(variant, x, scanned=scanned, policy=policy)
        found.append((jax.jit(jax.grad(loss))(adapters), saved(loss, adapters, x.shape[:-1])))
    loss, adapters = problem(variant, x, scanned=scanned, remat=False)
    expected = jax.jit(jax.grad(loss))(adapters)
    (plain, kept), (ours, kept_by_ours) = found
    for got in (plain, ours):
        for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
            assert relative_error(one, other) < 1e-5
    one = (*x.shape[:-1], RANK)
    more = [(LAYERS, *one)] * 2 if scanned else [one] * 2 * LAYERS
    assert kept_by_ours == sorted(kept + more)


def test_by_its_name():
    x = jax.random.normal(KEY, (*ROWS["few rows"], WIDTH))
    by_name = jax.checkpoint_policies.save_only_these_names("lora_xU")
    loss, adapters = problem("lora", x, policy=by_name)
    assert saved(loss, adapters, x.shape[:-1]).count((1, 6, RANK)) == 2 * LAYERS


@pytest.mark.parametrize("variant", RULES)
def test_xU_is_not_computed_again(variant):
    """The products with ``U`` of a layer are what is saved; the body of a loop is counted once."""
    x = jax.random.normal(KEY, (3, 10, WIDTH))

    def flops(policy):
        loss, adapters = problem(variant, x, "factored", scanned=True, policy=policy)
        compiled = jax.jit(jax.grad(loss)).lower(adapters).compile()
        return compiled.cost_analysis()["flops"]

    products = 2 * 3 * 10 * (WIDTH + HIDDEN) * RANK
    found = flops(None) - flops(lora_jax.save_only_xU)
    assert found == pytest.approx(products, rel=0.05)


class Stem(nn.Module):
    """A convolution and an embedding, whose products are linear in the kernel in another way."""

    policy: object = None

    @nn.compact
    def __call__(self, x):
        conv = nn.remat(nn.Conv, policy=self.policy)(WIDTH, (3,), name="conv")
        embed = nn.remat(nn.Embed, policy=self.policy)(5, WIDTH, name="embed")
        return conv(x) + embed(jnp.arange(x.shape[-2]) % 5)


def test_other_layers():
    x = jax.random.normal(KEY, (2, 6, WIDTH))
    params = random_variables(Stem(), x)["params"]
    config = LoraConfig([Rule("(conv/kernel|embed/embedding)", rank=RANK, variant="dora")])
    frozen, adapters = lora_jax.lora_init_model(KEY, Stem(), {"params": params}, config, x)
    adapters = random_like(adapters)

    def loss(adapters, policy):
        return jnp.sin(lora_jax.lora_apply(Stem(policy), {"params": frozen}, adapters, x)).mean()

    plain, ours = (functools.partial(loss, policy=p) for p in (None, lora_jax.save_only_xU))
    kept = {shape for shape in saved(ours, adapters, (6,)) if shape[-1] == RANK}
    assert kept == {(2, 6, RANK), (6, RANK)}
    assert not any(shape[-1] == RANK for shape in saved(plain, adapters, (6,)))
    for one, other in zip(
        *(jax.tree.leaves(jax.grad(one)(adapters)) for one in (plain, ours)), strict=True
    ):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize("variant", RULES)
def test_in_nnx(variant):
    """By ``nnx.remat`` in the model, and by ``jax.checkpoint`` around its call."""

    class Block(nnx.Module):
        def __init__(self, rngs, policy=None):
            self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
            self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)
            self.policy = policy

        def __call__(self, x):
            def call(self, x):
                return x + self.down(nnx.gelu(self.up(x)))

            return nnx.remat(call, policy=self.policy)(self, x)

    x = jax.random.normal(KEY, (1, 6, WIDTH))

    def grads(policy):
        model = Block(nnx.Rngs(0), policy)
        frozen, adapters = lora_jax.lora_init_model(
            KEY, model, nnx.state(model, nnx.Param), RULES[variant], x
        )
        adapters = random_like(adapters)
        graphdef = nnx.graphdef(model)

        def loss(adapters):
            return jnp.sin(lora_jax.lora_apply(graphdef, frozen, adapters, x)).mean()

        return jax.grad(loss)(adapters), saved(loss, adapters, (1, 6))

    (plain, kept), (ours, kept_by_ours) = map(grads, (None, lora_jax.save_only_xU))
    assert kept_by_ours == sorted([*kept, *[(1, 6, RANK)] * 2])
    for one, other in zip(*map(jax.tree.leaves, (plain, ours)), strict=True):
        assert relative_error(one, other) < 1e-5


def test_around_the_whole_model():
    x = jax.random.normal(KEY, (1, 6, WIDTH))
    loss, adapters = problem("dora", x, remat=False)
    ours = jax.checkpoint(loss, policy=lora_jax.save_only_xU)
    assert saved(ours, adapters, (1, 6)).count((1, 6, RANK)) == 2 * LAYERS
    for one, other in zip(
        *(jax.tree.leaves(jax.jit(jax.grad(one))(adapters)) for one in (loss, ours)), strict=True
    ):
        assert relative_error(one, other) < 1e-5


def test_derivatives_of_all_orders():
    """Forward mode and second derivatives go through what is known of ``x U``."""
    x = jax.random.normal(KEY, (*ROWS["many rows"], WIDTH))
    loss, adapters = problem("dora", x, remat=False)
    loss_factored, _ = problem("dora", x, "factored", remat=False)
    direction = random_like(adapters, seed=1)

    def second(loss):
        def along(t):
            return loss(jax.tree.map(lambda a, d: a + t * d, adapters, direction))

        return jax.jit(lambda: (jax.jvp(along, (0.0,), (1.0,))[1], jax.hessian(along)(0.0)))()

    for one, other in zip(second(loss), second(loss_factored), strict=True):
        assert relative_error(one, other) < 1e-3
