"""What comes with a call of an NNX model: variables, keys, traces, and what is refused."""

import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import nnx_zoo as zoo
import pytest
from flax import nnx
from helpers import random_like, random_variables, relative_error

import lora_jax
from lora_jax import LoraConfig, Rule
from lora_jax.core._boxes import unbox
from lora_jax.layers import _handlers
from lora_jax.trees._paths import flatten

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, zoo.WIDTH))


def split(make, *args, **rule):
    """A graphdef, a frozen state and adapters with noise on them."""
    graphdef, state = nnx.split(make(nnx.Rngs(0)))
    config = LoraConfig([Rule(zoo.KERNELS, **{"rank": 2, **rule})])
    frozen, adapters = lora_jax.lora_init_model(KEY, graphdef, state, config, *args)
    return graphdef, frozen, random_like(adapters)


def merged(graphdef, frozen, adapters):
    return nnx.merge(graphdef, jax.tree.map(lambda x: x, lora_jax.lora_merge(frozen, adapters)))


def same(a, b):
    flat, other = (flatten(state, "state") for state in (a, b))
    return flat.keys() == other.keys() and all(
        relative_error(unbox(flat[k]), unbox(other[k])) < 1e-5
        for k in flat
        if not isinstance(flat[k], nnx.RngKey)
    )


def test_statistics_counts_and_filters():
    graphdef, frozen, adapters = split(zoo.Normed, X)
    model = merged(graphdef, frozen, adapters)
    expected = model(X)
    y, state = lora_jax.lora_apply(graphdef, frozen, adapters, X, mutable=True)
    assert relative_error(y, expected) < 1e-5
    after = nnx.state(model)
    for key, leaf in flatten(state, "state").items():
        if key[-1] == "kernel":
            assert unbox(leaf) is unbox(flatten(frozen, "state")[key])
    others = (nnx.BatchStat, nnx.RngState)
    assert same(nnx.filter_state(state, others), nnx.filter_state(after, others))
    assert not same(nnx.filter_state(state, others), nnx.filter_state(frozen, others))
    _, stats = lora_jax.lora_apply(graphdef, frozen, adapters, X, mutable=nnx.BatchStat)
    assert same(stats, nnx.state(model, nnx.BatchStat))
    again = lora_jax.lora_apply(graphdef, state, adapters, X)  # another dropout, by the counts
    assert relative_error(again, y) > 1e-2


def test_decoding_with_a_cache():
    def make(rngs):
        return zoo.Attention(rngs, decode=True)

    x = jax.random.normal(KEY, (2, 4, zoo.WIDTH))
    graphdef, frozen, adapters = split(make, x[:, :1], variant="dora")
    stack = lora_jax.stack([random_like(adapters, 1), adapters], frozen)

    @jax.jit
    def step(state, x):
        return lora_jax.lora_apply(graphdef, state, adapters, x, mutable=True)

    @jax.jit
    def mixed_step(state, x):
        options = {"mutable": True, "variable_axes": {nnx.Cache: 0}}
        ids = jnp.array([0, 1])
        return lora_jax.lora_apply(graphdef, state, stack, x, adapter_ids=ids, **options)

    @jax.jit
    def merged_step(state, x):
        model = nnx.merge(graphdef, state)
        return model(x), nnx.state(model)

    state, mixed, expected = frozen, frozen, lora_jax.lora_merge(frozen, adapters)
    for i in range(3):
        xi = x[:, i : i + 1]
        (y, state), (rows, mixed), (y_, expected) = (
            step(state, xi),
            mixed_step(mixed, xi),
            merged_step(expected, xi),
        )
        assert relative_error(y, y_) < 1e-5
        assert relative_error(rows[1], y[1]) < 1e-5
        assert relative_error(rows[0], y[0]) > 1e-2
    assert same(nnx.filter_state(state, nnx.Cache), nnx.filter_state(expected, nnx.Cache))


