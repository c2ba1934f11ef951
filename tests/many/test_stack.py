"""Adapters brought to common shapes compute what they computed alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_like, relative_error

import lora_jax
from lora_jax.trees._paths import flatten

MODEL = nn.Sequential([nn.Dense(6), nn.tanh, nn.Dense(4)])
X = random_like(jnp.zeros((3, 5)), seed=1, scale=1.0)
PARAMS = random_like(MODEL.init(jax.random.key(0), X)["params"], seed=2)


def trained(seed, config, params=PARAMS):
    return random_like(lora_jax.lora_init(jax.random.key(seed), params, config)[1], seed=seed)


def one(pattern=".*kernel", rank=2, seed=0, trainable=(), params=PARAMS, **rule):
    rules = [lora_jax.Rule(pattern, rank, **rule)] if rank else []
    return trained(seed, lora_jax.LoraConfig(rules, trainable=trainable), params)


def merged(adapters):
    trained = set(paths(adapters))
    frozen = {
        name: {k: v for k, v in layer.items() if f"{name}/{k}" not in trained}
        for name, layer in PARAMS.items()
    }
    return lora_jax.lora_merge({k: v for k, v in frozen.items() if v}, adapters)


def paths(adapters):
    flat = flatten(adapters, "adapters")
    return ["/".join(key) for key, node in flat.items() if not isinstance(node, lora_jax.Adapter)]


CASES = {
    "ranks": [one(rank=1), one(rank=3, seed=1), one(rank=2, seed=2)],
    "alphas": [one(alpha=1.0), one(alpha=7.0, seed=1)],
    "rslora": [one(rank=3), one(rank=3, rslora=True, seed=1)],
    "LoRA beside DoRA": [one(), one(variant="dora", seed=1), one(rank=1, alpha=3.0)],
    "targets": [one("layers_0/kernel"), one("layers_2/kernel", variant="dora", seed=1)],
    "fully trained leaves": [
        one("layers_0/kernel", trainable=["layers_2/.*"]),
        one(seed=1, pattern="layers_0/kernel", trainable=["layers_2/bias"]),
        one("layers_0/kernel", seed=2),
    ],
    "how they are trained": [
        one(variant="dora"),
        one(variant="dora", detach_norm=True, dropout=0.1, seed=1),
    ],
    "parts": [
        one("layers_0/kernel", rank=1, fused=3, parts=(0, 2)),
        one("layers_0/kernel", rank=2, fused=3, parts=(2, 1), alpha=3.0, seed=1),
    ],
    "parts with DoRA": [
        one("layers_0/kernel", rank=1, fused=3, parts=(0,)),
        one("layers_0/kernel", rank=2, fused=3, parts=(2, 1), variant="dora", seed=1),
        one("layers_0/kernel", rank=2, fused=3, parts=(1,), variant="dora", seed=2),
    ],
}


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_each_computes_what_it_computed_alone(name, freeze):
    adapters = CASES[name]
    stacked = lora_jax.stack(adapters, PARAMS)
    if freeze:
        stacked = lora_jax.cache_norm(PARAMS, stacked)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(stacked)} == {len(adapters)}
    every = jax.jit(
        lambda stacked: jax.vmap(
            lambda i: lora_jax.lora_apply(MODEL, {"params": PARAMS}, stacked, X, adapter_ids=i)
        )(jnp.arange(-1, len(adapters)))
    )(stacked)
    base = jax.jit(MODEL.apply)
    assert relative_error(every[0], base({"params": PARAMS}, X)) < 1e-6
    for y, tree in zip(every[1:], adapters, strict=True):
        assert relative_error(y, base({"params": merged(tree)}, X)) < 1e-6


def test_what_is_stacked_stays_bit_for_bit():
    adapters = [one(variant="dora", seed=seed, trainable=["layers_0/bias"]) for seed in range(3)]
    expected = jax.tree.map(lambda *a: jnp.stack(a), *adapters)
    got = lora_jax.stack(adapters)
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert np.array_equal(a, b)
    for a, b in zip(lora_jax.unstack(got), adapters, strict=True):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        assert all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def test_frozen_norms_can_be_stacked_beside_trained_ones():
    lora, dora = one(), one(variant="dora", detach_norm=True, seed=1)
    exact = one(variant="dora", seed=2)
    frozen = lora_jax.cache_norm(PARAMS, exact)
    stacked = lora_jax.stack([lora, dora, frozen], PARAMS)
    for i, tree in enumerate([lora, dora, exact]):
        y = lora_jax.lora_apply(MODEL, {"params": PARAMS}, stacked, X, adapter_ids=i)
        assert relative_error(y, MODEL.apply({"params": merged(tree)}, X)) < 1e-6


def test_padding_stays_zero_in_training():
    stacked = lora_jax.stack([one(rank=1), one(rank=3, seed=1)])

    def loss(stacked):
        every = jax.vmap(lambda a: lora_jax.lora_apply(MODEL, {"params": PARAMS}, a, X))(stacked)
        return jnp.sum(every**2)

    node = jax.grad(loss)(stacked)["layers_0"]["kernel"]
    assert (node.U[0, :, 1:] == 0).all()
    assert (node.V[0, 1:] == 0).all()
    assert (node.U[0, :, 0] != 0).all()


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Cell, {"params": 0}, split_rngs={"params": True}, length=2)
        return scan(name="cells")(x, None)[1]


class Cell(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x, nn.Dense(12, name="dense")(x)


WIDE = {
    "dense": (nn.Dense(12), (3, 192), {}),
    "fused": (nn.Dense(36), (3, 192), {"fused": 3, "parts": (0, 2)}),
    "stacked kernels": (Scanned(), (3, 192), {}),
    "conv": (nn.Conv(12, (3, 3)), (3, 4, 4, 21), {}),
}


def nearly_emptied(layer, left, variant="lora"):
    """An adapter that leaves so much of every other column, a DoRA next to it, and `W + s U V`."""

    def length(matrix):
        return np.linalg.norm(matrix, axis=-2, keepdims=True)

    model, shape, fused = WIDE[layer]
    x = random_like(jnp.zeros(shape), scale=1.0)
    params = model.init(jax.random.key(0), x)["params"]
    axes = lora_jax.kernel_axes(model, {"params": params}, x)
    (path,) = axes
    key = tuple(path.split("/"))

    def adapters(rank, variant):
        config = lora_jax.LoraConfig([lora_jax.Rule(path, rank, variant=variant, **fused)])
        return random_like(lora_jax.lora_init(jax.random.key(1), params, config, axes=axes)[1])

    def with_kernel(matrix):
        flat = flatten(params, "params")
        flat[key] = node.axes.from_matrix(jnp.asarray(matrix, jnp.float32), flat[key])
        return lora_jax.trees._paths.unflatten(flat, params)

    emptying, dora = adapters(2, variant), adapters(1, "dora")
    node = flatten(emptying, "adapters")[key]
    W = np.array(node.axes.as_matrix(flatten(params, "params")[key]), np.float64)
    UV = np.asarray(node.U, np.float64) @ np.asarray(node.V, np.float64)
    rest = np.random.default_rng(0).standard_normal(W.shape)
    rest *= left * length(UV) / length(rest)
    W[..., ::2] = np.float32(rest - UV)[..., ::2]
    return x, with_kernel(W), emptying, dora, W + UV, with_kernel


@pytest.mark.parametrize("layer", WIDE)
def test_a_lora_beside_a_dora_may_remove_a_column(layer):
    """Its norm without `U V` is rounding errors there, and one of them over another is not 1."""
    model = WIDE[layer][0]

    @jax.jit
    def apply(params, stacked, x, ids):
        return lora_jax.lora_apply(model, {"params": params}, stacked, x, adapter_ids=ids)

    base, merge = jax.jit(model.apply), jax.jit(lora_jax.lora_merge)
    for left in (1e-2, 1e-3, 1e-4, 0.0):
        x, params, lora, dora, adapted, with_kernel = nearly_emptied(layer, left)
        expected = base({"params": with_kernel(adapted)}, x)
        row = np.s_[:, 1] if layer == "stacked kernels" else np.s_[1]
        stacked = lora_jax.stack([dora, lora], params)
        for tree in (stacked, lora_jax.cache_norm(params, stacked)):
            assert relative_error(apply(params, tree, x, 1), expected) < 1e-6
            mixed = apply(params, tree, x, jnp.array([0, 1, -1]))
            assert relative_error(mixed[row], expected[row]) < 1e-6
            merged = merge(params, lora_jax.unstack(tree)[1])
            assert relative_error(base({"params": merged}, x), expected) < 1e-6


@pytest.mark.parametrize("layer", WIDE)
def test_a_frozen_norm_keeps_the_digits_of_a_dora_that_removes_a_column(layer):
    _, params, dora, _, adapted, _ = nearly_emptied(layer, 1e-3, "dora")
    expected = np.linalg.norm(adapted, axis=-2)
    for tree in (dora, lora_jax.stack([dora, dora])):
        frozen = flatten(lora_jax.cache_norm(params, tree), "frozen")
        for key, node in flatten(tree, "adapters").items():
            ratio = np.asarray(node.m, np.float64) / np.asarray(frozen[key].m, np.float64)
            np.testing.assert_allclose(ratio, np.broadcast_to(expected, ratio.shape), rtol=1e-3)


OTHER = {"layers_0": {"kernel": jnp.ones((5, 7))}}
ERRORS = {
    "empty": ([], None, ValueError, "list of adapters is empty"),
    "one tree": (one(), None, TypeError, "takes a list of adapters, got dict"),
    "a stack": ([lora_jax.stack([one()])], None, ValueError, "is a stack of 1 adapters already"),
    "no params": (
        [one(), one(trainable=["layers_2/bias"])],
        None,
        ValueError,
        "Not all of the adapters have 'layers_2/bias'.*pass the model's parameters",
    ),
    "fully trained and adapted": (
        [one(), one("layers_0/kernel", trainable=["layers_2/kernel"])],
        PARAMS,
        ValueError,
        "'layers_2/kernel' is adapted in one of the adapters and fully trained in another",
    ),
    "materialize": ([one(), one(materialize=True)], None, ValueError, "differ in materialize"),
    "fused": (
        [one("layers_0/kernel"), one("layers_0/kernel", fused=2, rank=1)],
        None,
        ValueError,
        "differ in axes",
    ),
    "another model": (
        [one("layers_0/kernel"), one("layers_0/kernel", params=OTHER)],
        None,
        ValueError,
        r"'layers_0/kernel' are for kernels of different shapes, \(5, 6\) and \(5, 7\)",
    ),
    "params of another model": (
        [one("layers_0/kernel"), one("layers_2/kernel", variant="dora")],
        OTHER,
        ValueError,
        r"'layers_0/kernel' does not fit the kernel .* Was it made for another model",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    adapters, params, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        lora_jax.stack(adapters, params)


def test_a_stack_is_not_taken_for_one_adapter(tmp_path):
    stacked = lora_jax.stack([one(), one(seed=1)])
    variables = {"params": PARAMS}
    with pytest.raises(ValueError, match=r"is a stack of 2.*adapter_ids=ids"):
        lora_jax.lora_apply(MODEL, variables, stacked, X)
    with pytest.raises(ValueError, match=r"is a stack of 2: save each one alone"):
        lora_jax.save(tmp_path / "a", stacked)
    with pytest.raises(ValueError, match="adapter_ids is for stacked adapters"):
        lora_jax.lora_apply(MODEL, variables, one(), X, adapter_ids=0)
    assert not list(tmp_path.iterdir())


def test_what_a_row_of_a_stack_cannot_say_is_not_made_up(tmp_path):
    stacked = lora_jax.stack([one(dropout=0.1), one(dropout=0.5, seed=1)])
    first = jax.tree.map(lambda a: a[0], stacked)
    for use in (
        lambda: lora_jax.lora_apply(MODEL, {"params": PARAMS}, first, X),
        lambda: lora_jax.lora_merge(PARAMS, first),
        lambda: lora_jax.save(tmp_path / "a", first),
        lambda: lora_jax.combine([first], [1.0]),
        lambda: lora_jax.stack([first]),
    ):
        with pytest.raises(ValueError, match=r"differ in dropout.*lora_jax.unstack\(stacked\)"):
            use()
    lora_jax.save(tmp_path / "a", lora_jax.unstack(stacked)[0])


def test_what_is_added_to_a_bias_is_neither_stacked_nor_summed():
    tree = {"layers_0": {"bias": lora_jax.LoraBias(jnp.ones(6), 2.0)}}
    with pytest.raises(ValueError, match=r"adapters\[0\] adds something to 'layers_0/bias'"):
        lora_jax.stack([tree])
    with pytest.raises(ValueError, match=r"Something is added to 'layers_0/bias'.*no arithmetic"):
        lora_jax.combine([tree], [1.0])


def test_frozen_norms_are_for_inference(tmp_path):
    frozen = lora_jax.cache_norm(PARAMS, one(variant="dora"))
    with pytest.raises(ValueError, match="'layers_0/kernel' is of cache_norm: save the adapter"):
        lora_jax.save(tmp_path / "a", frozen)
    with pytest.raises(ValueError, match="there is no variant 'scaled'"):
        lora_jax.Rule("kernel", 2, variant="scaled")
    with pytest.raises(ValueError, match="'layers_0/kernel' is of cache_norm: save the adapter"):
        lora_jax.peft.save(tmp_path / "b", PARAMS, frozen, base_model_name_or_path="x")
    assert not list(tmp_path.iterdir())


def test_parameters_of_another_model():
    rules = [lora_jax.Rule("kernel", rank=1)]
    params = {"kernel": jnp.ones((3, 2))}
    _, one = lora_jax.lora_init(jax.random.key(0), params, lora_jax.LoraConfig(rules))
    with pytest.raises(ValueError, match=r"'kernel' does not fit the kernel \(5, 2\): U is"):
        lora_jax.stack([one, one], {"kernel": jnp.ones((5, 2))})
    with pytest.raises(ValueError, match="'kernel', which params lacks"):
        lora_jax.stack([one, one], {"other": jnp.ones((3, 2))})
    adapters = {**one, "bias": jnp.ones(2)}
    with pytest.raises(ValueError, match="'bias' was fully trained as"):
        lora_jax.cache_norm({**params, "bias": jnp.ones(3)}, adapters)
