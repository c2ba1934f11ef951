"""Split, join and merge: every leaf once, nothing changed on the way."""

import pickle

import flax.core
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers import random_like, relative_error

import lora_jax


def params(dtype=jnp.float32):
    tree = {
        "encoder": {
            "query": {"kernel": jnp.zeros((6, 4), dtype), "bias": jnp.zeros(4, dtype)},
            "norm": {"scale": jnp.zeros(6, dtype)},
        },
        "head": {"kernel": jnp.zeros((4, 3), dtype), "bias": jnp.zeros(3, dtype)},
        "empty": {},
    }
    return random_like(tree)


CONFIG = lora_jax.LoraConfig(
    [lora_jax.Rule(".*/query/kernel", rank=2, alpha=3.0, variant="dora", dropout=0.1)],
    trainable=["head/.*", ".*/norm/.*"],
)


def init(tree=None, config=CONFIG, seed=0):
    return lora_jax.lora_init(jax.random.key(seed), params() if tree is None else tree, config)


def test_every_leaf_is_in_one_tree():
    tree = params()
    frozen, adapters = init(tree)
    assert set(flatten_dict(frozen)) == {
        ("encoder", "query", "kernel"),
        ("encoder", "query", "bias"),
    }
    assert set(flatten_dict(adapters)) == {
        ("encoder", "query", "kernel"),
        ("encoder", "norm", "scale"),
        ("head", "kernel"),
        ("head", "bias"),
    }
    assert frozen["encoder"]["query"]["kernel"] is tree["encoder"]["query"]["kernel"]
    assert frozen["empty"] == {}


def test_adapter_at_the_start():
    frozen, adapters = init()
    kernel, adapter = frozen["encoder"]["query"]["kernel"], adapters["encoder"]["query"]["kernel"]
    assert (adapter.U.shape, adapter.V.shape, adapter.m.shape) == ((6, 2), (2, 4), (4,))
    assert (adapter.U == 0).all()
    assert (adapter.V != 0).all()
    assert relative_error(adapter.m, jnp.linalg.norm(kernel, axis=0)) < 1e-6
    assert (adapter.kind, adapter.rank, adapter.scale) == ("dora", 2, 1.5)


@pytest.mark.parametrize("zero", ["U", "V"])
@pytest.mark.parametrize("std", [None, 0.3])
def test_standard_deviation(zero, std):
    rule = lora_jax.Rule("kernel", rank=100, zero=zero, std=std)
    _, adapters = init({"kernel": jnp.zeros((400, 200))}, lora_jax.LoraConfig([rule]))
    U, V = adapters["kernel"].U, adapters["kernel"].V
    zeros, gaussian = (U, V) if zero == "U" else (V, U)
    assert (zeros == 0).all()
    expected = 400**-0.5 if std is None else std
    assert abs(float(gaussian.std()) / expected - 1) < 0.03
    assert abs(float(gaussian.mean())) < 0.03 * expected


def test_start_depends_on_key_and_path_only():
    one = {"a": {"kernel": jnp.ones((6, 6))}}
    two = {**one, "b": {"kernel": jnp.ones((6, 6))}}
    config = lora_jax.LoraConfig([lora_jax.Rule(".*/kernel", rank=2)])
    (_, first), (_, second), (_, third) = init(one, config), init(two, config), init(two, config, 1)
    a = first["a"]["kernel"].V
    assert jnp.array_equal(a, second["a"]["kernel"].V)
    assert not jnp.array_equal(a, second["b"]["kernel"].V)
    assert not jnp.array_equal(a, third["a"]["kernel"].V)


def test_merge_gives_back_the_parameters():
    tree = params()
    merged = lora_jax.lora_merge(*init(tree))
    assert jax.tree.structure(merged) == jax.tree.structure(tree)
    for got, expected in zip(jax.tree.leaves(merged), jax.tree.leaves(tree), strict=True):
        assert got.dtype == expected.dtype
        assert relative_error(got, expected) < 1e-6


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_fully_trained_leaf_is_float32_and_goes_back(dtype):
    tree = params(dtype)
    frozen, adapters = init(tree)
    assert {a.dtype for a in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    assert {a.dtype for a in jax.tree.leaves(frozen)} == {jnp.dtype(dtype)}
    merged = lora_jax.lora_merge(frozen, adapters)
    for got, expected in zip(jax.tree.leaves(merged), jax.tree.leaves(tree), strict=True):
        assert got.dtype == expected.dtype
    assert jnp.array_equal(merged["head"]["kernel"], tree["head"]["kernel"])
    # The model sees the leaf in its own dtype, as if nothing had happened.
    model, x = nn.Dense(3), jnp.ones((2, 4), dtype)
    head = {"kernel": adapters["head"]["kernel"], "bias": adapters["head"]["bias"]}
    y = lora_jax.lora_apply(model, {"params": {}}, head, x)
    assert y.dtype == dtype
    assert jnp.array_equal(y, model.apply({"params": tree["head"]}, x))


def test_donated_adapters_leave_the_parameters_intact():
    tree = params()
    _, adapters = init(tree)
    jax.jit(lambda a: jax.tree.map(lambda x: x + 1, a), donate_argnums=0)(adapters)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def test_numpy_parameters():
    tree = jax.tree.map(np.asarray, params())
    frozen, adapters = init(tree)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(adapters))
    merged = lora_jax.lora_merge(frozen, adapters)
    assert (
        relative_error(merged["encoder"]["query"]["kernel"], tree["encoder"]["query"]["kernel"])
        < 1e-6
    )


