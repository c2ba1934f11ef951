"""Many adapters of one base: heads of their own, caches, tokens, training, and one trace."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import checking_leaks, random_like, random_variables, relative_error
from jax import export

import lora_jax

WIDTH = 6


class Block(nn.Module):
    decode: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        attention = nn.MultiHeadDotProductAttention(2, name="attention", decode=self.decode)
        x = x + attention(nn.LayerNorm(name="norm")(x), mask=None)
        return x + nn.Dense(WIDTH, name="mlp")(nn.tanh(x)), None


class Model(nn.Module):
    """Scanned blocks and a head, as a decoder has them."""

    decode: bool = False
    block: type = Block

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            self.block, {"params": 0}, split_rngs={"params": True, "dropout": True}, length=2
        )
        x, _ = scan(self.decode, name="blocks")(x, None)
        return nn.Dense(3, name="head")(x)


X = random_like(jnp.zeros((5, 4, WIDTH)), seed=1, scale=1.0)
MODEL = Model()
VARIABLES = random_variables(MODEL, X)
PARAMS = VARIABLES["params"]
AXES = lora_jax.kernel_axes(MODEL, VARIABLES, X)
QV, ALL = ".*(query|value)/kernel", r".*(attention|mlp).*kernel"
IDS = np.array([1, 0, -1, 2, 1])


def adapter(seed, pattern=QV, rank=2, trainable=(), params=PARAMS, **rule):
    config = lora_jax.LoraConfig([lora_jax.Rule(pattern, rank, **rule)], trainable=trainable)
    return lora_jax.lora_init(jax.random.key(seed), params, config, axes=AXES)


def several(*trainable, **rule):
    """A LoRA, a DoRA of all kernels, and a LoRA with fully trained leaves."""
    adapters = [
        adapter(0, **rule)[1],
        adapter(1, ALL, 1, variant="dora", **rule)[1],
        adapter(2, rank=3, alpha=5.0, trainable=trainable, **rule)[1],
    ]
    return [random_like(tree, seed=seed) for seed, tree in enumerate(adapters)]


def alone(adapters, i, x, model=MODEL):
    """One adapter with its own frozen base, or the base."""
    if i < 0:
        return jax.jit(model.apply)({"params": PARAMS}, x)
    trained = {k for k, n in flat(adapters[i]).items() if not isinstance(n, lora_jax.Adapter)}
    frozen = {key: leaf for key, leaf in flat(PARAMS).items() if key not in trained}
    frozen = lora_jax.trees._paths.unflatten(frozen, PARAMS)
    return adapted(model, frozen, adapters[i], x)


@functools.partial(jax.jit, static_argnums=0)
def adapted(model, frozen, adapters, x):
    return lora_jax.lora_apply(model, {"params": frozen}, adapters, x)


def flat(tree):
    return lora_jax.trees._paths.flatten(tree, "tree")


def mixed(stacked, x=X, ids=IDS, model=MODEL, **kwargs):
    variables = {"params": PARAMS}
    return lora_jax.lora_apply(model, variables, stacked, x, adapter_ids=ids, **kwargs)


@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(lambda cls: cls, marks=pytest.mark.slow),
        pytest.param(nn.remat, marks=pytest.mark.slow),
        nn.jit,
    ],
)
def test_fully_trained_leaves_differ_from_row_to_row(transform):
    model = Model(block=transform(Block))
    adapters = several("head/.*", ".*norm/(scale|bias)", ".*mlp/bias", ".*query/bias")
    stacked = lora_jax.stack(adapters, PARAMS)
    y = jax.jit(lambda stacked, ids: mixed(stacked, ids=ids, model=model))(stacked, IDS)
    for b, i in enumerate(IDS):
        assert relative_error(y[b : b + 1], alone(adapters, i, X[b : b + 1])) < 1e-5, (b, i)


@pytest.mark.slow
def test_gradient_of_fully_trained_leaves_is_that_of_their_rows():
    stacked = lora_jax.stack(several("head/.*", ".*norm/scale"), PARAMS)
    weights = random_like(jnp.zeros((5, 4, 3)), seed=4)
    grads = jax.jit(jax.grad(lambda s: jnp.sum(weights * mixed(s))))(stacked)

    def rows(stacked):
        y = jax.vmap(lambda i, x: mixed(stacked, x[None], i)[0])(jnp.array(IDS), X)
        return jnp.sum(weights * y)

    expected = jax.jit(jax.grad(rows))(stacked)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for a, b in zip(*map(jax.tree.leaves, (grads, expected)), strict=True):
        assert float(jnp.abs(a - b).max()) < 1e-5 * largest
    assert (grads["head"]["kernel"][2] != 0).all()


def test_rows_with_the_base_alone_need_the_base():
    adapters = [adapter(0, trainable=["head/.*"])[1]]
    frozen = {name: leaf for name, leaf in PARAMS.items() if name != "head"}
    stacked = lora_jax.stack(adapters)

    def call(ids, x=X[:2]):
        variables = {"params": frozen}
        return lora_jax.lora_apply(MODEL, variables, stacked, x, adapter_ids=ids)

    with pytest.raises(ValueError, match=r"'head/(bias|kernel)' was fully trained, and the base"):
        call(jnp.array([0, -1]))
    y = jax.jit(call)(jnp.array([0, -1]))
    assert jnp.isfinite(y[0]).all()
    assert jnp.isnan(y[1]).all()


def test_decoding_with_a_cache_is_that_of_each_row():
    class Causal(nn.Module):
        @nn.compact
        def __call__(self, x):
            mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
            attention = nn.MultiHeadDotProductAttention(2, name="attention")
            return nn.Dense(3, name="head")(attention(x, mask=mask))

    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            attention = nn.MultiHeadDotProductAttention(2, name="attention", decode=True)
            return nn.Dense(3, name="head")(attention(x))

    variables = random_variables(Causal(), X)
    params = variables["params"]
    axes = lora_jax.kernel_axes(Causal(), variables, X)
    rules = [{"variant": "lora", "rank": 2}, {"variant": "dora", "rank": 1}]
    trees = [
        lora_jax.lora_init(
            jax.random.key(0),
            params,
            lora_jax.LoraConfig([lora_jax.Rule(".*kernel", **rule)]),
            axes=axes,
        )[1]
        for rule in rules
    ]
    stacked = lora_jax.stack([random_like(tree) for tree in trees], params)
    ids = np.array([0, 1, -1, 1, 0])
    whole = jax.jit(
        lambda x: lora_jax.lora_apply(Causal(), {"params": params}, stacked, x, adapter_ids=ids)
    )(X)
    cache = jax.jit(Decoder().init)(jax.random.key(0), X)["cache"]

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(cache, x, ids):
        variables = {"params": params, "cache": cache}
        y, new = lora_jax.lora_apply(
            Decoder(),
            variables,
            stacked,
            x,
            adapter_ids=ids,
            in_axes=0,
            variable_axes={"cache": 0},
            mutable=["cache"],
        )
        return y, new["cache"]

    for t in range(X.shape[1]):
        y, cache = step(cache, X[:, t : t + 1], ids)
        assert relative_error(y[:, 0], whole[:, t]) < 1e-5


@pytest.mark.slow
def test_each_token_may_have_its_own():
    stacked = lora_jax.stack(several(), PARAMS)
    dense = nn.Dense(WIDTH)
    params = {"kernel": PARAMS["blocks"]["mlp"]["kernel"][0], "bias": jnp.ones(WIDTH)}
    stacked = {"kernel": jax.tree.map(lambda a: a[:, 0], stacked["blocks"]["mlp"]["kernel"])}
    stacked["kernel"] = stacked["kernel"].replace(axes=lora_jax.KernelAxes())
    ids = np.array([[0, 1, -1, 2], [2, 2, 1, 0]])

    def tokens(stacked, x):
        return lora_jax.lora_apply(dense, {"params": params}, stacked, x, adapter_ids=ids)

    def one_by_one(stacked, x):
        y = jax.vmap(
            lambda i, x: lora_jax.lora_apply(dense, {"params": params}, stacked, x, adapter_ids=i)
        )(ids.reshape(-1), x.reshape(-1, WIDTH))
        return y.reshape(x.shape)

    got, expected = (jax.vjp(function, stacked, X[:2]) for function in (tokens, one_by_one))
    assert relative_error(got[0], expected[0]) < 1e-6
    pairs = zip(*(jax.tree.leaves(vjp(jnp.sin(got[0]))) for _, vjp in (got, expected)), strict=True)
    assert all(relative_error(a, b) < 1e-5 for a, b in pairs)


def test_an_id_of_no_adapter_is_an_error_or_nan():
    stacked = lora_jax.stack(several(), PARAMS)
    compiled = jax.jit(lambda ids: mixed(stacked, ids=ids))
    for wrong in (3, -2):
        with pytest.raises(ValueError, match=f"adapter_ids has {wrong}, but there are 3 adapters"):
            mixed(stacked, ids=np.array([0, wrong, 0, 0, 0]))
        y = compiled(np.array([0, wrong, 0, 0, 0]))
        assert jnp.isnan(y[1]).all()
        assert jnp.isfinite(y[np.array([0, 2, 3, 4])]).all()
    with pytest.raises(TypeError, match="must be integers, got float"):
        mixed(stacked, ids=np.ones(5))
    with pytest.raises(ValueError, match=r"has 4 rows, but argument 0 is \(5, 4, 6\)"):
        mixed(stacked, ids=np.zeros(4, int))


@pytest.mark.parametrize("count", [2, 40])  # one-hot, gather
@pytest.mark.parametrize("broken", ["U", "V", "m"])
def test_a_broken_adapter_does_not_reach_into_other_rows(count, broken):
    model, x = nn.Dense(4), random_like(jnp.zeros((3, 2, WIDTH)))
    variables = random_variables(model, x)
    config = lora_jax.LoraConfig([lora_jax.Rule("kernel", 2, variant="dora")])
    tree = random_like(lora_jax.lora_init(jax.random.key(0), variables["params"], config)[1])
    nan = jnp.full_like(getattr(tree["kernel"], broken), jnp.nan)
    bad = {"kernel": tree["kernel"].replace(**{broken: nan})}
    stacked = lora_jax.stack([tree, bad, *[tree] * (count - 2)])

    y = lora_jax.lora_apply(model, variables, stacked, x, adapter_ids=np.array([0, 1, -1]))
    assert jnp.isnan(y[1]).all()
    assert relative_error(y[:1], lora_jax.lora_apply(model, variables, tree, x[:1])) < 1e-6
    assert relative_error(y[2:], model.apply(variables, x[2:])) < 1e-6


def test_what_cannot_be_mixed_says_what_can():
    materialized = lora_jax.stack([adapter(0, materialize=True)[1]])
    with pytest.raises(
        ValueError, match=r"materialize=True.*every token: give one id for each row"
    ):
        mixed(materialized, ids=np.zeros((5, 4), int))
    assert relative_error(mixed(materialized, ids=-1), MODEL.apply(VARIABLES, X)) < 1e-6
    with_head = lora_jax.stack([adapter(0, trainable=["head/.*"])[1]])
    with pytest.raises(ValueError, match=r"one number for each example.*not for each token"):
        mixed(with_head, ids=np.zeros((5, 4), int))
    stacked = lora_jax.stack([adapter(0)[1]])
    with pytest.raises(ValueError, match=r"product='dense'\) is not possible .* as the rows"):
        mixed(stacked, ids=np.zeros(5, int), product="dense")


def fully_trained_of(model, pattern, x, count=2):
    variables = random_variables(model, x)
    config = lora_jax.LoraConfig([], trainable=[pattern])
    tree = lora_jax.lora_init(jax.random.key(0), variables["params"], config)[1]
    trees = [random_like(tree, seed=i) for i in range(count)]
    return variables, trees, lora_jax.stack(trees)


def test_a_stack_of_another_base_is_refused():
    stacked = fully_trained_of(nn.Dense(5), "bias", X)[2]
    other = random_variables(nn.Dense(1), X)
    with pytest.raises(ValueError, match=r"'bias' was fully trained: its stack is \(2, 5\), but"):
        lora_jax.lora_apply(nn.Dense(1), other, stacked, X, adapter_ids=IDS % 2)


def test_a_batch_of_an_unknown_size():
    variables, _, stacked = fully_trained_of(nn.Dense(5), "bias", X)
    (b,) = export.symbolic_shape("b")
    ids = jax.ShapeDtypeStruct((b,), jnp.int32)
    x = jax.ShapeDtypeStruct((b, WIDTH), jnp.float32)

    @jax.jit
    def call(x, ids):
        return lora_jax.lora_apply(nn.Dense(5), variables, stacked, x, adapter_ids=ids)

    exported = export.export(call)(x, ids)
    ids = np.array([1, -1, 0, 1], np.int32)
    assert relative_error(exported.call(X[:4, 0], ids), call(X[:4, 0], ids)) < 1e-6


@pytest.mark.parametrize(
    "layer", [nn.Conv(3, (2,)), nn.ConvTranspose(3, (2,)), nn.ConvLocal(3, (2,))]
)
def test_positions_that_are_convolved_have_no_adapters_of_their_own(layer):
    variables = random_variables(layer, X)
    config = lora_jax.LoraConfig([lora_jax.Rule("kernel", 1)])
    axes = lora_jax.kernel_axes(layer, variables, X)
    tree = lora_jax.lora_init(jax.random.key(0), variables["params"], config, axes=axes)[1]
    ids = np.zeros(X.shape[:2], int)
    with pytest.raises(ValueError, match=r"'kernel' convolves the axes behind \(1,\)"):
        lora_jax.lora_apply(layer, variables, lora_jax.stack([tree]), X, adapter_ids=ids)


def test_ids_of_few_bits():
    config = lora_jax.LoraConfig([lora_jax.Rule("kernel", 1)])
    model, x = nn.Dense(3), jnp.ones((2, 4))
    variables = random_variables(model, x)
    tree = random_like(lora_jax.lora_init(jax.random.key(0), variables["params"], config)[1])
    stacked = jax.tree.map(lambda a: jnp.repeat(a[None], 256, 0), tree)
    expected = lora_jax.lora_apply(model, variables, tree, x)
    for ids in (np.array([255, 0], np.uint8), np.array([100, -1], np.int8)):
        y = lora_jax.lora_apply(model, variables, stacked, x, adapter_ids=ids)
        assert relative_error(y[:1], expected[:1]) < 1e-6
    many = lora_jax.per_adapter(optax.sgd(1.0))
    update = many.update(stacked, many.init(stacked), stacked, adapter_ids=[255, -1])[0]
    assert (update["kernel"].U[255] == -tree["kernel"].U).all()
    assert not update["kernel"].U[:255].any()
    with pytest.raises(TypeError, match="must be integers, got bool"):
        many.update(stacked, many.init(stacked), stacked, adapter_ids=np.ones(256, bool))


def test_summary_is_of_one():
    stacked = lora_jax.stack([adapter(0)[1]])
    with pytest.raises(ValueError, match=r"is a stack of 1. .*take one alone"):
        lora_jax.summary(PARAMS, stacked)


def test_boxed_fully_trained_leaves():
    init = nn.with_partitioning(nn.initializers.ones, ("model",))
    model, x = nn.Dense(5, bias_init=init), X[:, 0]
    params = model.init(jax.random.key(0), x)["params"]
    trees = [
        lora_jax.lora_init(
            jax.random.key(0),
            params,
            lora_jax.LoraConfig([lora_jax.Rule("kernel", 1)], trainable=trainable),
        )[1]
        for trainable in (["bias"], [])
    ]
    trees[0]["bias"] = jax.tree.map(lambda x: 2 * x, trees[0]["bias"])
    stacked = lora_jax.stack(trees, params)
    y = lora_jax.lora_apply(model, {"params": params}, stacked, x, adapter_ids=IDS % 2)
    base = model.apply({"params": params}, x)
    assert relative_error(y, base + (IDS % 2 == 0)[:, None]) < 1e-6


def test_hundred_adapters_are_one_trace():
    config = lora_jax.LoraConfig([lora_jax.Rule(QV, 1, variant="dora")])
    stacked = jax.vmap(lambda key: lora_jax.lora_init(key, PARAMS, config, axes=AXES)[1])(
        jax.random.split(jax.random.key(0), 100)
    )
    stacked = random_like(stacked)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def serve(adapters):
        return lora_jax.lora_apply(MODEL, {"params": PARAMS}, adapters, X)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def serve_by_id(i):
        return mixed(stacked, ids=i)

    for i in range(100):
        one = serve(jax.tree.map(lambda a, i=i: a[i], stacked))
        assert relative_error(serve_by_id(np.int32(i)), one) < 1e-5


def test_dropout_drops_for_the_rows_that_have_adapters():
    stacked = lora_jax.stack(several(dropout=0.5), PARAMS)
    y, dropped = mixed(stacked), mixed(stacked, rngs={"dropout": jax.random.key(0)})
    same = [relative_error(a, b) < 1e-6 for a, b in zip(y, dropped, strict=True)]
    assert same == (IDS < 0).tolist()


def loss_of(y):
    return jnp.mean(jnp.square(y - 1.0), axis=(1, 2))


@pytest.mark.slow
def test_training_many_in_one_step_is_training_each():
    """A sweep over ranks, seeds and learning rates, with data of their own."""
    trees = [random_like(adapter(i, rank=i + 1)[1], seed=i) for i in range(3)]
    rates = jnp.array([1e-3, 1e-2, 1e-1])
    data = jnp.stack([X, X + 1, X * 2])
    optimizer = optax.inject_hyperparams(optax.adamw)(learning_rate=0.0)

    def step(adapters, state, x):
        def loss(adapters):
            return loss_of(lora_jax.lora_apply(MODEL, {"params": PARAMS}, adapters, x)).sum()

        grads = jax.grad(loss)(adapters)
        updates, state = optimizer.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state

    stacked = lora_jax.stack(trees)
    state = jax.vmap(optimizer.init)(stacked)
    state.hyperparams["learning_rate"] = rates
    many = jax.jit(jax.vmap(step))
    for _ in range(3):
        stacked, state = many(stacked, state, data)
    one = jax.jit(step)
    for i, tree in enumerate(trees):
        own = optimizer.init(tree)
        own.hyperparams["learning_rate"] = rates[i]
        for _ in range(3):
            tree, own = one(tree, own, data[i])
        trained = lora_jax.unstack(stacked)[i]
        for a, b in zip(*map(jax.tree.leaves, (trained, tree)), strict=True):
            assert relative_error(a, b) < 1e-4
        padded = stacked["blocks"]["attention"]["query"]["kernel"].U[i]
        assert (padded[..., i + 1 :] == 0).all()


def test_adapters_that_are_not_in_the_batch_stay_bit_identical():
    stacked = lora_jax.stack(several("head/.*"), PARAMS)
    optimizer = lora_jax.per_adapter(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1))
    )
    state = optimizer.init(stacked)

    @jax.jit
    def step(stacked, state, ids):
        grads = jax.grad(lambda s: loss_of(mixed(s, ids=ids)).sum())(stacked)
        updates, state = optimizer.update(grads, state, stacked, adapter_ids=ids)
        return optax.apply_updates(stacked, updates), state

    before = stacked, state
    for ids in ([0, 1, 2, 1, 0], [1, -1, 1, 2, 2], [2, 2, 2, -1, 2]):
        ids = np.array(ids)
        new = step(*before, ids)
        for i in range(3):
            pairs = zip(*map(jax.tree.leaves, (before, new)), strict=True)
            same = [bool((a[i] == b[i]).all()) for a, b in pairs]
            assert all(same) == (i not in ids)
        before = new


@pytest.mark.slow
def test_a_mixed_batch_trains_each_as_alone():
    trees = several()
    stacked = lora_jax.stack(trees, PARAMS)
    optimizer = optax.adamw(1e-2)
    many = lora_jax.per_adapter(optimizer)
    ids = np.array([0, 1, 1, 2, 0])
    state = many.init(stacked)
    together = stacked
    for _ in range(3):
        grads = jax.jit(jax.grad(lambda s: loss_of(mixed(s, ids=ids)).sum()))(together)
        updates, state = many.update(grads, state, together, adapter_ids=ids)
        together = optax.apply_updates(together, updates)
    for i in range(3):
        tree, x = lora_jax.unstack(stacked)[i], X[ids == i]
        own = optimizer.init(tree)
        for _ in range(3):
            grads = jax.jit(jax.grad(lambda t, x=x: loss_of(alone([t], 0, x)).sum()))(tree)
            updates, own = optimizer.update(grads, own, tree)
            tree = optax.apply_updates(tree, updates)
        trained = lora_jax.unstack(together)[i]
        pairs = zip(*map(jax.tree.leaves, (trained, tree)), strict=True)
        assert all(relative_error(a, b) < 1e-4 for a, b in pairs if float(jnp.abs(b).max()))


def test_nothing_leaks():
    stacked = lora_jax.stack(several("head/.*"), PARAMS)
    with checking_leaks():
        jax.jit(jax.grad(lambda s, ids: mixed(s, ids=ids).sum()))(stacked, IDS)
