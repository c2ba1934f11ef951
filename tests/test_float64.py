"""A base in float64: a magnitude has the precision of the norm that it is divided by."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_like

import lora_jax


@pytest.fixture(autouse=True)
def float64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def case(**rule):
    model = nn.Dense(6, param_dtype=jnp.float64, dtype=jnp.float64)
    x = random_like(jnp.zeros((3, 8)), scale=1.0)
    params = random_like(model.init(jax.random.key(0), x)["params"], seed=1)
    return model, x, params, adapters(params, **rule)


def adapters(params, variant="dora", **rule):
    config = lora_jax.LoraConfig([lora_jax.Rule("kernel", 2, variant=variant, **rule)])
    return lora_jax.lora_init(jax.random.key(1), params, config)[1]


def apply(model, params, tree, x, **kwargs):
    return lora_jax.lora_apply(model, {"params": params}, tree, x, **kwargs)


def error(got, expected):
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.dtype == expected.dtype == np.float64
    return np.abs(got - expected).max() / np.abs(expected).max()


def dense(params, tree):
    """`W'`, by NumPy."""
    node = tree["kernel"]
    U, V = (np.asarray(array, np.float64) for array in (node.U, node.V))
    W = np.asarray(params["kernel"]) + node.scale * U @ V
    return W if node.m is None else np.asarray(node.m) * W / np.linalg.norm(W, axis=0)


@pytest.mark.parametrize("fused", [1, 3])
def test_the_start_changes_nothing(fused):
    model, x, params, tree = case(fused=fused)
    assert tree["kernel"].m.dtype == jnp.float64
    assert tree["kernel"].U.dtype == tree["kernel"].V.dtype == jnp.float32
    expected = model.apply({"params": params}, x)
    assert error(apply(model, params, tree, x), expected) < 1e-14
    assert error(apply(model, params, lora_jax.cache_norm(params, tree), x), expected) < 1e-14
    assert error(lora_jax.lora_merge(params, tree)["kernel"], params["kernel"]) < 1e-14


def test_in_a_stack_and_a_pool():
    model, x, params, dora = case()
    dora, lora = random_like(dora), random_like(adapters(params, "lora"), seed=2)
    expected = [np.asarray(x) @ dense(params, tree) + params["bias"] for tree in (dora, lora)]
    stacked = lora_jax.stack([dora, lora], params)
    frozen = lora_jax.cache_norm(params, dora)
    pool = lora_jax.AdapterPool(params, like=[dora, lora], slots=2)
    pool.put("dora", dora)
    pool.put("lora", lora)
    with pool.use(["dora", "lora"]) as (all_, ids):
        in_pool = jax.tree.map(lambda array: array[ids], all_)
    for tree in (
        stacked,
        lora_jax.cache_norm(params, stacked),
        lora_jax.stack([frozen, lora], params),
        lora_jax.stack([frozen, lora]),
        in_pool,
    ):
        assert tree["kernel"].m.dtype == jnp.float64
        for i in range(2):
            assert error(apply(model, params, tree, x, adapter_ids=i), expected[i]) < 1e-14


def test_what_was_made_in_float32_is_stacked_beside():
    model, x, params, dora = case()
    dora = random_like(dora)
    old = {"kernel": dora["kernel"].replace(m=dora["kernel"].m.astype(jnp.float32))}
    expected = np.asarray(x) @ dense(params, old) + params["bias"]
    for i, trees in enumerate(([old, dora], [dora, old])):
        stacked = lora_jax.stack(trees, params)
        assert stacked["kernel"].m.dtype == jnp.float64
        y = apply(model, params, stacked, x, adapter_ids=i)
        assert error(y, expected) < 1e-14


def test_parts_of_fused_kernels():
    model, x, params, first = case(fused=3, parts=(0,))
    trees = [first, adapters(params, fused=3, parts=(2, 1))]
    stacked = lora_jax.stack(trees, params)
    assert stacked["kernel"].m.dtype == jnp.float64
    for i in range(2):
        y = apply(model, params, stacked, x, adapter_ids=i)
        assert error(y, model.apply({"params": params}, x)) < 1e-14


def test_sums():
    model, x, params, one = case()
    other = adapters(params)
    total, _ = lora_jax.combine([one, other], [0.25, 0.75], params=params)
    assert total["kernel"].m.dtype == jnp.float64
    assert error(apply(model, params, total, x), model.apply({"params": params}, x)) < 1e-14


def test_files(tmp_path):
    _, _, params, tree = case()
    tree = random_like(tree)
    lora_jax.save(tmp_path / "own", tree, frozen=params)
    _, again = lora_jax.load(tmp_path / "own", params, verify=True)
    assert again["kernel"].m.dtype == jnp.float64
    np.testing.assert_array_equal(again["kernel"].m, tree["kernel"].m)
    model, base = {"dense": tree}, {"dense": params}
    lora_jax.peft.save(tmp_path / "peft", base, model, base_model_name_or_path="x")
    _, again = lora_jax.peft.load(tmp_path / "peft", base)
    assert again["dense"]["kernel"].m.dtype == jnp.float64
    assert again["dense"]["kernel"].U.dtype == jnp.float32
    np.testing.assert_array_equal(again["dense"]["kernel"].m, tree["kernel"].m)
