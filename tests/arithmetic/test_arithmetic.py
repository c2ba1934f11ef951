"""Sums of adapters are those of what they change, exactly, or to the error that is stated."""

import functools

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from flax.traverse_util import flatten_dict
from helpers import random_like, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax
from lora_jax import KernelAxes, LoraConfig, Rule
from lora_jax.arithmetic import _task_vectors as task_vectors
from lora_jax.arithmetic._low_rank import low_rank, low_rank_product
from lora_jax.trees._paths import flatten, path_of

KEY = jax.random.key(0)
# Kernels of all kinds: a path gives the shape, the axes of the stacks and of the inputs, and parts.
KERNELS = {
    "dense": ((7, 5), {}),
    "conv": ((2, 3, 4), {"input_axes": (0, 1)}),
    "experts": ((2, 3, 4, 6), {"batch_axes": (0, 3), "input_axes": (2,)}),
    "fused": ((6, 12), {"fused": 3, "parts": (0, 2)}),
    "stack of fused": ((2, 6, 4), {"batch_axes": (0,), "fused": 2}),
}
ADAPTERS = {
    "lora": {"rank": 1, "alpha": 3.0},
    "rslora": {"rank": 2, "alpha": 5.0, "rslora": True, "zero": "V"},
    "dora": {"rank": 2, "alpha": 1.0, "variant": "dora", "detach_norm": True},
    "dora, rank 1": {"rank": 1, "variant": "dora"},
}


def kernels(*names, dtype=jnp.float32):
    zeros = {name: jnp.zeros(KERNELS[name][0], dtype) for name in names or KERNELS}
    return random_like(zeros, 1)


def trained(params, kind, seed, **more):
    """Adapters of all kernels, after a training that left nothing as it was."""
    rules = [Rule(n, **ADAPTERS[kind], **KERNELS[n][1], **more) for n in params if n in KERNELS]
    config = LoraConfig(rules)
    abstract = jax.eval_shape(lambda p: lora_jax.lora_init(KEY, p, config), params)[1]
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    adapters = random_like(zeros, seed, scale=0.2)
    for path, node in adapters.items():
        if node.m is not None:
            norm = np.linalg.norm(matrices(params, node, path), axis=-2)
            adapters[path] = node.replace(m=norm + node.m)
    return adapters


@functools.cache
def several(kinds):
    params = kernels()
    return params, [trained(params, kind, seed) for seed, kind in enumerate(kinds)]


def change(params, adapters, path):
    """`W' - W` of the matrices, `(*stack, d, k)` in float64, by the formula of the papers."""
    node = adapters[path]
    U, V, W = (np.asarray(x, np.float64) for x in (node.U, node.V, matrices(params, node, path)))
    adapted = W + node.scale * U @ V
    if node.m is None:
        return adapted - W
    norm = np.linalg.norm(adapted, axis=-2)
    return (np.asarray(node.m) / np.where(norm > 0, norm, 1))[..., None, :] * adapted - W


def matrices(params, node, path):
    return np.asarray(node.axes.as_matrix(jnp.asarray(params[path], jnp.float32)))


def check_sum(params, trees, weights, combined, tolerance=2e-5):
    for path in params:
        parts = [change(params, tree, path) for tree in trees]
        expected = sum(w * part for w, part in zip(weights, parts, strict=True))
        got = change(params, combined, path)
        size = max(np.abs(params[path]).max(), *(np.abs(part).max() for part in parts))
        assert np.abs(got - expected).max() < tolerance * size * max(1, *map(abs, weights))