def test_frozen_dict_stays_one():
    frozen, adapters = init(flax.core.freeze(params()))
    assert isinstance(frozen, flax.core.FrozenDict)
    assert isinstance(adapters, flax.core.FrozenDict)
    assert isinstance(lora_jax.lora_merge(frozen, adapters), flax.core.FrozenDict)


def test_boxes_stay():
    box = nn.Partitioned(jnp.ones((6, 4)), names=(None, "model"))
    tree = {"a": {"kernel": box}, "b": {"kernel": box}}
    config = lora_jax.LoraConfig([lora_jax.Rule("a/kernel", rank=2)], trainable=["b/.*"])
    frozen, adapters = init(tree, config)
    assert adapters["a"]["kernel"].U.shape == (6, 2)
    assert jax.tree.structure(lora_jax.lora_merge(frozen, adapters)) == jax.tree.structure(tree)


@pytest.fixture
def float64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.usefixtures("float64")
def test_fully_trained_float64_leaf_stays():
    tree = {"kernel": jnp.ones((3, 3), jnp.float64), "bias": jnp.ones(3, jnp.float64)}
    config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=1)], trainable=["bias"])
    frozen, adapters = init(tree, config)
    assert adapters["bias"].dtype == jnp.float64
    assert adapters["kernel"].U.dtype == jnp.float32
    assert lora_jax.lora_merge(frozen, adapters)["kernel"].dtype == jnp.float64


def test_merge_accumulates_in_float32_and_casts_once():
    """In bfloat16 1 + 2^-9 is 1, but 1 + 4 x 2^-9 is not: the sum must be formed before."""
    kernel = jnp.ones((4, 4), jnp.bfloat16)
    config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=4)])
    frozen, adapters = init({"kernel": kernel}, config)
    adapter = adapters["kernel"].replace(U=jnp.full((4, 4), 2.0**-9), V=jnp.ones((4, 4)))
    merged = lora_jax.lora_merge(frozen, {"kernel": adapter})["kernel"]
    assert merged.dtype == jnp.bfloat16
    assert (merged == 1 + 2.0**-7).all()


def test_merge_is_differentiable_and_jittable():
    frozen, adapters = init()
    adapters = random_like(adapters)

    def loss(adapters):
        return sum(
            jnp.sum(leaf**2) for leaf in jax.tree.leaves(lora_jax.lora_merge(frozen, adapters))
        )

    grads = jax.jit(jax.grad(loss))(adapters)
    # || m W / ||W|| ||^2 = sum m^2
    m = adapters["encoder"]["query"]["kernel"].m
    assert relative_error(grads["encoder"]["query"]["kernel"].m, 2 * m) < 1e-5
    assert relative_error(grads["head"]["bias"], 2 * adapters["head"]["bias"]) < 1e-6


def test_serialization_and_pickle():
    _, adapters = init(params(jnp.bfloat16))
    adapters = random_like(adapters)
    _, fresh = init(params(jnp.bfloat16), seed=1)
    restored = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(adapters))
    unpickled = pickle.loads(pickle.dumps(adapters))
    for other in (restored, unpickled):
        assert jax.tree.structure(other) == jax.tree.structure(adapters)
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(adapters), strict=True):
            assert jnp.array_equal(a, b)
    state = flax.serialization.to_state_dict(adapters)
    assert set(state["encoder"]["query"]["kernel"]) == {"U", "V", "m"}


def test_abstract():
    abstract = jax.eval_shape(lambda tree: tree, params())
    key = jax.random.key(0)
    frozen, adapters = jax.eval_shape(lambda p: lora_jax.lora_init(key, p, CONFIG), abstract)
    assert adapters["encoder"]["query"]["kernel"].U.shape == (6, 2)
    merged = jax.eval_shape(lora_jax.lora_merge, frozen, adapters)
    assert merged == abstract


