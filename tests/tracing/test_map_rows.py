"""A mixed batch is a call with each row alone: whatever the model is given, and whatever it has."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_like, random_variables, relative_error

import lora_jax

WIDTH = 6
IDS = np.array([1, 0, -1, 1])
ROWS = len(IDS)
X = random_like(jnp.zeros((ROWS, 3, WIDTH)), scale=1.0)
MEMORY = random_like(jnp.zeros((ROWS, WIDTH)), seed=1, scale=1.0)  # as many as there are rows


def adapted(model, *args, kernels=".*(kernel|embedding)", trainable=(), rank=2, **kwargs):
    """Variables of a model, a LoRA and a DoRA of it, and their stack."""
    variables = random_variables(model, *args)
    axes = lora_jax.kernel_axes(model, variables, *args, **kwargs)
    trees = []
    for seed, variant in enumerate(("lora", "dora")):
        rules = [lora_jax.Rule(kernels, rank, variant=variant)] if kernels else []
        config = lora_jax.LoraConfig(rules, trainable=list(trainable))
        tree = lora_jax.lora_init(jax.random.key(0), variables["params"], config, axes=axes)[1]
        trees.append(random_like(tree, seed=seed))
    return variables, trees, lora_jax.stack(trees, variables["params"])


def alone(model, variables, stacked, i, *args, **kwargs):
    """One adapter, or the base."""
    if i < 0:
        return model.apply(variables, *args, **kwargs)
    return lora_jax.lora_apply(model, variables, stacked, *args, adapter_ids=i, **kwargs)


def check_rows(y, one):
    """That each row is what it is alone: `one` of the id, and of the place of the row."""
    for b, i in enumerate(IDS):
        own = slice(b, b + 1)
        assert relative_error(y[own], one(i, own)) < 2e-6, b


class Affine(nn.Module):
    """Has a second array, which is no batch."""

    @nn.compact
    def __call__(self, x, memory, rows_last=False):
        x = x.T if rows_last else x
        scale = self.param("scale", nn.initializers.ones, (WIDTH,))
        return nn.Dense(5, name="dense")(x * scale + memory.sum(0))


class WithMemory(nn.Module):
    """Gives it an array of its own."""

    @nn.compact
    def __call__(self, x):
        return Affine(name="affine")(x, MEMORY)


class WithPositions(nn.Module):
    """Has as many positions as there are rows, through an adapted layer."""

    @nn.compact
    def __call__(self, tokens):
        positions = nn.Embed(tokens.shape[1], WIDTH, name="positions")(jnp.arange(tokens.shape[1]))
        x = nn.Embed(11, WIDTH, name="tokens")(tokens)
        return nn.Dense(3, name="head")(x + nn.Dense(WIDTH, name="project")(positions))


class OverTheBatch(nn.Module):
    """A transform that takes the axis of the batch off."""

    @nn.compact
    def __call__(self, x):
        mapped = nn.vmap(nn.remat(nn.Dense), {"params": None}, {"params": False})
        return mapped(WIDTH, name="dense")(x)


class PastItsModule(nn.Module):
    """Reads a parameter where no module computes with it."""

    def setup(self):
        self.dense = nn.Dense(WIDTH)

    def __call__(self, x):
        return self.dense(x) @ self.dense.variables["params"]["kernel"]


class Inner(nn.Module):
    """Computes a gradient inside."""

    @nn.compact
    def __call__(self, x):
        energy = nn.Dense(1, name="dense")
        energy(x)
        return jax.grad(lambda x: jnp.sum(jnp.sin(energy(x))))(x)


@pytest.mark.parametrize(
    ("model", "x", "options"),
    [
        (WithMemory(), X[:, 0], {"trainable": [".*scale"]}),
        (WithMemory(), X[:, 0], {"kernels": "", "trainable": [".*scale", ".*bias"]}),
        (WithPositions(), jnp.arange(16).reshape(4, 4) % 11, {}),
        (OverTheBatch(), jnp.concatenate([X, X[:, :1]], 1), {}),
        (OverTheBatch(), X, {"kernels": "", "trainable": [".*bias"]}),
        (PastItsModule(), X[:, 0], {"kernels": "", "trainable": [".*kernel"]}),
        (Inner(), X[:, 0], {"rank": 1}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_row_is_not_known_by_its_size(model, x, options):
    variables, _, stacked = adapted(model, x, **options)
    y = jax.jit(
        lambda stacked, x: lora_jax.lora_apply(model, variables, stacked, x, adapter_ids=IDS)
    )(stacked, x)
    one = jax.jit(lambda stacked, x, i: alone(model, variables, stacked, i, x), static_argnums=2)
    check_rows(y, lambda i, own: one(stacked, x[own], i))


def test_an_array_beside_the_input_is_of_all_rows_or_of_one():
    model, x = Affine(), X[:, 0]
    variables, _, stacked = adapted(model, x, MEMORY, trainable=["scale"])

    def call(*args, **kwargs):
        return lora_jax.lora_apply(model, variables, stacked, *args, adapter_ids=IDS, **kwargs)

    with pytest.raises(ValueError, match=r"argument 1 \(4, 6\)\. As.*in_axes=\(0, 0\), with None"):
        call(x, MEMORY)
    with pytest.raises(ValueError, match=r"in_axes=\(0, \{'memory': 0\}\), with None in the place"):
        call(x, memory=MEMORY)
    with pytest.raises(ValueError, match=r"argument 'memory' \(4, 6\)\. As for"):
        call(x, memory=MEMORY, in_axes=(0,))
    with pytest.raises(ValueError, match=r"4 rows, but argument 1 is \(3, 6\), whose axis 0"):
        call(x, MEMORY[:3], in_axes=0)
    of_all = call(x, MEMORY, in_axes=(0, None))
    assert (call(x, memory=MEMORY, in_axes={"memory": None}) == of_all).all()
    assert (call(x, memory=np.asarray(MEMORY), in_axes=(0, {"memory": None})) == of_all).all()
    of_one = call(x, MEMORY, in_axes=0)
    assert (call(x, memory=MEMORY, in_axes=[0, {"memory": 0}]) == of_one).all()
    assert (call(x.T, MEMORY, in_axes=(1, None), rows_last=True) == of_all).all()
    check_rows(of_all, lambda i, own: alone(model, variables, stacked, i, x[own], MEMORY))
    check_rows(of_one, lambda i, own: alone(model, variables, stacked, i, x[own], MEMORY[own]))
    few = lora_jax.lora_apply(
        model, variables, stacked, x[:1], MEMORY[:1], adapter_ids=IDS[:1], in_axes=0
    )
    assert relative_error(few, of_one[:1]) < 2e-6


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x, mask, *, shift=None, train=False):
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x, mask=mask[:, None, None])
        return x if shift is None else x + shift["by"] + shift["all"]


def test_trees_of_arguments():
    model, mask = Masked(), jnp.arange(12).reshape(4, 3) % 5 != 0
    variables, _, stacked = adapted(model, X, mask)
    shift = {"by": X + 1, "all": jnp.ones((1, 1, WIDTH))}
    axes = (0, 0, {"shift": {"by": 0, "all": None}})
    y = lora_jax.lora_apply(
        model, variables, stacked, X, mask, shift=shift, train=False, adapter_ids=IDS, in_axes=axes
    )

    def one(i, own):
        own_shift = {**shift, "by": shift["by"][own]}
        return alone(model, variables, stacked, i, X[own], mask[own], shift=own_shift)

    check_rows(y, one)


class TimeMajor(nn.Module):
    @nn.compact
    def __call__(self, x):  # (time, batch, features)
        return nn.Dense(5, name="dense")(jnp.cumsum(x, axis=0))


@pytest.mark.parametrize("axis", [1, -2])
def test_rows_on_another_axis(axis):
    model, x = TimeMajor(), jnp.concatenate([X, X[:, :1]], 1)  # as many times as rows
    variables, _, stacked = adapted(model, x)
    y = lora_jax.lora_apply(
        model, variables, stacked, x, adapter_ids=IDS, in_axes=axis, out_axes=axis
    )

    def one(i, own):
        return alone(model, variables, stacked, i, x[:, own]).swapaxes(0, 1)

    check_rows(y.swapaxes(0, 1), one)
    found = lora_jax.lora_apply(model, variables, stacked, x, adapter_ids=IDS, in_axes=axis)
    assert (found == y).all()
    with pytest.raises(ValueError, match=r"result is \(4, 1, 5\), and axis 0.*out_axes=\.\.\."):
        lora_jax.lora_apply(model, variables, stacked, x, adapter_ids=IDS, in_axes=1, out_axes=0)


class Several(nn.Module):
    """Gives what has rows, what is one for all of them, and what is no array."""

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(5, name="dense")(x)
        count = self.variable("count", "calls", lambda: jnp.zeros((), int))
        if self.is_mutable_collection("count"):
            count.value = count.value + 1
        self.sow("intermediates", "y", y)
        return {"y": y, "table": jnp.arange(7.0), "width": jnp.array(5), "what": "logits"}


@pytest.mark.parametrize(
    "options", [{}, {"out_axes": {"y": 0, "table": None, "width": 0, "what": None}}]
)
def test_results_of_all_kinds(options):
    model, x = Several(), X[:, 0]
    variables, _, stacked = adapted(model, x)
    mutable = ["intermediates", "count"]
    out, changed = lora_jax.lora_apply(
        model, variables, stacked, x, adapter_ids=IDS, mutable=mutable, **options
    )
    assert out["what"] == "logits"
    assert out["width"] == 5
    assert (out["table"] == jnp.arange(7.0)).all()
    assert changed["count"]["calls"] == variables["count"]["calls"] + 1
    assert (changed["intermediates"]["y"][0] == out["y"]).all()

    def one(i, own):
        return alone(model, variables, stacked, i, x[own])["y"]

    check_rows(out["y"], one)


class Loss(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, name="dense")(x).mean()


class Normed(nn.Module):
    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=not self.train, name="norm")(x)
        return nn.Dense(5, name="dense")(x)


def test_what_is_another_one_for_each_row_has_no_place_in_a_number():
    variables, _, stacked = adapted(Loss(), X, rank=1)
    with pytest.raises(ValueError, match=r"result \(\) has no axis for the batch.*Map over"):
        lora_jax.lora_apply(Loss(), variables, stacked, X, adapter_ids=IDS)
    model, x = Normed(), X[:, 0]
    variables, _, stacked = adapted(model, x, trainable=[".*norm.*"])
    y = lora_jax.lora_apply(model, variables, stacked, x, adapter_ids=IDS)
    check_rows(y, lambda i, own: alone(model, variables, stacked, i, x[own]))
    with pytest.raises(ValueError, match=r"'batch_stats/norm/mean' \(6,\) has no axis"):
        lora_jax.lora_apply(
            Normed(train=True), variables, stacked, x, adapter_ids=IDS, mutable=["batch_stats"]
        )


class Step(nn.Module):
    """A layer with a cache, and a counter, as decoders have them."""

    @nn.compact
    def __call__(self, x, _=None):
        is_there = self.has_variable("cache", "sums")
        sums = self.variable("cache", "sums", jnp.zeros, (x.shape[0], WIDTH))
        at = self.variable("cache", "at", lambda: jnp.zeros((), jnp.int32))
        x = nn.Dense(WIDTH, name="dense")(x)
        if is_there:
            sums.value, at.value = sums.value + x, at.value + 1
        return sums.value / at.value, None


class Decoder(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, x):
        axes, split = {"params": 0, "cache": 0}, {"params": True}
        scan = nn.scan(Step, axes, split_rngs=split, length=self.layers)
        return scan(name="steps")(x, None)[0]


@pytest.mark.parametrize("layers", [2, ROWS])
def test_caches_of_scanned_layers(layers):
    model, x = Decoder(layers), X[:, 0]
    cache = model.init(jax.random.key(0), x)["cache"]
    variables, _, stacked = adapted(model, x, mutable=["cache"])
    variables = {**variables, "cache": cache}

    def step(variables, x, ids, **kwargs):
        y, new = lora_jax.lora_apply(
            model, variables, stacked, x, adapter_ids=ids, mutable=["cache"], **kwargs
        )
        return y, {**variables, **new}

    with pytest.raises(ValueError, match=r"variable_axes=\{'cache': 0\}, with None in the place"):
        step(variables, x, IDS)
    state = variables
    rows = jax.jit(lambda state, x: step(state, x, IDS, in_axes=0, variable_axes={"cache": 1}))
    alone = {i: jax.jit(lambda state, x, i=i: step(state, x, i)) for i in set(IDS)}
    each = [
        {**variables, "cache": {"steps": {**cache["steps"], "sums": cache["steps"]["sums"][:, :1]}}}
        for _ in IDS
    ]
    for t in range(3):
        y, state = rows(state, X[:, t])
        assert (state["cache"]["steps"]["at"] == t + 1).all()
        for b, i in enumerate(IDS):
            expected, each[b] = alone[i](each[b], X[b : b + 1, t])
            assert relative_error(y[b : b + 1], expected) < 2e-6
            sums = each[b]["cache"]["steps"]["sums"]
            assert relative_error(state["cache"]["steps"]["sums"][:, b : b + 1], sums) < 2e-6


@pytest.mark.parametrize("axes", [{}, {"cache": 1}])
@pytest.mark.parametrize("layers", [1, ROWS])
def test_a_cache_that_the_call_makes(axes, layers):
    model, x = Decoder(layers), X[:, 0]
    variables, _, stacked = adapted(model, x, mutable=["cache"])
    variables = {"params": variables["params"]}
    made = lora_jax.lora_apply(
        model, variables, stacked, x, adapter_ids=IDS, mutable=["cache"], variable_axes=axes
    )[1]["cache"]["steps"]
    assert made["sums"].shape == (layers, ROWS, WIDTH)
    assert made["at"].shape == (layers,)


class Lookup(nn.Module):
    """Reads from a table that may have a row for each of the batch, or be one for all."""

    @nn.compact
    def __call__(self, x):
        table = self.variable("tables", "table", jnp.zeros, (ROWS, WIDTH)).value
        return nn.Dense(5, name="dense")(x + table[jnp.arange(x.shape[0])])


def test_a_collection_that_may_be_of_all_rows_or_of_one():
    model, x = Lookup(), X[:, 0]
    variables, _, stacked = adapted(model, x)

    def call(**kwargs):
        return lora_jax.lora_apply(model, variables, stacked, x, adapter_ids=IDS, **kwargs)

    with pytest.raises(ValueError, match=r"'tables/table' \(4, 6\)\. As.*=\{'tables': 0\}, with N"):
        call()
    with pytest.raises(ValueError, match=r"names the collection 'tabels', which is neither"):
        call(variable_axes={"tabels": 0, "tables": 0})
    of_one = call(variable_axes={"tables": 0})
    of_all = call(variable_axes={"tables": None})

    def one(i, own):
        row = {**variables, "tables": {"table": variables["tables"]["table"][own]}}
        return alone(model, row, stacked, i, x[own])

    check_rows(of_one, one)
    check_rows(of_all, lambda i, own: alone(model, variables, stacked, i, x[own]))


def test_axes_that_do_not_fit():
    variables, _, stacked = adapted(nn.Dense(5), X)

    def call(**kwargs):
        return lora_jax.lora_apply(nn.Dense(5), variables, stacked, X, adapter_ids=IDS, **kwargs)

    for axes in ((0, 0), {"x": 0}, ("rows",), 5):
        with pytest.raises(ValueError, match=r"in_axes|axis 5"):
            call(in_axes=axes)


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(40, name="dense")(x)
        return nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(x)


def test_each_row_has_keys_of_its_own():
    x = jnp.ones((ROWS, 2, WIDTH))
    rngs = {"dropout": jax.random.key(0)}
    variables, _, stacked = adapted(Dropped(), x, rngs=rngs)
    ids = np.zeros(ROWS, int)
    y = lora_jax.lora_apply(Dropped(), variables, stacked, x, adapter_ids=ids, rngs=rngs)
    assert all((y[0] != y[b]).any() for b in range(1, ROWS))
    keys = jax.random.split(rngs["dropout"], ROWS)
    for b in range(ROWS):
        own = {"dropout": keys[b]}
        expected = alone(Dropped(), variables, stacked, 0, x[b : b + 1], rngs=own)
        assert relative_error(y[b : b + 1], expected) < 2e-6


class Latents(nn.Module):
    """Another number of vectors than of tokens, which may be the same."""

    count: int

    @nn.compact
    def __call__(self, x):
        latents = self.param("latents", nn.initializers.normal(), (self.count, WIDTH))
        mixed = nn.Dense(WIDTH, name="dense")(jnp.broadcast_to(latents, (len(x), *latents.shape)))
        return mixed + x.mean(1, keepdims=True)


@pytest.mark.parametrize("count", [3, 4])
def test_ids_of_tokens_are_not_those_of_something_else(count):
    model = Latents(count)
    variables, _, stacked = adapted(model, X, kernels=".*kernel")
    ids = np.zeros((ROWS, 3), int)
    with pytest.raises(ValueError, match=r"layer of 'dense/kernel'"):
        lora_jax.lora_apply(model, variables, stacked, X, adapter_ids=ids)


def test_ids_of_tokens_in_a_model_that_mixes_them():
    model, mask = Masked(), jnp.ones((ROWS, 3), bool)
    variables, _, stacked = adapted(model, X, mask)
    ids = np.array([[0, 1, -1], [1, 1, 1], [-1, -1, -1], [0, 0, 0]])
    y = lora_jax.lora_apply(model, variables, stacked, X, mask, adapter_ids=ids, in_axes=0)
    for b in (1, 2, 3):
        args = X[b : b + 1], mask[b : b + 1]
        expected = alone(model, variables, stacked, ids[b, 0], *args)
        assert relative_error(y[b : b + 1], expected) < 2e-6
    ids = ids[:, 1]
    plain = lora_jax.lora_apply(model, variables, stacked, X, mask, adapter_ids=ids, in_axes=0)
    assert (y[0] != plain[0]).any()


def test_the_product_with_the_base_is_computed_once():
    model = nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(64)])
    x = jnp.ones((8, 16, 64))
    variables, _, stacked = adapted(model, x)

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    def mixed(variables, stacked, x, ids):
        return lora_jax.lora_apply(model, variables, stacked, x, adapter_ids=ids)

    ids = np.arange(8) % 2
    frozen = lora_jax.cache_norm(variables["params"], stacked)
    base = flops(model.apply, variables, x)
    # Of rank 2, of 64 inputs and outputs: 2 (64 + 64) / 64 ** 2 of the base for each adapter.
    assert flops(mixed, variables, frozen, x, ids) < 1.25 * base


def test_the_program_is_of_one_size_for_any_number_of_rows():
    model = nn.Sequential([nn.Dense(6), nn.tanh, nn.Dense(6)])
    variables, _, stacked = adapted(model, X, trainable=[".*bias"])

    def equations(rows):
        x, ids = jnp.ones((rows, 3, WIDTH)), np.zeros(rows, int)

        def call(stacked):
            return lora_jax.lora_apply(model, variables, stacked, x, adapter_ids=ids)

        return str(jax.make_jaxpr(call)(stacked)).count(" = ")

    assert equations(2) == equations(256)


def test_factors_are_copied_when_they_are_needed():
    """Not for all layers before the first one."""
    layers, rows, count = 8, 32, 32
    model = nn.Sequential([nn.Dense(64) for _ in range(layers)])
    x = jnp.ones((rows, 2, 64))
    params = random_variables(model, x)["params"]
    tree = lora_jax.lora_init(
        jax.random.key(0), params, lora_jax.LoraConfig([lora_jax.Rule(".*kernel", 8)])
    )[1]
    stacked = lora_jax.stack([tree] * count)
    call = jax.jit(
        lambda stacked, x, ids: lora_jax.lora_apply(
            model, {"params": params}, stacked, x, adapter_ids=ids
        )
    )
    memory = call.lower(stacked, x, np.zeros(rows, int)).compile().memory_analysis()
    copies = sum(leaf.nbytes for leaf in jax.tree.leaves(stacked)) * rows // count
    assert memory.temp_size_in_bytes < copies / 2


def test_a_batch_with_objects():
    """What jax does not know is given to the model as it is."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, options):
            return nn.Dense(options.width, name="dense")(x)

    options = types.SimpleNamespace(width=5)
    variables, _, stacked = adapted(Model(), X, options)
    y = lora_jax.lora_apply(Model(), variables, stacked, X, options, adapter_ids=IDS)
    assert y.shape == (ROWS, 3, 5)

    class Result(types.SimpleNamespace):
        variables = None  # as a Flax module has it, which is not looked into

    class Gives(nn.Module):
        kind: type

        @nn.compact
        def __call__(self, x):
            return self.kind(y=nn.Dense(5, name="dense")(x))

    for kind in (types.SimpleNamespace, Result):
        with pytest.raises(ValueError, match=rf"a {kind.__name__} with arrays in it"):
            lora_jax.lora_apply(Gives(kind), variables, stacked, X, adapter_ids=IDS)