@pytest.mark.parametrize("kinds", [("lora",), ("lora", "rslora"), ("dora",), ("dora", "rslora")])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_weighted_sums_are_exact(kinds, data):
    params, trees = several(kinds)
    weights = [data.draw(st.floats(-2, 2)) for _ in kinds]
    combined, report = lora_jax.combine(trees, weights, params=params)
    check_sum(params, trees, weights, combined)
    for path, node in combined.items():
        ranks = sum(tree[path].rank for tree in trees)
        assert (
            node.rank
            == report[path].rank
            == min(ranks, *node.axes.matrix_shape(params[path].shape))
        )
        assert report[path].error == 0
        assert (node.scale, node.rslora) == (1.0, False)
        assert node.kind == ("dora" if "dora" in kinds else "lora")
        assert node.axes == trees[0][path].axes
        node.check_fits(path, params[path].shape)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_negation_interpolation_and_identity(kind):
    params = kernels("dense", "experts")
    a, b = trained(params, kind, 1), trained(params, "lora", 2)
    for trees, weights in [([a], [-1]), ([a], [1]), ([a, b], [0.25, 0.75]), ([a, a], [1, -1])]:
        combined, _ = lora_jax.combine(trees, weights, params=params)
        check_sum(params, trees, weights, combined)
    same, _ = lora_jax.combine([a], [1], params=params)
    if kind == "lora":
        assert jnp.array_equal(same["dense"].U, a["dense"].U)
    assert same["dense"].rank == a["dense"].rank


def test_rank_is_folded_where_the_factors_are_wider_than_the_matrix():
    params = kernels("conv", "experts")
    trees = [trained(params, kind, i) for i, kind in enumerate(list(ADAPTERS) * 2)]
    weights = np.linspace(-1, 1, len(trees)).tolist()
    combined, _ = lora_jax.combine(trees, weights, params=params)
    assert combined["conv"].rank == 4  # of (6, 4), V is the identity
    assert combined["experts"].rank == 3  # of (4, 3)
    check_sum(params, trees, weights, combined)
    wide = {"dense": kernels("dense")["dense"].T}
    trees = [trained(wide, "rslora", i) for i in range(4)]
    combined, _ = lora_jax.combine(trees, [1] * 4)
    assert jnp.array_equal(combined["dense"].U, jnp.eye(5))
    check_sum(wide, trees, [1] * 4, combined)


@pytest.mark.parametrize("weight", [1.0, 2.0, -1.0])
def test_columns_that_lose_their_base(weight):
    """`c` is 0: magnitudes of 0 and of twice the norm, and columns of zeros."""
    params = {"dense": kernels("dense")["dense"].at[:, 2].set(0.0)}
    adapters = trained(params, "dora", 3)
    node = adapters["dense"]
    U, V = node.U, node.V.at[:, 2].set(0.0)
    norm = jnp.linalg.norm(params["dense"] + node.scale * U @ V, axis=0)
    for m in (jnp.zeros(5), 2 * norm, norm / 2, -norm):
        adapters = {"dense": node.replace(V=V, m=m)}
        combined, _ = lora_jax.combine([adapters], [weight], params=params)
        check_sum(params, [adapters], [weight], combined)
        tree = {"kernel": combined["dense"]}  # and the layer, which has the norm another way
        y = lora_jax.lora_apply(
            nn.Dense(5, use_bias=False), {"params": {"kernel": params["dense"]}}, tree, jnp.eye(7)
        )
        expected = params["dense"] + weight * change(params, adapters, "dense")
        assert jnp.abs(y - expected).max() < 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "Embed, tied",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "attention",
                "scan of scan, axes 0, 1",
                "Einsum at call, stacked",
                "Conv, groups",
                "ConvTranspose, kernel transposed",
                "ConvLocal, 2-D",
                "every layer, scan, axis 1, remat",
                "every layer, vmap, axis -1",
            )
        ),
    ],
)
def test_the_model_computes_the_sum(name):
    """Through lora_apply, whose DoRA has its norm another way."""
    case = zoo.CASES[name]
    variables, x = case.init()
    axes = lora_jax.kernel_axes(case.model, variables, x)
    trees = []
    for seed, variant in enumerate(("lora", "dora")):
        config = LoraConfig([Rule("|".join(axes), 1, variant=variant)])
        frozen, adapters = lora_jax.lora_init(KEY, variables["params"], config, axes=axes)
        trees.append(random_like(adapters, seed, scale=0.1))
    combined, _ = lora_jax.combine(trees, [0.5, -0.7], params=frozen)
    got = lora_jax.lora_apply(case.model, {"params": frozen}, combined, x)
    merged = [lora_jax.lora_merge(frozen, tree) for tree in trees]
    params = jax.tree.map(
        lambda W, a, b: W + 0.5 * (a - W) - 0.7 * (b - W), variables["params"], *merged
    )
    expected = case.model.apply({"params": params}, x)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_error(one, other) < 1e-4


