"""Full models: their axes, their adapters, and their training."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax.traverse_util import flatten_dict
from helpers import random_like, random_variables, relative_error
from models import Decoder, ResNet

import lora_jax
from lora_jax import LoraConfig, Rule

KEY = jax.random.key(0)


TOKENS = jnp.arange(12).reshape(2, 6)
IMAGES = jax.random.normal(KEY, (2, 8, 8, 3))


def split(model, x, **rule):
    variables = random_variables(model, x)
    axes = lora_jax.kernel_axes(model, variables, x)
    config = LoraConfig([Rule("|".join(axes), **{"rank": 2, **rule})])
    frozen, adapters = lora_jax.lora_init(KEY, variables["params"], config, axes=axes)
    rest = {name: tree for name, tree in variables.items() if name != "params"}
    return axes, variables, {"params": frozen, **rest}, adapters


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize(("model", "x"), [(Decoder(), TOKENS), (ResNet(), IMAGES)])
def test_model(model, x, variant):
    axes, variables, frozen, adapters = split(model, x, variant=variant)
    kernels = flatten_dict(variables["params"], sep="/")
    assert set(axes) == {p for p in kernels if p.endswith(("kernel", "embedding"))}
    apply = jax.jit(lambda adapters: lora_jax.lora_apply(model, frozen, adapters, x))
    base = jax.jit(model.apply)
    assert relative_error(apply(adapters), base(variables, x)) < 1e-6
    trained = random_like(adapters, scale=0.1)
    merged = {**frozen, "params": jax.jit(lora_jax.lora_merge)(frozen["params"], trained)}
    assert relative_error(apply(trained), base(merged, x)) < 1e-5
    assert jax.tree.structure(merged) == jax.tree.structure(variables)

    @jax.jit
    @jax.grad
    def gradient(adapters):
        return jnp.sum(lora_jax.lora_apply(model, frozen, adapters, x) ** 2)

    for path, grad in jax.tree_util.tree_leaves_with_path(gradient(trained)):
        assert jnp.abs(grad).max() > 0, path


def test_decoder_of_eight_billion_parameters():
    """Nothing of it is ever in memory; its stacks are found where its scan has them."""
    model = Decoder(128_256, 4096, 32, 14_336, 32)
    tokens = jax.ShapeDtypeStruct((8, 1024), jnp.int32)
    params = jax.eval_shape(model.init, KEY, tokens)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) > 8e9
    axes = lora_jax.kernel_axes(model, {"params": params}, tokens)
    assert {path: (a.inputs, a.outputs, a.batch) for path, a in axes.items()} == {
        "embed/embedding": ((0,), (1,), ()),
        "blocks/query/kernel": ((0,), (2, 3), (1,)),
        "blocks/key/kernel": ((0,), (2, 3), (1,)),
        "blocks/value/kernel": ((0,), (2, 3), (1,)),
        "blocks/out/kernel": ((0, 2), (3,), (1,)),
        "blocks/gate_up/kernel": ((2,), (0, 3), (1,)),
        "blocks/down/kernel": ((0,), (2,), (1,)),
    }
    config = LoraConfig([Rule("|".join(axes), rank=16, variant="dora")])
    frozen, adapters = jax.eval_shape(
        lambda params: lora_jax.lora_init(KEY, params, config, axes=axes), params
    )
    d, h, r, layers = 4096, 14_336, 16, 32
    attention = 4 * (r * (d + d) + d)
    mlp = r * (d + 2 * h) + 2 * h + r * (h + d) + d
    trained = layers * (attention + mlp) + r * (128_256 + d) + d
    report = lora_jax.summary(frozen, adapters, config=config, axes=axes, tx=optax.adam(1e-4))
    assert report.trained == trained
    assert report.optimizer_nbytes == 8 * trained + 4
    assert not report.frozen_kernels
    out = jax.eval_shape(
        lambda frozen, adapters, tokens: lora_jax.lora_apply(
            model, {"params": frozen}, adapters, tokens
        ),
        frozen,
        adapters,
        tokens,
    )
    assert out.shape == (8, 1024, 128_256)


def test_resnet_trains_with_its_batch_statistics():
    model = ResNet()
    _, variables, frozen, adapters = split(model, IMAGES)
    tx = optax.adam(5e-2)

    @jax.jit
    def step(adapters, state, stats):
        def loss(adapters):
            logits, updates = lora_jax.lora_apply(
                model,
                {"params": frozen["params"], "batch_stats": stats},
                adapters,
                IMAGES,
                train=True,
                mutable=["batch_stats"],
            )
            labels = jnp.array([0, 2])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, updates["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss, has_aux=True)(adapters)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(adapters, updates), state, stats, loss

    state, stats, losses = tx.init(adapters), variables["batch_stats"], []
    for _ in range(40):
        adapters, state, stats, loss = step(adapters, state, stats)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert jax.tree.structure(stats) == jax.tree.structure(variables["batch_stats"])
    assert not jnp.array_equal(stats["norm"]["mean"], variables["batch_stats"]["norm"]["mean"])