@pytest.mark.parametrize(
    ("tree", "rule", "match"),
    [
        (
            {"kernel": jnp.ones(3)},
            {},
            r"matches what is not a matrix \(d, k\): 'kernel' \(3,\).*kernel_axes.*narrower",
        ),
        ({"kernel": jnp.ones((2, 3, 4))}, {}, r"'kernel' \(2, 3, 4\).*batch_axes"),
        (
            {"kernel": jnp.ones((3, 5))},
            {"rank": 4},
            r"'kernel', of shape \(3, 5\): rank 4 is above",
        ),
        ({"kernel": jnp.ones((3, 5), int)}, {}, r"'kernel', which is not floating-point but int"),
        ({"kernel": "W"}, {}, r"'kernel', which is not floating-point but str"),
        (
            {"kernel": jnp.ones((0, 3, 5))},
            {"batch_axes": (0,)},
            r"'kernel', of shape \(0, 3, 5\), in which there are no numbers",
        ),
        ({"kernel": jnp.ones((3, 5))}, {"batch_axes": (2,)}, r"has no batch_axes=\(2,\)"),
        ({"kernel": jnp.ones((2, 3, 5))}, {"batch_axes": (0, -3)}, r"has no batch_axes=\(0, -3\)"),
        (
            {"kernel": jnp.ones((3, 5))},
            {"batch_axes": (0,)},
            r"is not a matrix .*'kernel' \(3, 5\)",
        ),
        (
            {"kernel": jnp.ones((3, 5, 2))},
            {"batch_axes": (2,), "input_axes": (2,)},
            r"'kernel'.*both in input_axes",
        ),
        (
            {"kernel": jnp.ones((3, 5))},
            {"fused": 2},
            r"'kernel', whose 5 outputs are not 2 kernels side by side",
        ),
        (
            {"kernel": jnp.ones((3, 6))},
            {"fused": 3, "rank": 3},
            r"rank 3 is above min\(d, k\) = 2 of each of the 3 fused kernels",
        ),
        ({"kernel": jnp.ones((3, 5)).at[1, 2].set(jnp.nan)}, {}, r"'kernel' has NaN or infinite"),
        (
            {"kernel": jnp.ones((3, 5)).at[1, 2].set(jnp.nan)},
            {"variant": "dora"},
            r"'kernel' has NaN or infinite",
        ),
        (
            {"kernel": jnp.ones((3, 5)).at[1, 2].set(jnp.inf)},
            {"variant": "dora"},
            r"'kernel' has NaN or infinite",
        ),
        ({"params": {"kernel": jnp.ones((3, 3))}}, {}, r"pass variables\['params'\]"),
        (
            {"params": {"kernel": jnp.ones((3, 3))}, "batch_stats": {"mean": jnp.ones(3)}},
            {},
            r"pass variables\['params'\]",
        ),
        (
            {"a/b": {"kernel": jnp.ones((3, 3))}, "a": {"b/kernel": jnp.ones((3, 3))}},
            {},
            r"Two parameters have the path 'a/b/kernel'",
        ),
    ],
)
def test_bad_leaves(tree, rule, match):
    config = lora_jax.LoraConfig([lora_jax.Rule(".*kernel", **{"rank": 1, **rule})])
    with pytest.raises(ValueError, match=match):
        init(tree, config)


def test_bad_trees():
    with pytest.raises(TypeError, match="config must be a LoraConfig, got list"):
        init(config=[lora_jax.Rule("kernel", 2)])
    with pytest.raises(TypeError, match=r"params must be a nested dict of arrays, .*got list"):
        init([jnp.ones((2, 2))])
    with pytest.raises(ValueError, match=r"'step' cannot be fully trained: it is int32"):
        init({"step": jnp.zeros(3, int)}, lora_jax.LoraConfig(trainable=["step"]))
    frozen, _ = init()
    config = lora_jax.LoraConfig([lora_jax.Rule(".*", rank=2, batch_axes=(0,))])
    _, adapters = init({"encoder": {"query": {"kernel": jnp.ones((2, 6, 4))}}}, config)
    with pytest.raises(ValueError, match=r"'encoder/query/kernel'.*is for a kernel of 3 axes"):
        lora_jax.lora_merge(frozen, adapters)


def test_a_jitted_function_may_close_over_the_parameters():
    params = {"kernel": jnp.ones((3, 2))}
    config = lora_jax.LoraConfig([lora_jax.Rule("kernel", 1, variant="dora")])
    make = jax.jit(lambda key: lora_jax.lora_init(key, params, config)[1])
    assert make(jax.random.key(0))["kernel"].m.shape == (2,)