def test_it_is_jitted_and_differentiated():
    params = kernels("dense", "fused")
    trees = [trained(params, kind, i) for i, kind in enumerate(("lora", "dora, rank 1"))]

    @jax.jit
    def norm(w, trees, params):
        combined, _ = lora_jax.combine(trees, [w, 1 - w], params=params)
        merged = lora_jax.lora_merge(params, combined)
        return sum(jnp.sum(merged[n] * (1 + params[n])) for n in params)

    change_of = [{n: change(params, tree, n) for n in params} for tree in trees]
    expected = sum(
        np.sum((change_of[0][n] - change_of[1][n]) * (1 + matrices(params, trees[0][n], n)))
        for n in params
    )
    assert jax.grad(norm)(0.3, trees, params) == pytest.approx(expected, rel=1e-4)
    closed = jax.jit(lambda w: lora_jax.combine(trees, [w, 1 - w], params=params)[0])(0.3)
    check_sum(params, trees, [0.3, 0.7], closed)
    with pytest.raises(TypeError, match=r"'dense' is traced: rank=.* computed on the host"):
        jax.jit(lambda tree: lora_jax.compress(tree, rank=1)[0])(trees[0])
    with pytest.raises(TypeError, match=r"weights or the key are traced: rank=.* on the host"):
        jax.jit(lambda w: lora_jax.combine(trees[:1], [w], rank=1)[0])(1.0)
    with pytest.raises(TypeError, match="params is traced at 'dense': rank="):
        jax.jit(lambda p: lora_jax.compress(trees[1], rank=1, params=p)[0])(params)


# --- compression ---


@pytest.mark.parametrize("kind", ["rslora", "dora"])
@pytest.mark.parametrize(
    "options", [{"rank": 1}, {"rank": 99}, {"explained_variance": 0.8}, {"explained_variance": 1.0}]
)
@pytest.mark.parametrize("variant", [None, "lora"])
def test_compression_has_the_error_that_it_states(kind, options, variant):
    params = kernels()
    adapters = trained(params, kind, 5)
    small, report = lora_jax.compress(adapters, **options, params=params, variant=variant)
    for path, node in small.items():
        wanted, got = change(params, adapters, path), change(params, small, path)
        error = np.linalg.norm(wanted - got) / np.linalg.norm(wanted)
        assert report[path].error == pytest.approx(error, abs=5e-6)
        assert node.rank == report[path].rank
        dense = variant == "lora" and kind == "dora"
        assert node.kind == ("lora" if dense else adapters[path].kind)
        full = min(node.axes.matrix_shape(params[path].shape))
        assert node.rank <= min(options.get("rank", full), full if dense else adapters[path].rank)
        if "explained_variance" in options:
            assert error <= (1 - options["explained_variance"]) ** 0.5 + 5e-6
    assert report.largest == max(row.error for row in report.values())


def test_dora_stays_nearest_for_its_ratio():
    """No other `U V` of that rank is nearer, with the columns' ratio as it is."""
    params = kernels("dense")
    adapters = {"dense": random_like(trained(params, "dora", 6)["dense"], 7)}
    small, report = lora_jax.compress(adapters, rank=1, params=params)
    node, W = small["dense"], params["dense"]
    ratio = node.m / jnp.linalg.norm(W + node.U @ node.V, axis=0)
    wanted = change(params, adapters, "dense")
    for seed in range(20):
        U, V = random_like((node.U, node.V), seed, scale=1e-2)
        other = np.asarray(ratio * (W + U @ V) - W)
        error = np.linalg.norm(wanted - other) / np.linalg.norm(wanted)
        assert error > report["dense"].error - 1e-6


def test_explained_variance_of_a_stack_is_that_of_every_matrix():
    U = jnp.zeros((2, 6, 3)).at[:, :3].set(jnp.eye(3))
    V = jnp.zeros((2, 3, 5)).at[:, :, :3].set(jnp.eye(3))
    V = V * jnp.array([[1.0, 0.1, 0.01], [1.0, 1.0, 1.0]])[..., None]
    node = lora_jax.Adapter(U, V, rank=3, alpha=3.0, axes=KernelAxes((1,), (2,), (0,)))
    small, report = lora_jax.compress({"kernel": node}, explained_variance=0.6)
    assert report["kernel"].rank == 2
    assert (small["kernel"].U[0, :, 1] == 0).all()  # the first one needs a rank of 1
    lost = np.sqrt((0.1**2 + 0.01**2 + 1) / (1.0101 + 3))
    assert report["kernel"].error == pytest.approx(lost, rel=1e-5)


