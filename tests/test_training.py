"""Adapters in the training loops that Flax users have."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax.training.train_state import TrainState
from helpers import random_like, random_variables, relative_error

import lora_jax

WIDTH, LAYERS, RANK = 256, 3, 2


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(LAYERS):
            x = nn.tanh(nn.Dense(WIDTH, name=f"layer_{i}")(x))
        return nn.Dense(3, name="head")(x)


def setup(variant="lora", **rule):
    model, x = Model(), random_like(jnp.zeros((8, WIDTH)), scale=1.0)
    y = jnp.arange(8) % 3
    params = random_variables(model, x)["params"]
    params = jax.tree.map(lambda p: 0.2 * p, params)
    config = lora_jax.LoraConfig(
        [lora_jax.Rule("layer_.*/kernel", RANK, variant=variant, **rule)], trainable=["head/.*"]
    )
    return model, (x, y), *lora_jax.lora_init(jax.random.key(0), params, config)


def train_step(model, state, frozen, batch):
    x, y = batch

    def loss_fn(adapters):
        logits = lora_jax.lora_apply(model, {"params": frozen}, adapters, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


@pytest.mark.parametrize("variant", [pytest.param("lora", marks=pytest.mark.slow), "dora"])
def test_train_state(variant):
    """One trace for all of a run, the base as it was, and a lower loss."""
    model, batch, frozen, adapters = setup(variant)
    before = jax.tree.map(lambda a: a.copy(), frozen)
    state = TrainState.create(apply_fn=model.apply, params=adapters, tx=optax.adam(1e-2))
    chex.clear_trace_counter()
    once = chex.assert_max_traces(train_step, n=1)
    step = jax.jit(once, static_argnums=0, donate_argnums=1)
    losses = []
    for _ in range(20):
        state, loss = step(model, state, frozen, batch)
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]
    chex.assert_trees_all_equal(frozen, before)
    merged = lora_jax.lora_merge(frozen, state.params)
    y = lora_jax.lora_apply(model, {"params": frozen}, state.params, batch[0])
    assert relative_error(y, model.apply({"params": merged}, batch[0])) < 1e-5


OPTIMIZERS = {
    "sgd": optax.sgd(1e-2, momentum=0.9),
    "adamw": optax.adamw(1e-2),
    "adafactor": optax.adafactor(1e-2),
    "lion": optax.lion(1e-3),
    "MultiSteps": optax.MultiSteps(optax.adam(1e-2), 2),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "masked by a tree of the adapters": optax.adamw(
        1e-2, mask=lambda adapters: jax.tree.map(lambda a: a.ndim > 1, adapters)
    ),
    "masked by path": optax.masked(
        optax.adam(1e-2),
        lambda adapters: jax.tree_util.tree_map_with_path(
            lambda path, _: jax.tree_util.keystr(path).endswith(".V"), adapters
        ),
    ),
    "partition": optax.partition(
        {"factors": optax.adam(1e-2), "head": optax.sgd(1e-2)},
        lambda adapters: {
            name: jax.tree.map(lambda _, n=name: "head" if n == "head" else "factors", sub)
            for name, sub in adapters.items()
        },
    ),
}


QUICK = ("adamw", "MultiSteps", "masked by path", "partition")


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(tx, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, tx in OPTIMIZERS.items()
    ],
)
def test_optimizers_see_adapters_only(optimizer):
    model, batch, frozen, adapters = setup("dora")
    state = TrainState.create(apply_fn=model.apply, params=adapters, tx=optimizer)
    step = jax.jit(functools.partial(train_step, model))
    for _ in range(2):
        state, loss = step(state, frozen, batch)
    assert jnp.isfinite(loss)
    assert jax.tree.structure(state.params) == jax.tree.structure(adapters)
    sizes = [leaf.size for leaf in jax.tree.leaves(state.opt_state)]
    assert max(sizes) < WIDTH * WIDTH, "no optimizer state of the size of a kernel"
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, adapters)
    assert any(jax.tree.leaves(moved))


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_compiled_step_holds_no_gradient_of_the_base(variant):
    """Its outputs have no array of the size of a kernel, nor is there memory for gradients."""
    model, (x, y), frozen, adapters = setup(variant)
    x, y = x[:1], y[:1]
    tx = optax.adam(1e-2)
    state = TrainState.create(apply_fn=model.apply, params=adapters, tx=tx)
    step = jax.jit(functools.partial(train_step, model))
    compiled = step.lower(state, frozen, (x, y)).compile()
    kernel = 4 * WIDTH * WIDTH
    out = jax.tree.leaves(jax.eval_shape(step, state, frozen, (x, y)))
    assert max(leaf.size for leaf in out) < WIDTH * WIDTH
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes < kernel

    @jax.jit
    def full_step(params, opt_state, x, y):
        def loss_fn(params):
            logits = model.apply({"params": params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    params = lora_jax.lora_merge(frozen, adapters)
    full = full_step.lower(params, tx.init(params), x, y).compile().memory_analysis()

    @jax.jit
    def forward(frozen, adapters, x):
        return lora_jax.lora_apply(model, {"params": frozen}, adapters, x)

    # Against the forward pass, in which an older XLA writes down the squares of DoRA's norm.
    before = forward.lower(frozen, adapters, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < before.temp_size_in_bytes + kernel
    assert full.output_size_in_bytes > 3 * LAYERS * kernel
    assert memory.output_size_in_bytes < full.output_size_in_bytes / 10


def test_base_is_an_argument_of_the_compiled_step():
    """A base that is closed over becomes constants in the program; here there are none."""
    model, batch, frozen, adapters = setup()
    state = TrainState.create(apply_fn=model.apply, params=adapters, tx=optax.sgd(1e-2))
    jaxpr = jax.make_jaxpr(functools.partial(train_step, model))(state, frozen, batch)
    assert sum(getattr(const, "size", 1) for const in jaxpr.consts) < 100


def test_static_facts_trace_again_and_another_adapter_does_not():
    model, (x, _), frozen, adapters = setup(alpha=2.0)
    traces = []

    @jax.jit
    def forward(frozen, adapters, x):
        traces.append(None)
        return lora_jax.lora_apply(model, {"params": frozen}, adapters, x)

    first = forward(frozen, random_like(adapters, seed=1), x)
    second = forward(frozen, random_like(adapters, seed=2), x)
    assert len(traces) == 1
    assert relative_error(first, second) > 1e-2
    for count, changed in enumerate(
        [setup(alpha=4.0), setup("dora", alpha=2.0), setup("dora", alpha=2.0, detach_norm=True)], 2
    ):
        forward(frozen, changed[-1], x)
        assert len(traces) == count


def test_vmap_over_adapters():
    """Several adapters of one base in one call."""
    model, (x, _), frozen, adapters = setup("dora")
    many = [random_like(adapters, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *many)

    def forward(adapters):
        return lora_jax.lora_apply(model, {"params": frozen}, adapters, x)

    for got, one in zip(jax.vmap(forward)(stacked), many, strict=True):
        assert relative_error(got, forward(one)) < 1e-5


def test_grad_with_respect_to_base_is_still_possible():
    """Nothing in the product stops a gradient that a user asks for."""
    model, (x, _), frozen, adapters = setup("dora")
    adapters = random_like(adapters)

    def ours(frozen):
        return lora_jax.lora_apply(model, {"params": frozen}, adapters, x).sum()

    def merged(frozen):
        return model.apply({"params": lora_jax.lora_merge(frozen, adapters)}, x).sum()

    for got, expected in zip(
        jax.tree.leaves(jax.grad(ours)(frozen)),
        jax.tree.leaves(jax.grad(merged)(frozen)),
        strict=True,
    ):
        assert relative_error(got, expected) < 1e-4