def test_maps_and_intermediates_around():
    """Another jax.vmap is not the one over the rows; nor is what is captured another result."""
    model, x = Step(), X[:, 0]
    variables, _, stacked = adapted(model, x, mutable=["cache"])

    def call(cache, **kwargs):
        both = {"params": variables["params"], "cache": cache}
        kwargs = {"mutable": ["cache"], "adapter_ids": IDS, "in_axes": 0, **kwargs}
        axes = {"cache": 0}
        return lora_jax.lora_apply(model, both, stacked, x, variable_axes=axes, **kwargs)

    one = call(variables["cache"])
    caches = jax.tree.map(lambda a: jnp.stack([a, a]), variables["cache"])
    two = jax.vmap(call)(caches)
    for a, b in zip(*map(jax.tree.leaves, (one, two)), strict=True):
        assert relative_error(b[1], a) < 2e-6
    dense = {"params": variables["params"]["dense"]}
    y, captured = lora_jax.lora_apply(
        nn.Dense(WIDTH),
        dense,
        stacked["dense"],
        x,
        adapter_ids=IDS,
        out_axes=0,
        capture_intermediates=True,
    )
    assert (captured["intermediates"]["__call__"][0] == y).all()
    changed = lora_jax.lora_apply(
        nn.Dense(WIDTH), dense, stacked["dense"], x, adapter_ids=IDS, mutable=True
    )[1]
    assert (changed["params"]["kernel"] == dense["params"]["kernel"]).all()