@pytest.mark.parametrize("raises", [False, True])
def test_the_objects_of_the_user_are_as_they_were(raises):
    model = zoo.Normed(nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    frozen, adapters = lora_jax.lora_init(KEY, state, LoraConfig([Rule(".*kernel", 2)]))

    def objects(state):
        return [
            (id(leaf), type(leaf), id(unbox(leaf)))
            for _, leaf in sorted(flatten(state, "state").items())
        ]

    def call(model, x):
        y = model(x)
        if raises:
            raise KeyError("something of the user's")
        return y

    live = {id(v): unbox(v) for _, v in nnx.iter_graph(model) if isinstance(v, nnx.Variable)}
    before, hash_before = [objects(s) for s in (state, frozen)], hash(graphdef)
    names = {name for _, node in nnx.iter_graph(model) for name in getattr(node, "__dict__", ())}
    classes = [type(node) for _, node in nnx.iter_graph(model)]
    for first in (graphdef, model):
        for run in (
            lambda first=first: lora_jax.lora_apply(first, frozen, adapters, X, method=call),
            lambda first=first: lora_jax.kernel_axes(first, state, X, method=call),
        ):
            if raises:
                with pytest.raises(KeyError, match="of the user's"):
                    run()
            else:
                run()
    assert [objects(s) for s in (state, frozen)] == before
    assert hash(graphdef) == hash_before
    after = {id(v): unbox(v) for _, v in nnx.iter_graph(model) if isinstance(v, nnx.Variable)}
    assert after.keys() == live.keys()
    assert all(after[key] is live[key] for key in live)
    assert [type(node) for _, node in nnx.iter_graph(model)] == classes
    assert names == {n for _, node in nnx.iter_graph(model) for n in getattr(node, "__dict__", ())}


def test_jit_with_the_graphdef_as_an_argument_or_static():
    graphdef, frozen, adapters = split(functools.partial(zoo.Scan, axis=0), X)
    expected = lora_jax.lora_apply(graphdef, frozen, adapters, X)
    traces = []

    def apply(graphdef, frozen, adapters, x):
        traces.append(0)
        return lora_jax.lora_apply(graphdef, frozen, adapters, x)

    for jitted in (jax.jit(apply), jax.jit(apply, static_argnums=0), nnx.jit(apply)):
        traces.clear()
        for scale in (1, 2):
            y = jitted(graphdef, frozen, adapters, scale * X)
            assert scale > 1 or relative_error(y, expected) < 1e-6
        assert len(traces) == 1


@pytest.mark.parametrize("axis", [None, 0])
def test_dropout_of_adapters(axis):
    """One unit input: either its row of U V is there, scaled by 1 / (1 - rate), or it is not."""

    def make(rngs):
        return nnx.Linear(zoo.WIDTH, 5, rngs=rngs) if axis is None else zoo.Vmap(rngs, axis)

    x = jnp.zeros((4000, zoo.WIDTH)).at[:, 2].set(1.0)
    x = x if axis is None else jnp.stack([x] * 3)
    graphdef, frozen, adapters = split(make, x, dropout=0.25)
    apply = functools.partial(lora_jax.lora_apply, graphdef, frozen, adapters, x)
    off = apply()
    assert relative_error(off, merged(graphdef, frozen, adapters)(x)) < 1e-5
    assert jnp.array_equal(apply(dropout_key=KEY, adapter_dropout=False), off)
    y = apply(dropout_key=KEY)
    base = nnx.merge(graphdef, frozen)(x)
    kept = jnp.isclose(y, base + (off - base) / 0.75, atol=1e-5).all(-1)
    assert (kept != jnp.isclose(y, base, atol=1e-5).all(-1)).all()
    assert abs(float(kept.mean()) - 0.75) < 0.03
    assert not jnp.array_equal(apply(dropout_key=jax.random.key(1)), y)
    if axis is not None:
        assert not jnp.array_equal(kept[0], kept[1])
    with pytest.raises(ValueError, match="dropout_key=key"):
        apply(adapter_dropout=True)


def test_tied_embedding():
    """By hand: it must be said what to do. An adapter of the lookup alone leaves the logits."""
    tokens = jnp.arange(6).reshape(2, 3)
    with pytest.raises(ValueError, match=r"also reads outside.*tied='materialize'.*tied='untie'"):
        split(zoo.TiedByHand, tokens)
    graphdef, state = nnx.split(zoo.TiedByHand(nnx.Rngs(0)))
    frozen, adapters = lora_jax.lora_init(KEY, state, LoraConfig([Rule("embed/embedding", 2)]))
    with pytest.raises(ValueError, match="also reads 'embed/embedding'"):
        lora_jax.lora_apply(graphdef, frozen, adapters, tokens)

    graphdef, frozen, adapters = split(zoo.TiedByHand, tokens, tied="untie")
    node = adapters["embed"]["embedding"]
    W = frozen["embed"]["embedding"][...]
    own = merged(graphdef, frozen, {"dense": adapters["dense"]})
    changed = (W + node.U @ node.V * (node.alpha / node.rank if node.alpha else 1))[tokens]
    expected = nnx.tanh(own.dense(changed)) @ W.T
    assert relative_error(lora_jax.lora_apply(graphdef, frozen, adapters, tokens), expected) < 1e-5


@pytest.mark.skipif(not hasattr(nnx, "WeightNorm"), reason="newer versions of Flax have it")
@pytest.mark.parametrize("transform", [lambda f: f, nnx.jit, nnx.remat])
def test_a_kernel_that_the_model_changes_is_refused(transform):
    def make(rngs):
        dense = nnx.Linear(zoo.WIDTH, 5, rngs=rngs)
        return zoo.Behind(nnx.WeightNorm(dense, rngs=rngs), transform)

    graphdef, state = nnx.split(make(nnx.Rngs(0)))
    config = LoraConfig([Rule(".*kernel", 2)])
    with pytest.raises(ValueError, match=r"WeightNorm"):
        lora_jax.lora_init_model(KEY, graphdef, state, config, X)
    frozen, adapters = lora_jax.lora_init(KEY, state, config)
    with pytest.raises(ValueError, match=r"'inner/layer_instance/kernel'.*nnx.WeightNorm.*materi"):
        lora_jax.lora_apply(graphdef, frozen, adapters, X)
    config = LoraConfig([Rule(".*kernel", 2, materialize=True)])
    frozen, adapters = lora_jax.lora_init(KEY, state, config)
    y = lora_jax.lora_apply(graphdef, frozen, random_like(adapters), X)
    assert relative_error(y, merged(graphdef, frozen, random_like(adapters))(X)) < 1e-5


def test_a_model_that_computes_with_all_variables_of_a_layer_is_refused():
    """It would compute with adapters too; also where they are said to be for one use of several."""

    class Penalty(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(zoo.WIDTH, 5, rngs=rngs)

        def __call__(self, x):
            leaves = jax.tree.leaves(nnx.state(self, nnx.Param))
            return self.dense(x), sum(jnp.sum(leaf**2) for leaf in leaves)

    with pytest.raises(ValueError, match="all variables that it finds in its layer"):
        split(Penalty, X, tied="untie")

    class Spectral(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(zoo.WIDTH, 5, rngs=rngs)

        def __call__(self, x):
            norms = [v.ndim for v in jax.tree.leaves(nnx.state(self), is_leaf=is_variable)]
            return self.dense(x) * len(norms)

    def is_variable(leaf):
        return isinstance(leaf, nnx.Variable)

    with pytest.raises(ValueError, match=r"all variables that it finds in a layer.*materialize"):
        split(Spectral, X)


class CastsAndCallsAgain(nnx.Module):
    """The parameters of a block in another dtype, sliced, behind transforms and without."""

    def __init__(self, rngs):
        self.block, self.blocks = zoo.Mlp(rngs), zoo.Scan(rngs, 1)

    def __call__(self, x):
        graphdef, state = nnx.split(self.block)
        state = jax.tree.map(lambda leaf: leaf.astype(jnp.float16).astype(leaf.dtype), state)
        y = nnx.jit(lambda block, x: block(x))(nnx.merge(graphdef, state), x)
        y = nnx.remat(lambda block, x: block(x))(self.block, y) + self.block(x)
        return self.blocks(self.blocks(y))


def test_a_kernel_that_the_model_passes_on_is_adapted():
    graphdef, frozen, adapters = split(CastsAndCallsAgain, X, variant="dora")
    y = lora_jax.lora_apply(graphdef, frozen, adapters, X)
    assert relative_error(y, merged(graphdef, frozen, adapters)(X)) < 1e-3


def test_array_without_a_variable():
    """Such as a table of frequencies: it is there as it is."""

    class Table(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(zoo.WIDTH, 5, rngs=rngs)
            table = jnp.arange(5.0)
            self.table = nnx.data(table) if hasattr(nnx, "data") else table

        def __call__(self, x):
            return self.dense(x) + self.table

    graphdef, frozen, adapters = split(Table, X)
    y = lora_jax.lora_apply(graphdef, frozen, adapters, X)
    assert relative_error(y, merged(graphdef, frozen, adapters)(X)) < 1e-5


def test_registered_layer(monkeypatch):
    monkeypatch.setattr(_handlers, "_registered", _handlers._registered)
    with pytest.raises(ValueError, match=r"'w' .*not a kernel of a layer that is known"):
        split(zoo.Experts, X)
    lora_jax.register(zoo.Experts, "w")(zoo.experts)
    graphdef, frozen, adapters = split(zoo.Experts, X)
    y = lora_jax.lora_apply(graphdef, frozen, adapters, X)
    assert relative_error(y, merged(graphdef, frozen, adapters)(X)) < 1e-5


class Linen(nn.Module):
    """What :class:`Both` is."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(zoo.WIDTH, name="dense")(x)
        y = nn.MultiHeadDotProductAttention(2, qkv_features=8, name="attention")(x)
        return nn.Conv(5, (3,), name="conv")(x + y)


class Both(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(zoo.WIDTH, zoo.WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, zoo.WIDTH, 8, decode=False, rngs=rngs)
        self.conv = nnx.Conv(zoo.WIDTH, 5, (3,), rngs=rngs)

    def __call__(self, x):
        x = self.dense(x)
        return self.conv(x + self.attention(x))


@pytest.mark.parametrize("variant", [pytest.param("lora", marks=pytest.mark.slow), "dora"])
def test_linen_and_nnx_are_the_same(variant):
    x = jax.random.normal(KEY, (2, 4, zoo.WIDTH))
    params = random_variables(Linen(), x)["params"]
    graphdef, state = nnx.split(Both(nnx.Rngs(0)))
    flat = flatten(params, "params")
    values = {key: leaf.replace(flat[key]) for key, leaf in nnx.to_flat_state(state)}
    state = nnx.from_flat_state(list(values.items()))
    config = LoraConfig([Rule(".*kernel", 2, variant=variant)])
    linen = lora_jax.lora_init_model(KEY, Linen(), {"params": params}, config, x)
    frozen, adapters = lora_jax.lora_init_model(KEY, graphdef, state, config, x)
    assert jax.tree.structure(adapters) == jax.tree.structure(linen[1])
    assert all(map(jnp.array_equal, jax.tree.leaves(adapters), jax.tree.leaves(linen[1])))
    trained = random_like(adapters)

    @functools.partial(jax.jit, static_argnums=1)
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(adapters, model, frozen):
        y = lora_jax.lora_apply(model, frozen, adapters, x)
        return jnp.sum(y**2), y

    (_, y), grads = loss(trained, graphdef, frozen)
    (_, y_), grads_ = loss(trained, Linen(), {"params": linen[0]})
    assert relative_error(y, y_) < 1e-6
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_), strict=True):
        assert relative_error(a, b) < 1e-5


def test_wrong_front_door():
    model = nnx.Linear(zoo.WIDTH, 5, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    config = LoraConfig([Rule("kernel", 2)])
    frozen, adapters = lora_jax.lora_init(KEY, state, config)
    of_state = "pass its nnx.State"
    for message, function in [
        (of_state, lambda: lora_jax.lora_apply(graphdef, {"params": {}}, adapters, X)),
        (of_state, lambda: lora_jax.lora_apply(model, nnx.to_pure_dict(state), adapters, X)),
        (of_state, lambda: lora_jax.kernel_axes(graphdef, X)),
        (of_state, lambda: lora_jax.kernel_axes(model, model, X)),
        (of_state, lambda: lora_jax.lora_init_model(KEY, model, {}, config, X)),
        ("pass the model's graphdef", lambda: lora_jax.lora_apply(nn.Dense(5), frozen, adapters)),
        ("pass its state", lambda: lora_jax.lora_init(KEY, model, config)),
        ("pass the model's graphdef", lambda: lora_jax.lora_apply(state, frozen, adapters, X)),
        (
            "the frozen state that lora_init returned",
            lambda: lora_jax.lora_apply(graphdef, adapters, frozen, X),
        ),
        ("nnx.State", lambda: lora_jax.lora_merge(model, adapters)),
        ("nnx.State", lambda: lora_jax.lora_init(KEY, graphdef, config)),
        ("nnx.State", lambda: lora_jax.lora_merge(graphdef, adapters)),
        ("nnx.State", lambda: lora_jax.lora_apply(graphdef, {"params": frozen}, adapters, X)),
    ]:
        with pytest.raises((TypeError, ValueError)) as error:
            function()
        assert message in str(error.value)


class ReadsIfAsked(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(zoo.WIDTH, zoo.WIDTH, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x, readout=False):
        y = self.layer(x)
        readout = readout or self.drop.deterministic
        return y @ self.layer.kernel[...].T if readout else y


def test_another_flag_or_mode_is_another_call():
    """What was found for a call of the model says nothing of one with another way through it."""
    model = ReadsIfAsked(nnx.Rngs(0))
    graphdef, frozen, adapters = split(lambda rngs: model, X)
    lora_jax.lora_apply(graphdef, frozen, adapters, X)
    lora_jax.lora_model(graphdef, frozen, adapters)
    with pytest.raises(ValueError, match="also reads 'layer/kernel' outside of its layer"):
        lora_jax.lora_apply(graphdef, frozen, adapters, X, readout=True)
    model.eval()
    in_eval = nnx.graphdef(model)
    with pytest.raises(ValueError, match="also reads 'layer/kernel' outside of its layer"):
        lora_jax.lora_apply(in_eval, frozen, adapters, X)
    with pytest.raises(ValueError, match="not known: pass a sample input"):
        lora_jax.lora_model(in_eval, frozen, adapters)


def test_statistics_of_one_row_are_refused():
    graphdef, frozen, adapters = split(zoo.Normed, X)
    stack = lora_jax.stack([adapters, adapters], frozen)
    with pytest.raises(ValueError, match=r"changes the statistics 'norm/mean'.*model\.eval\(\)"):
        lora_jax.lora_apply(graphdef, frozen, stack, X, adapter_ids=jnp.array([0, 1, 0, -1]))


@pytest.mark.parametrize("mutable", ["BatchStat", ["batch_stats"]])
def test_names_of_linen_are_no_filter(mutable):
    graphdef, frozen, adapters = split(zoo.Normed, X)
    with pytest.raises(ValueError, match=r"matches no variable.*nnx\.BatchStat"):
        lora_jax.lora_apply(graphdef, frozen, adapters, X, mutable=mutable)


def test_a_state_that_is_not_the_models():
    model = zoo.Normed(nnx.Rngs(0))
    graphdef, params, _ = nnx.split(model, nnx.Param, ...)
    config = LoraConfig([Rule(zoo.KERNELS, rank=2)])
    with pytest.raises(ValueError, match=r"nnx\.merge_state\(frozen, rest\)"):
        lora_jax.lora_init_model(KEY, graphdef, params, config, X)
    _, state = nnx.split(zoo.Mlp(nnx.Rngs(0)))
    frozen, adapters = lora_jax.lora_init(KEY, state, config)
    state["up"], state["side"] = state["up"], state["up"]
    del state["down"]
    frozen, adapters = lora_jax.lora_init(KEY, state, LoraConfig([Rule("up/kernel", rank=2)]))
    with pytest.raises(ValueError, match="model has 'down/bias', and the state does not"):
        lora_jax.lora_apply(zoo.Mlp(nnx.Rngs(0)), frozen, adapters, X)


class ByPlace(nnx.Module):
    """Says by their places what Flax's layers have names for."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(8, zoo.WIDTH, rngs=rngs)
        self.conv = nnx.Conv(zoo.WIDTH, zoo.WIDTH, (3,), rngs=rngs)
        self.linear = nnx.Linear(zoo.WIDTH, zoo.WIDTH, rngs=rngs)
        self.einsum = nnx.Einsum("btd,de->bte", (zoo.WIDTH, zoo.WIDTH), rngs=rngs)

    def __call__(self, ids):
        x = self.conv(self.embed(ids, None), None)
        return self.embed.attend(self.einsum(self.linear(x, None), None, None), None)


@pytest.mark.skipif(
    "out_sharding" not in inspect.signature(nnx.Embed.__call__).parameters,
    reason="the layers of this Flax take no more arguments",
)
def test_arguments_of_layers_by_their_places():
    ids = jnp.arange(8).reshape(2, 4)
    graphdef, frozen, adapters = split(ByPlace, ids)
    y = lora_jax.lora_apply(graphdef, frozen, adapters, ids)
    assert relative_error(y, merged(graphdef, frozen, adapters)(ids)) < 1e-5