@pytest.mark.parametrize("options", [{"rank": 3}, {"explained_variance": 0.5}])
def test_no_change_at_all(options):
    params = kernels()
    rules = [Rule(n, 3 if n == "dense" else 1, **KERNELS[n][1]) for n in params]
    _, adapters = lora_jax.lora_init(KEY, params, LoraConfig(rules))
    small, report = lora_jax.compress(adapters, **options)
    assert report.largest == 0
    assert report["dense"].rank == (3 if "rank" in options else 1)
    assert (small["dense"].U @ small["dense"].V == 0).all()


def test_singular_values_give_the_nearest():
    delta = np.asarray(jax.random.normal(KEY, (7, 5)))
    values = np.linalg.svd(delta, compute_uv=False)
    low = low_rank(delta, 2, None)
    assert low.error == pytest.approx(np.linalg.norm(values[2:]) / np.linalg.norm(values), rel=1e-5)
    got = np.linalg.norm(delta - low.U @ low.V) / np.linalg.norm(delta)
    assert got == pytest.approx(low.error, rel=1e-5)
    explained_variance = np.square(values[:3]).sum() / np.square(values).sum()
    assert low_rank(delta, None, float(explained_variance) - 1e-6).U.shape[1] == 3
    assert low_rank(delta, None, float(explained_variance) + 1e-6).U.shape[1] == 4
    factored = low_rank_product(delta, np.eye(5), 2, None)
    assert np.abs(factored.U @ factored.V - low.U @ low.V).max() < 1e-5


# --- task vectors ---


def test_pruning_and_election_by_hand():
    a = np.array([[4.0, -3.0, 0.5], [1.0, 0.0, -2.0]], np.float32)
    b = np.array([[-5.0, -1.0, 0.1], [3.0, 0.0, 2.0]], np.float32)
    merged = task_vectors.merged("magnitude_prune", [a, b], [1, 2], density=0.5)
    assert merged.tolist() == [[-6, -3, 0], [6, 0, 2]]
    # The sums are -1, -4, 0.6, 4, 0 and 0, so that the signs are -, -, +, +, + and +.
    merged = task_vectors.merged("ties", [a, b], [1, 2], density=1.0)
    assert merged == pytest.approx(np.array([[-10, -2.5, 0.35], [3.5, 0, 4]]))
    assert np.count_nonzero(task_vectors.pruned(a, 1e-9)) == 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.floats(0.05, 1), st.sampled_from(["ties", "magnitude_prune"]))
def test_laws_of_task_vectors(seed, density, method):
    rng = np.random.default_rng(seed)
    a, b, c = rng.standard_normal((3, 6, 5)).astype(np.float32)

    def merge(deltas, weights):
        return task_vectors.merged(method, deltas, weights, density)

    assert np.allclose(merge([a, b], [1.0, -0.5]), merge([a, -b], [1.0, 0.5]))
    assert np.allclose(merge([a, b, c], [1.0, 0.5, 0.0]), merge([a, b], [1.0, 0.5]))
    assert np.allclose(merge([a], [2.0]), 2 * task_vectors.pruned(a, density))
    kept = np.count_nonzero(task_vectors.pruned(a, density))
    assert kept == max(1, int(density * a.size))
    left = np.abs(a)[task_vectors.pruned(a, density) == 0]
    assert left.max(initial=0) <= np.sort(np.abs(a), axis=None)[-kept]


