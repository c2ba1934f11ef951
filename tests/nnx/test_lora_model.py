"""``lora_model``: adapters as variables in a model object, trained by the idiom of NNX."""

import copy
import dataclasses
import warnings

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from helpers import random_like, relative_error

import lora_jax
from lora_jax import AdapterParam, LoraConfig, Rule


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(8, 12, rngs=rngs), nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(x)
        return x + self.down(nnx.gelu(self.up(x)))


class Model(nnx.Module):
    """Two layers in a scan, statistics, dropout, and a head."""

    def __init__(self, rngs, dtype=jnp.float32):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        stacked = nnx.vmap(Block, in_axes=0, out_axes=0)
        self.blocks = nnx.split_rngs(splits=2)(stacked)(rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.head = nnx.Linear(8, 3, dtype=dtype, param_dtype=dtype, rngs=rngs)

    def __call__(self, ids):
        run = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.head(self.dropout(self.norm(run(self.embed(ids), self.blocks))))


IDS = jnp.arange(6).reshape(2, 3)


def made(variant="lora", dtype=jnp.float32, **rule):
    model = Model(nnx.Rngs(0), dtype)
    graphdef, state = nnx.split(model)
    config = LoraConfig([Rule("all-linear", rank=2, variant=variant, **rule)], ["head/.*"])
    frozen, adapters = lora_jax.lora_init_model(jax.random.key(1), graphdef, state, config, IDS)
    leaves, structure = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return graphdef, frozen, jax.tree.unflatten(structure, moved)


def loss_of(model):
    return jnp.mean(model(IDS).astype(jnp.float32) ** 2)


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        pytest.param("lora", jnp.float32, marks=pytest.mark.slow),
        ("dora", jnp.float32),
        ("dora", jnp.bfloat16),
    ],
    ids=["lora", "dora", "dora, bfloat16"],
)
def test_it_computes_and_trains_like_lora_apply(variant, dtype):
    graphdef, frozen, adapters = made(variant, dtype)
    before = jax.tree.map(jnp.copy, frozen)
    model = lora_jax.lora_model(graphdef, frozen, adapters)
    wrt = nnx.DiffState(0, AdapterParam)
    loss, grads = nnx.value_and_grad(loss_of, argnums=wrt)(model)

    def functional(adapters):
        y = lora_jax.lora_apply(graphdef, frozen, adapters, IDS)
        return jnp.mean(y.astype(jnp.float32) ** 2)

    expected, by_tree = jax.value_and_grad(functional)(adapters)
    chex.assert_trees_all_close(loss, expected, rtol=1e-5)
    # The gradients in the places of their variables are those of the tree.
    ours = nnx.merge(*nnx.split(model))
    nnx.update(ours, grads)
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
    chex.assert_trees_all_close(lora_jax.lora_state(ours), by_tree, atol=tolerance)

    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=AdapterParam)

    @nnx.jit
    @chex.assert_max_traces(1)
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(loss_of, argnums=wrt)(model)
        optimizer.update(model, grads)
        return loss

    chex.clear_trace_counter()
    losses = [step(model, optimizer) for _ in range(3)]
    assert losses[2] < losses[0]
    base = nnx.state(model, nnx.Not(AdapterParam))
    same, after = (nnx.filter_state(tree, nnx.Param) for tree in (before, base))
    chex.assert_trees_all_equal(same, after)
    chex.assert_trees_all_equal(before, frozen)  # the caller's state, statistics as well
    assert jax.tree.structure(base) == jax.tree.structure(frozen)

    # Serving another use case compiles nothing: the same step, with other numbers.
    lora_jax.lora_update(model, adapters)
    chex.assert_trees_all_equal(lora_jax.lora_state(model), adapters)
    step(model, optimizer)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_the_tree_comes_out_as_it_went_in(variant):
    graphdef, frozen, adapters = made(variant, jnp.bfloat16)
    model = lora_jax.lora_model(graphdef, frozen, adapters)
    back = lora_jax.lora_state(copy.deepcopy(model))
    assert jax.tree.structure(back) == jax.tree.structure(adapters)
    chex.assert_trees_all_equal(back, adapters)
    model.norm.use_running_average = True
    merged = nnx.merge(graphdef, lora_jax.lora_merge(frozen, back))
    merged.norm.use_running_average = True
    chex.assert_trees_all_close(model(IDS), merged(IDS), atol=1e-2)