def test_dare_is_right_in_the_mean():
    delta = np.linspace(-1, 1, 20, dtype=np.float32)
    draws = [task_vectors.dropped(delta, 0.4, key) for key in jax.random.split(KEY, 100)]
    assert {float(x) for x in np.unique(np.stack(draws)[:, 0])} == {-2.5, 0.0}
    assert np.abs(np.mean(draws, 0) - delta).max() < 6 * (1.5 / 100) ** 0.5


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_task_vectors_of_every_kernel(method):
    """Dense `W' - W` of LoRA and DoRA, matrix by matrix, as a LoRA with the error it states."""
    params = kernels()
    trees = [trained(params, kind, i) for i, kind in enumerate(("rslora", "dora"))]
    options = {"params": params, "combination_type": method, "density": 0.5}
    if "dare" in method:
        options["key"] = KEY
    exact, report = lora_jax.combine(trees, [1.0, 0.5], explained_variance=1.0, **options)
    assert report.largest < 2e-6
    low, report = lora_jax.combine(trees, [1.0, 0.5], rank=1, **options)
    again, _ = lora_jax.combine(trees, [1.0, 0.5], rank=1, **options)
    for path, node in low.items():
        wanted, got = change(params, exact, path), change(params, low, path)
        error = np.linalg.norm(wanted - got) / np.linalg.norm(wanted)
        assert report[path].error == pytest.approx(error, abs=5e-6)
        assert (node.kind, node.rank, node.m) == ("lora", 1, None)
        assert jnp.array_equal(node.U, again[path].U)
        if "dare" in method:
            continue
        parts = [change(params, tree, path).astype(np.float32) for tree in trees]
        for index in np.ndindex(wanted.shape[:-2]):
            merged = task_vectors.merged(method, [p[index] for p in parts], [1.0, 0.5], 0.5)
            assert np.abs(wanted[index] - merged).max() < 1e-5


def test_dare_differs_by_key_adapter_path_and_matrix():
    node = lora_jax.Adapter(
        jnp.ones((2, 6, 1)), jnp.ones((2, 1, 5)), axes=KernelAxes((1,), (2,), (0,))
    )
    trees = [{"a": node, "b": node}] * 2
    options = {"combination_type": "dare_linear", "density": 0.5, "explained_variance": 1.0}
    masks = []
    for key in (KEY, jax.random.key(1)):
        for weights in ([1, 0], [0, 1]):
            combined, _ = lora_jax.combine(trees, weights, key=key, **options)
            products = [combined[name].U @ combined[name].V for name in "ab"]
            masks += [tuple(np.ravel(p[i] > 1)) for p in products for i in range(2)]
    assert len(set(masks)) == len(masks) == 16


# --- fully trained leaves, and trees that differ ---


def with_head(seed, trainable=("head",), dtype=jnp.bfloat16, adapted=("dense",)):
    params = kernels("dense") | {"head": jnp.arange(4, dtype=dtype), "bias": jnp.ones(2)}
    config = LoraConfig([Rule(name, 1) for name in adapted], list(trainable))
    frozen, adapters = lora_jax.lora_init(KEY, params, config)
    return params, frozen, random_like(adapters, seed)


def test_fully_trained_leaves():
    params, frozen, a = with_head(1)
    b = with_head(2, ["head", "bias"])[2]
    combined, report = lora_jax.combine([a, b], [0.5, -1], params=params)
    base = np.float32(params["head"])
    expected = base + 0.5 * (a["head"].value - base) - (b["head"].value - base)
    assert relative_error(combined["head"].value, expected) < 1e-6
    assert combined["head"].dtype == "bfloat16"
    assert relative_error(combined["bias"], 1 - (b["bias"] - 1)) < 1e-6
    assert (report["head"].rank, report["head"].error) == (None, 0.0)
    # Where weights sum to 1 the base is not needed, nor for what one tree alone has at weight 1.
    mean, _ = lora_jax.combine([a, a], [0.25, 0.75])
    assert relative_error(mean["head"].value, a["head"].value) < 1e-6
    same, _ = lora_jax.compress(b, rank=1, params=frozen)
    assert jnp.array_equal(same["bias"], b["bias"])
    for trees, weights, options in [
        ([a, a], [1, 1], {}),
        ([a, a], [1, 1], {"params": frozen}),
        ([a, b], [0.5, 0.5], {"params": frozen | {"head": params["head"]}}),
        ([a], [1], {"combination_type": "ties", "density": 0.5, "rank": 1}),
    ]:
        if "head" in options.get("params", {}):
            options["params"].pop("bias")
        with pytest.raises(ValueError, match=r"'(head|bias)' is fully trained: .*Pass params="):
            lora_jax.combine(trees, weights, **options)


def test_task_vectors_of_fully_trained_leaves():
    params, _, a = with_head(1)
    b = with_head(2)[2]
    options = {"params": params, "density": 0.5, "rank": 1}
    combined, _ = lora_jax.combine([a, b], [1, 1], combination_type="ties", **options)
    base = np.float32(params["head"])
    deltas = [np.asarray(tree["head"].value) - base for tree in (a, b)]
    expected = base + task_vectors.merged("ties", deltas, [1, 1], 0.5)
    assert relative_error(combined["head"].value, expected) < 1e-6
    one, _ = lora_jax.combine([a, b], [1, 1], combination_type="dare_linear", key=KEY, **options)
    two, _ = lora_jax.combine([a, b], [1, 1], combination_type="dare_linear", key=KEY, **options)
    assert jnp.array_equal(one["head"].value, two["head"].value)


def test_trees_of_different_targets():
    params = kernels()
    a, b = trained(params, "dora", 1), trained(params, "lora", 2)
    del a["fused"], b["dense"]
    a["conv"], b["nested"] = {}, {}
    combined, _ = lora_jax.combine([a, b], [0.5, 2.0], params=params)
    assert (combined["fused"].kind, combined["fused"].rank) == ("lora", 1)
    assert (combined["dense"].kind, combined["dense"].rank) == ("dora", 2)
    assert combined["nested"] == {}
    one = {"dense": params["dense"]}
    check_sum(one, [a], [0.5], combined)
    check_sum({"conv": params["conv"]}, [b], [2.0], combined)


def test_frozen_norms():
    """After cache_norm the ratio is there already; with a DoRA the sum is a DoRA."""
    params = kernels("dense", "experts")
    a, b = trained(params, "dora", 1), trained(params, "dora, rank 1", 2)
    frozen = [lora_jax.cache_norm(params, tree) for tree in (a, b)]
    for trees, variant in [(frozen, "scaled"), ([frozen[0], b], "dora")]:
        combined, _ = lora_jax.combine(trees, [0.5, -1.0], params=params)
        assert {node.kind for node in combined.values()} == {variant}
        for path, W in params.items():
            expected = 0.5 * change(params, a, path) - change(params, b, path)
            got = combined[path].merge(W) - W
            assert relative_error(combined[path].axes.as_matrix(got), expected) < 1e-5


def test_how_it_trains_on_is_the_first_ones():
    params = kernels("dense")
    a = trained(params, "dora", 1, dropout=0.1)
    b = trained(params, "lora", 2, dropout=0.2)
    first, _ = lora_jax.combine([b, a], [1, 1], params=params)
    detached = lora_jax.DoRA(detach_norm=True)  # of the DoRA
    assert (first["dense"].dropout, first["dense"].variant) == (0.1, detached)
    first, _ = lora_jax.combine([b, b], [1, 1])
    assert first["dense"].dropout == 0.2
    as_lora, _ = lora_jax.compress(a, rank=1, params=params, variant="lora")
    assert (as_lora["dense"].dropout, as_lora["dense"].variant) == (0.1, lora_jax.LoRA())


def test_structures_and_boxes_stay():
    box = nn.Partitioned(jnp.ones((6, 4)), names=(None, "model"))
    params = flax.core.freeze({"a": {"kernel": box}, "b": {"kernel": box}})
    config = LoraConfig([Rule("a/kernel", 2, variant="dora")], trainable=["b/.*"])
    _, adapters = lora_jax.lora_init(KEY, params, config)
    combined, _ = lora_jax.combine([adapters, adapters], [0.5, 0.5], params=params)
    assert isinstance(combined, flax.core.FrozenDict)
    assert isinstance(combined["b"]["kernel"], nn.Partitioned)
    plain, _ = lora_jax.combine([flax.core.unfreeze(adapters)], [1.0], params=params)
    assert jax.tree.structure(plain) == jax.tree.structure(flax.core.unfreeze(adapters))