def test_each_variable_is_a_lora_param_and_no_other_is():
    graphdef, frozen, adapters = made("dora")
    model = lora_jax.lora_model(graphdef, frozen, adapters)
    trained = dict(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)))
    names = {"/".join(map(str, path)) for path in trained}
    assert {
        "head/kernel",
        "head/bias",
        "blocks/up/kernel_lora_U",
        "blocks/up/kernel_lora_m",
    } < names
    count = len(jax.tree.leaves(adapters))
    assert len(names) == count
    assert nnx.split(model)[0] == nnx.split(lora_jax.lora_model(graphdef, frozen, adapters))[0]


def test_dropout_follows_train_and_eval():
    graphdef, state = nnx.split(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    config, x = LoraConfig([Rule("kernel", rank=4, dropout=0.5)]), jnp.ones((3, 8))
    frozen, adapters = lora_jax.lora_init_model(jax.random.key(1), graphdef, state, config, x)
    adapters = jax.tree.map(lambda x: x + 0.3, adapters)
    with pytest.raises(ValueError, match=r"has dropout: pass dropout_rngs=nnx\.Rngs\(dropout=0\)"):
        lora_jax.lora_model(graphdef, frozen, adapters)
    model = lora_jax.lora_model(graphdef, frozen, adapters, dropout_rngs=nnx.Rngs(dropout=0))
    assert not jnp.array_equal(model(x), model(x))
    model.eval()
    plain = lora_jax.lora_apply(graphdef, frozen, adapters, x)
    chex.assert_trees_all_close(model(x), plain, rtol=1e-6)
    model.train()
    assert not jnp.array_equal(model(x), plain)


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.unused = nnx.Embed(11, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, ids):
        return self.embed(ids) @ self.embed.embedding[...].T


def test_what_lora_apply_refuses_is_refused():
    graphdef, state = nnx.split(Tied(nnx.Rngs(0)))
    for pattern, match in (
        ("embed/.*", "also reads 'embed/embedding'"),
        ("unused/kernel", "not us"),
    ):
        config = LoraConfig([Rule(pattern, rank=2)])
        frozen, adapters = lora_jax.lora_init(jax.random.key(0), state, config)
        with pytest.raises(ValueError, match="pass a sample input"):
            lora_jax.lora_model(graphdef, frozen, adapters)
        with pytest.raises(ValueError, match=match):
            lora_jax.lora_model(graphdef, frozen, adapters, IDS)


def test_other_mistakes_are_named():
    graphdef, frozen, adapters = made()
    model = lora_jax.lora_model(graphdef, frozen, adapters)
    with pytest.raises(TypeError, match="lora_state is for a model of lora_model"):
        lora_jax.lora_state(nnx.merge(graphdef, lora_jax.lora_merge(frozen, adapters)))
    with pytest.raises(ValueError, match="another rank, scale, variant or dtype"):
        lora_jax.lora_update(model, made("dora")[2])
    with pytest.raises(ValueError, match="Only the model has an adapter for 'head/bias'"):
        lora_jax.lora_update(model, {"blocks": adapters["blocks"]})
    with pytest.raises(ValueError, match="is a stack of 2"):
        lora_jax.lora_update(model, lora_jax.stack([adapters, adapters]))
    with pytest.raises(TypeError, match="pass dropout_key=key"):
        lora_jax.lora_apply(graphdef, frozen, adapters, IDS, rngs={"dropout": jax.random.key(0)})
    with pytest.raises(ValueError, match="is a stack of 2"):
        lora_jax.lora_model(graphdef, frozen, lora_jax.stack([adapters, adapters]))
    materialized = made(materialize=True)
    with pytest.raises(ValueError, match="has materialize=True"):
        lora_jax.lora_model(*materialized)
    with pytest.raises(TypeError, match="has its adapters in it"):
        lora_jax.lora_apply(model, nnx.state(model), adapters, IDS)


class TwoWays(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.layer(x) @ self.layer.kernel[...].T

    def once(self, x):
        return self.layer(x)


@pytest.mark.parametrize("method", ["once", TwoWays.once, lambda model, x: model.layer(x)])
def test_what_one_call_reads_says_nothing_of_another(method):
    graphdef, state = nnx.split(TwoWays(nnx.Rngs(0)))
    x, config = jnp.ones((2, 8)), LoraConfig([Rule("layer/kernel", rank=2)])
    frozen, adapters = lora_jax.lora_init_model(
        jax.random.key(1), graphdef, state, config, x, method=method
    )
    lora_jax.lora_apply(graphdef, frozen, adapters, x, method=method)
    for both_ways in (None, lambda model, x: model(x)):
        with pytest.raises(ValueError, match="also reads 'layer/kernel' outside of its layer"):
            lora_jax.lora_apply(graphdef, frozen, adapters, x, method=both_ways)
    with pytest.raises(ValueError, match="pass a sample input"):
        lora_jax.lora_model(graphdef, frozen, adapters)
    with pytest.raises(ValueError, match="also reads 'layer/kernel' outside of its layer"):
        lora_jax.lora_model(graphdef, frozen, adapters, x)


def test_a_name_with_a_slash_is_one_part_of_a_path():
    class Named(nnx.Module):
        def __init__(self, rngs):
            setattr(self, "a/b", nnx.Linear(8, 8, rngs=rngs))
            setattr(self, "c/d", nnx.BatchNorm(8, rngs=rngs))

        def __call__(self, x):
            return getattr(self, "c/d")(getattr(self, "a/b")(x))

    graphdef, state = nnx.split(Named(nnx.Rngs(0)))
    x, config = jnp.arange(16.0).reshape(2, 8), LoraConfig([Rule("a/b/kernel", rank=2)])
    frozen, adapters = lora_jax.lora_init_model(jax.random.key(1), graphdef, state, config, x)
    y, after = lora_jax.lora_apply(graphdef, frozen, adapters, x, mutable=True)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    model = lora_jax.lora_model(graphdef, frozen, adapters)
    chex.assert_trees_all_close(model(x), y, rtol=1e-5)
    chex.assert_trees_all_equal(lora_jax.lora_state(model), adapters)


# --- what readers found ---


class Shares(nnx.Module):
    """Two layers with one kernel."""

    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.b.kernel = self.a.kernel

    def __call__(self, x):
        return self.b(nnx.tanh(self.a(x)))


class Holder(nnx.Module):
    """Reads the kernel of another layer."""

    def __init__(self, kernel):
        self.w = kernel

    def __call__(self, x):
        return x @ self.w[...].T


class Holds(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(8, 8, rngs=rngs)
        self.b = Holder(self.a.kernel)

    def __call__(self, x):
        return self.b(self.a(x))


class Two(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.tanh(self.a(x)))


SHARED = pytest.mark.skipif(
    not hasattr(nnx, "List"),
    reason="this Flax has a shared variable by another path, and lora_model refuses it",
)
X8 = jax.random.normal(jax.random.key(5), (4, 8))


def adapted(make, **rule):
    graphdef, state = nnx.split(make(nnx.Rngs(0)))
    config = LoraConfig([Rule(".*kernel", rank=2, **rule)], rule.pop("trainable", []))
    frozen, adapters = lora_jax.lora_init_model(jax.random.key(1), graphdef, state, config, X8)
    return graphdef, frozen, random_like(adapters)


@SHARED
def test_a_kernel_of_two_layers_has_one_adapter():
    graphdef, frozen, adapters = adapted(Shares)
    model = lora_jax.lora_model(graphdef, frozen, adapters)
    variables = nnx.state(model, AdapterParam)
    assert len(jax.tree.leaves(variables)) == 2
    other = random_like(adapters, seed=1)
    lora_jax.lora_update(model, other)
    merged = nnx.merge(graphdef, lora_jax.lora_merge(frozen, other))
    assert relative_error(model(X8), merged(X8)) < 1e-5


@SHARED
def test_untied_beside_a_reader_that_is_no_layer():
    graphdef, frozen, adapters = adapted(Holds, tied="untie")
    model = lora_jax.lora_model(graphdef, frozen, adapters)
    expected = lora_jax.lora_apply(graphdef, frozen, adapters, X8)
    assert relative_error(model(X8), expected) < 1e-6


class Scale(nnx.Param):
    """What the model selects by its type."""

    def get_value(self, **kwargs):
        return 2.0 * super().get_value(**kwargs)


class ByType(nnx.Module):
    def __init__(self, rngs):
        self.layer, self.scale = nnx.Linear(8, 8, rngs=rngs), Scale(jnp.ones(8))

    def __call__(self, x):
        for leaf in jax.tree.leaves(nnx.state(self, Scale)):
            x = x * leaf
        return self.layer(x * self.scale)


@pytest.mark.skipif(not hasattr(nnx.Param, "get_value"), reason="this Flax has hooks for it")
def test_a_trained_leaf_is_still_of_its_own_type():
    graphdef, state = nnx.split(ByType(nnx.Rngs(0)))
    config = LoraConfig([Rule(".*kernel", rank=2)], ["scale"])
    frozen, adapters = lora_jax.lora_init_model(jax.random.key(1), graphdef, state, config, X8)
    adapters = random_like(adapters)
    model = lora_jax.lora_model(graphdef, frozen, adapters)
    assert isinstance(model.scale, AdapterParam)
    assert isinstance(model.scale, Scale)
    merged = nnx.merge(graphdef, lora_jax.lora_merge(frozen, adapters))
    assert relative_error(model(X8), merged(X8)) < 1e-5
    back = lora_jax.lora_state(model)
    chex.assert_trees_all_equal(back, adapters)
    assert jax.tree.structure(back) == jax.tree.structure(adapters)


def test_hooks_are_not_called_again():
    def doubled(variable, value):
        return 2 * value

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are deprecated
        layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        layer.bias = nnx.Param(jnp.ones(8), on_create_value=doubled)
        graphdef, state = nnx.split(layer)
        config = LoraConfig([Rule("kernel", rank=2)], ["bias"])
        frozen, adapters = lora_jax.lora_init_model(jax.random.key(1), graphdef, state, config, X8)
        model = lora_jax.lora_model(graphdef, frozen, adapters)
        chex.assert_trees_all_equal(lora_jax.lora_state(model), adapters)


@pytest.mark.skipif(not hasattr(nnx, "view"), reason="this Flax has no views")
def test_dropout_of_a_view():
    graphdef, frozen, adapters = adapted(Two, dropout=0.5)
    model = lora_jax.lora_model(graphdef, frozen, adapters, dropout_rngs=nnx.Rngs(0))
    expected = lora_jax.lora_apply(graphdef, frozen, adapters, X8)
    assert relative_error(model(X8), expected) > 1e-2
    assert relative_error(nnx.view(model, deterministic=True)(X8), expected) < 1e-6


@pytest.mark.parametrize("rngs", [None, jax.random.key(0), nnx.Rngs(params=0)])
def test_dropout_needs_a_stream(rngs):
    graphdef, frozen, adapters = adapted(Two, dropout=0.5)
    with pytest.raises(ValueError, match=r"dropout_rngs=nnx\.Rngs\(dropout=0\)"):
        lora_jax.lora_model(graphdef, frozen, adapters, dropout_rngs=rngs)


def test_a_model_with_its_adapters_is_no_base(tmp_path):
    graphdef, frozen, adapters = adapted(Two)
    model = lora_jax.lora_model(graphdef, frozen, adapters)
    state, trained = nnx.state(model), lora_jax.lora_state(model)
    for use in (
        lambda: lora_jax.lora_merge(state, trained),
        lambda: lora_jax.lora_init(jax.random.key(0), state, LoraConfig([Rule(".*kernel", 2)])),
        lambda: lora_jax.save(tmp_path / "a", trained, frozen=state),
        lambda: lora_jax.export(tmp_path / "a.safetensors", state, trained),
        lambda: lora_jax.summary(state, trained),
    ):
        with pytest.raises(TypeError, match=r"of a model of lora_model.*pass the frozen state"):
            use()
    with pytest.raises(TypeError, match=r"got the model itself.*lora_jax\.lora_state\(model\)"):
        lora_jax.save(tmp_path / "a", model)


def test_goes_on_bit_for_bit():
    """With what a checkpoint has: adapters, optimizer, keys and statistics, and never the base."""
    graphdef, frozen, adapters = made("dora")

    def started():
        model = lora_jax.lora_model(graphdef, frozen, adapters)
        model.train()
        return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=AdapterParam)

    @nnx.jit
    def step(model, optimizer):
        wrt = nnx.DiffState(0, AdapterParam)
        loss, grads = nnx.value_and_grad(loss_of, argnums=wrt)(model)
        optimizer.update(model, grads)
        return loss

    changes = (nnx.RngState, nnx.BatchStat)
    model, optimizer = started()
    for _ in range(2):
        step(model, optimizer)
    kept = lora_jax.lora_state(model), nnx.state(optimizer), nnx.state(model, changes)
    kept = jax.tree.map(lambda x: x, kept)
    expected = [float(step(model, optimizer)) for _ in range(2)]
    again, optimizer = started()
    lora_jax.lora_update(again, kept[0])
    nnx.update(optimizer, kept[1])
    nnx.update(again, kept[2])
    assert [float(step(again, optimizer)) for _ in range(2)] == expected
    chex.assert_trees_all_equal(lora_jax.lora_state(again), lora_jax.lora_state(model))


class WithList(nnx.Module):
    """Has a static attribute without a hash, so that its graphdef has none."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(8, 8, rngs=rngs)
        self.config = Config([1, 2])

    def __call__(self, x):
        return self.layer(x)


@dataclasses.dataclass
class Config:
    kinds: list[int]


def test_a_graphdef_without_a_hash():
    graphdef, frozen, adapters = adapted(WithList)
    with pytest.raises(TypeError, match="unhashable"):
        hash(graphdef)
    model = lora_jax.lora_model(graphdef, frozen, adapters)  # made for a call of it
    expected = lora_jax.lora_apply(graphdef, frozen, adapters, X8)
    assert relative_error(model(X8), expected) < 1e-6