def test_bfloat16_base_and_files(tmp_path):
    params = kernels("dense", "experts", dtype=jnp.bfloat16)
    trees = [trained(params, kind, i) for i, kind in enumerate(("lora", "dora"))]
    combined, _ = lora_jax.combine(trees, [1.0, -1.0], params=params)
    assert {leaf.dtype for leaf in jax.tree.leaves(combined)} == {jnp.dtype("float32")}
    lora_jax.save(tmp_path / "sum", combined, frozen=params)
    _, loaded = lora_jax.load(tmp_path / "sum", params, verify=True)
    assert jax.tree.structure(loaded) == jax.tree.structure(combined)
    check_sum(params, trees, [1.0, -1.0], loaded)


def test_report_is_a_table():
    params, _, a = with_head(1)
    assert str(lora_jax.combine([a], [1])[1]).splitlines() == [
        "path   rank  relative error",
        "-----  ----  --------------",
        "dense     1           exact",
        "head   full           exact",
        "-----  ----  --------------",
    ]
    wide = {"dense": trained({"dense": params["dense"]}, "rslora", 1)["dense"]}
    report = lora_jax.compress(wide, rank=1)[1]
    assert f"{report['dense'].error:.2g}" in str(report)
    assert list(report) == ["dense"]
    assert {path_of(key) for key in flatten(wide, "")} == set(report)


# --- errors ---

PARAMS = {"dense": kernels("dense")["dense"], "head": jnp.ones(3)}
LORA = trained({"dense": PARAMS["dense"]}, "lora", 1)
DORA = trained({"dense": PARAMS["dense"]}, "dora", 1)
NODE = LORA["dense"]


@pytest.mark.parametrize(
    ("args", "options", "match"),
    [
        (([], []), {}, "the list is empty"),
        (([LORA, LORA], [1]), {}, "There are 2 adapters, but 1 weights"),
        (([LORA], [np.nan]), {}, "weight must be finite, got nan"),
        (
            ([LORA], [1]),
            {"combination_type": "cat"},
            "no combination_type 'cat'; there are linear, magnitude_prune",
        ),
        (([LORA], [1]), {"rank": 1, "explained_variance": 0.5}, "exclude each other"),
        (([LORA], [1]), {"rank": 0}, "rank must be at least 1, got 0"),
        (
            ([LORA], [1]),
            {"explained_variance": 0},
            r"explained_variance must be in \(0, 1\], got 0",
        ),
        (
            ([LORA], [1]),
            {"explained_variance": 1.5},
            r"explained_variance must be in \(0, 1\], got 1.5",
        ),
        (
            ([LORA], [1]),
            {"explained_variance": np.nan},
            r"explained_variance must be in \(0, 1\], got nan",
        ),
        (
            ([LORA], [1]),
            {"combination_type": "ties", "density": 0.0},
            r"density must be in \(0, 1\], got 0",
        ),
        (
            ([LORA], [1]),
            {"combination_type": "ties", "density": 1.1},
            r"density must be in \(0, 1\]",
        ),
        (([LORA], [1]), {"density": 0.5}, "'linear' keeps every entry.*density=0.5 has no use"),
        (([LORA], [1]), {"combination_type": "ties", "rank": 1}, "'ties' needs density="),
        (([LORA], [1]), {"combination_type": "dare_ties", "density": 0.5}, "at random: pass key="),
        (([LORA], [1]), {"key": KEY}, "'linear' has nothing random"),
        (
            ([LORA], [1]),
            {"combination_type": "ties", "density": 0.5},
            "'dense' dense: pass rank=, or explained_variance=",
        ),
        (([LORA, DORA], [1, 1]), {}, r"adapters\[1\] is a DoRA at 'dense'.*pass params="),
        (
            ([LORA], [1]),
            {"params": {"dens": NODE.U}},
            "'dense', which params lacks.*: dens",
        ),
        (([LORA], [1]), {"params": {"dense": jnp.ones((7, 6))}}, "'dense' does not fit"),
        (([lora_jax.stack([LORA, LORA])], [1]), {}, r"adapters\[0\] is a stack of 2 .*'dense'"),
        (([DORA], [1]), {"params": {"dense": PARAMS["dense"] / 0}}, "params has NaN.*'dense'"),
        (([LORA, {"dense": jnp.ones((7, 5))}], [1, 1]), {}, "'dense', .*fully trained.*Merge one"),
        (
            ([LORA, {"dense": NODE.replace(U=NODE.U * jnp.nan)}], [1, 1]),
            {},
            r"adapters\[1\] has NaN or infinite values at 'dense'",
        ),
        (
            ([LORA, {"dense": NODE.replace(axes=KernelAxes((1,), (0,)))}], [1, 1]),
            {},
            r"'dense' is adapted with axes=.*inputs=\(0,\).*and axes=.*inputs=\(1,\)",
        ),
        (([LORA, {"dense": NODE.replace(untied=True)}], [1, 1]), {}, "'dense'.*untied=True"),
        (
            ([LORA, {"dense": NODE.replace(materialize=True)}], [1, 1]),
            {},
            "'dense'.*materialize=Tr",
        ),
        (
            ([{"dense": NODE.replace(rank=2)}], [1]),
            {},
            r"U \(7, 1\) and V \(1, 5\) at 'dense'.*rank 2",
        ),
        (
            ([LORA, {"dense": NODE.replace(U=NODE.U[:6])}], [1, 1]),
            {},
            r"'dense' is \(7, 5\) in adapters\[0\], and \(6, 5\) in adapters\[1\]",
        ),
        (
            (
                [{"head": jnp.ones(3)}, {"head": lora_jax.FullyTrained(jnp.ones(3), "bfloat16")}],
                [1, 0],
            ),
            {},
            r"'head' is \(3, 'float32', 'float32'\).*'bfloat16'\) in adapters\[1\]",
        ),
        (
            ([{"head": jnp.ones(4)}], [1]),
            {"params": PARAMS},
            r"'head' .* \(4,\), but .*\(3,\) there",
        ),
        (([LORA, {"dense": {"a": jnp.ones(2)}}], [1, 1]), {}, "'dense' is a parameter for some"),
    ],
)
def test_errors_of_combine(args, options, match):
    with pytest.raises(ValueError, match=match):
        lora_jax.combine(*args, **options)


@pytest.mark.parametrize(
    ("args", "options", "match"),
    [
        ((LORA, [1]), {}, r"this is one: write \[adapters\]"),
        (([LORA], 1.0), {}, "weights must be a list of numbers"),
        (([LORA], [True]), {}, "weight must be a number, got True"),
        (([LORA], ["a"]), {}, "weight must be a number, got 'a'"),
        (([LORA], [np.ones(2)]), {}, "weight must be a number"),
        (([LORA], [1]), {"rank": 1.0}, "rank must be an int, got 1.0"),
        (
            ([LORA], [1]),
            {"explained_variance": "all"},
            "explained_variance must be a number, got 'all'",
        ),
        (([[LORA]], [1]), {}, r"adapters\[0\] must be a nested dict"),
        (([LORA], [1]), {"params": LORA}, "base has adapters in it"),
        (([LORA], [1]), {"params": {"dense": "W"}}, "params has 'W' at 'dense'"),
        (([jax.eval_shape(lambda: LORA)], [1]), {}, r"adapters\[0\] has Adapter.* at 'dense'"),
        (([{"dense": "W"}], [1]), {}, r"adapters\[0\] has 'W' at 'dense', which is neither"),
    ],
)
def test_types(args, options, match):
    with pytest.raises(TypeError, match=match):
        lora_jax.combine(*args, **options)


def test_errors_of_compress():
    for options in ({}, {"rank": 1, "explained_variance": 0.5}):
        with pytest.raises(ValueError, match="either rank= or explained_variance="):
            lora_jax.compress(LORA, **options)
    with pytest.raises(ValueError, match="must be 'lora' or left out, got 'dora'"):
        lora_jax.compress(LORA, rank=1, variant="dora")
    with pytest.raises(ValueError, match=r"is a DoRA at 'dense'.*pass params="):
        lora_jax.compress(DORA, rank=1)


def test_numpy_trees():
    tree = jax.tree.map(np.asarray, DORA)
    combined, _ = lora_jax.combine([tree], [2.0], params=jax.tree.map(np.asarray, PARAMS))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(combined))
    assert set(flatten_dict(combined)) == {("dense",)}
