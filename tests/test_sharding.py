"""Adapted layers on several devices: the same numbers as on one, in meshes of either kind.

With automatic axes the compiler shards what is computed. With explicit axes, which `jax.make_mesh`
gives, shardings are a part of the types, and what is ambiguous is an error.
"""

import contextlib
import functools
import itertools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from helpers import random_like, random_variables, relative_error
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from models import Decoder
from zoo import KERNELS, NO_ROWS

import lora_jax

NO_EXPLICIT = pytest.mark.skipif(
    not hasattr(jax, "set_mesh"), reason="in this jax explicit axes are not complete"
)
KINDS = {"auto": [], "explicit": [NO_EXPLICIT]}
# What is telling; `make test-slow` has all of it.
DEFAULT = {
    ("explicit", 8, "batch", "attention"),
    ("explicit", 8, "both", "compact"),
    ("explicit", "fully trained leaves"),
}


def make_mesh(kind, devices=4):
    """Half of the devices, or all but two, for the batch, and two for the features."""
    axis_types = (AxisType.Auto if kind == "auto" else AxisType.Explicit,) * 2
    shape = (devices // 2, 2)
    return jax.make_mesh(
        shape, ("data", "model"), axis_types=axis_types, devices=jax.devices()[:devices]
    )


def within(mesh):
    """As users of explicit axes are told to."""
    explicit = AxisType.Explicit in mesh.axis_types
    return jax.set_mesh(mesh) if explicit else contextlib.nullcontext()


def put(mesh, leaf, *spec):
    """A leaf on the mesh, its axes sharded where the mesh divides them."""
    spec = (*spec, *(None,) * (leaf.ndim - len(spec)))
    spec = [
        s if s and n % mesh.shape[s] == 0 else None for s, n in zip(spec, leaf.shape, strict=True)
    ]
    return jax.device_put(leaf, NamedSharding(mesh, P(*spec)))


def outputs(mesh, over, leaf):
    """A leaf with its last axis sharded."""
    return put(mesh, leaf, *(None,) * (leaf.ndim - 1), over) if leaf.ndim else put(mesh, leaf)


def like_kernels(mesh, over, adapters):
    """The adapters sharded where their kernels are, by their outputs: `V` and `m` are, `U` not."""

    def own(path, leaf):
        is_U = jax.tree_util.keystr(path).endswith(".U")
        return outputs(mesh, None if is_U else over, leaf)

    return jax.tree_util.tree_map_with_path(own, adapters)


def with_gradient(function, argnums):
    """The result, and the gradient of something that all of it is in."""

    def value(*args):
        y = function(*args)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    def both(*args):
        gradient, y = jax.grad(value, argnums, has_aux=True)(*args)
        return y, gradient

    return both


# --- the zoo ---

IDS = (0, 1, -1, 0, 1, 1, 0, -1)
LAYOUTS = {  # of the batch, of the input's features, of the outputs of kernels and of adapters
    "batch": ("data", None, None),
    "inputs": (None, "model", None),
    "outputs": (None, None, "model"),
    "both": ("data", None, "model"),
}


@functools.cache
def setup(name):
    """A case with eight rows, a LoRA and a DoRA of it, both of them stacked; as NumPy arrays."""
    case = zoo.CASES[name]
    variables, x = case.init()
    rest = {name: value for name, value in variables.items() if name != "params"}
    params = variables["params"]
    axes = lora_jax.kernel_axes(case.model, variables, x)
    each = []
    for seed, variant in enumerate(("lora", "dora")):
        config = lora_jax.LoraConfig([lora_jax.Rule(KERNELS, rank=2, variant=variant)])
        frozen, adapters = lora_jax.lora_init(jax.random.key(seed), params, config, axes=axes)
        each.append(random_like(adapters, seed=seed))
    s = types.SimpleNamespace(frozen=frozen, adapters=each, x=x, ids=jnp.array(IDS), stacked=None)
    if name not in NO_ROWS:
        s.x = jnp.concatenate([x] * len(IDS))[: len(IDS)]
        s.stacked = lora_jax.stack(each, params)
    differentiable = (1, 2) if jnp.issubdtype(x.dtype, jnp.inexact) else (1,)

    def plain(params, rest, x):
        return case.model.apply({**rest, "params": params}, x)

    def adapted(frozen, adapters, x, rest, ids=None):
        variables = {**rest, "params": frozen}
        return lora_jax.lora_apply(case.model, variables, adapters, x, adapter_ids=ids)

    def everything(frozen, adapters, stacked, x, rest, ids):
        """What is computed, and gradients; not by one function each, as that is slower."""
        both = with_gradient(adapted, differentiable)
        out = [both(frozen, one, x, rest) for one in adapters]
        if stacked is not None:
            out.append(both(frozen, stacked, x, rest, ids))
        return out, [lora_jax.lora_merge(frozen, one) for one in adapters]

    s.rest, s.everything, s.plain = rest, everything, with_gradient(plain, 0)
    return s


@functools.cache
def on_one_device(name):
    s = setup(name)
    return jax.jit(s.everything)(s.frozen, s.adapters, s.stacked, s.x, s.rest, s.ids)


def arguments(name, mesh, layout):
    """Those of `everything`, on a mesh; skips the test where the plain model fails there."""
    s = setup(name)
    batch, inputs, over = LAYOUTS[layout]
    frozen = jax.tree.map(functools.partial(outputs, mesh, over), s.frozen)
    rest = jax.tree.map(functools.partial(put, mesh), s.rest)
    x = put(mesh, s.x, *(batch, *(None,) * (s.x.ndim - 2), inputs)[-s.x.ndim :])
    try:
        jax.eval_shape(s.plain, frozen, rest, x)
    except Exception as error:
        pytest.skip(f"the plain model fails on this mesh: {str(error).splitlines()[0]}")
    adapters, stacked = like_kernels(mesh, over, (s.adapters, s.stacked))
    return frozen, adapters, stacked, x, rest, put(mesh, s.ids, batch)


def specs(tree):
    return [jax.typeof(leaf).sharding.spec for leaf in jax.tree.leaves(tree)]


TYPES = ("compact", "Conv, groups")
VALUES = [
    "compact",
    "attention",
    "scan of remat",
    "Conv, many batch axes",
    "DenseGeneral, two inputs",
]


@pytest.mark.parametrize(
    ("kind", "devices", "layout", "name"),
    [
        pytest.param(*case, marks=marks + ([] if case in DEFAULT else [pytest.mark.slow]))
        for kind, marks in KINDS.items()
        for layouts, devices in ((("batch", "both"), 4), (LAYOUTS, 8))
        for case in itertools.product([kind], [devices], layouts, VALUES)
    ],
)
def test_numbers_are_those_of_one_device(kind, devices, layout, name):
    mesh, s = make_mesh(kind, devices), setup(name)
    with within(mesh):
        args = arguments(name, mesh, layout)
        got = jax.jit(s.everything)(*args)
    assert_equal(got, on_one_device(name))


def assert_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert float(np.abs(np.asarray(a) - np.asarray(b)).max()) < 1e-5 * largest


@NO_EXPLICIT
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=[] if name in TYPES else [pytest.mark.slow])
        for name in zoo.CASES
        # The batch alone and the outputs alone are parts of both.
        for layout in (LAYOUTS if name in (*TYPES, *VALUES) else ("inputs", "both"))
    ],
)
def test_types_of_the_zoo_with_explicit_axes(name, layout):
    """Whatever fails there fails in tracing; and gradients are sharded as what they are of."""
    mesh, s = make_mesh("explicit", 8), setup(name)
    with within(mesh):
        args = arguments(name, mesh, layout)
        frozen, adapters, stacked, x, _, _ = args
        results, merged = jax.eval_shape(s.everything, *args)
        for (_, gradient), own in zip(results, [*adapters, stacked], strict=False):
            assert specs(gradient) == specs((own, x)[: len(gradient)])
        for one in merged:
            assert specs(one) == specs(frozen)


# --- what the zoo does not have ---


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="norm")(nn.tanh(nn.Dense(8, name="up")(x)))
        q, k = jnp.split(nn.Dense(16, name="qk")(x), 2, -1)
        return nn.Dense(6, name="down")(nn.tanh(q) * k)


RULES = {
    "fused kernels": {"pattern": "qk/kernel", "fused": 2, "parts": (1,), "variant": "dora"},
    "dropout": {"pattern": "up/kernel", "dropout": 0.5},
    "materialized": {"pattern": "down/kernel", "materialize": True, "variant": "dora"},
}
MIXED = {
    "fully trained leaves": ("norm/.*|down/bias", (8,)),
    "ids of tokens": (None, (8, 3)),
    "mapped over the rows": ("norm/.*", (8,)),
    "one for all": ("norm/.*", ()),
}


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        pytest.param(
            kind, what, marks=marks + ([] if (kind, what) in DEFAULT else [pytest.mark.slow])
        )
        for kind, marks in KINDS.items()
        for what in (*RULES, *MIXED)
    ],
)
def test_other_ways_of_an_adapter(what, kind):
    model, x, mesh = Model(), random_like(jnp.zeros((8, 3, 6)), scale=1.0), make_mesh(kind, 8)
    params = random_variables(model, x)["params"]
    rngs = {"dropout": jax.random.key(1)}
    trainable, shape = MIXED.get(what, (None, None))
    rules = [{"pattern": ".*/kernel", "variant": "dora"}] if what in MIXED else [RULES[what]]
    config = lora_jax.LoraConfig(
        [lora_jax.Rule(rank=2, **rule) for rule in rules],
        trainable=[trainable] if trainable else [],
    )
    each = [lora_jax.lora_init(jax.random.key(i), params, config) for i in range(2)]
    if what in MIXED:
        ids = jnp.array(np.random.default_rng(0).integers(-1, 2, shape))
        frozen, adapters = (
            params,
            lora_jax.stack([random_like(a, i) for i, (_, a) in enumerate(each)]),
        )
    else:
        ids, (frozen, adapters) = None, (each[0][0], random_like(each[0][1]))

    def apply(frozen, adapters, x, ids):
        def call(ids, x):
            variables = {"params": frozen}
            return lora_jax.lora_apply(model, variables, adapters, x, adapter_ids=ids, rngs=rngs)

        if what == "mapped over the rows":
            return jax.vmap(lambda i, x: call(i, x[None])[0])(ids, x)
        return call(ids, x)

    both = jax.jit(with_gradient(apply, 1))
    expected = both(frozen, adapters, x, ids)
    with within(mesh):
        sharded = jax.tree.map(functools.partial(outputs, mesh, "model"), frozen)
        batch = put(mesh, x, "data")
        ids = ids if ids is None else put(mesh, ids, *("data",) * min(ids.ndim, 1))
        everywhere = jax.tree.map(functools.partial(put, mesh), adapters)
        assert_equal(both(sharded, everywhere, batch, ids), expected)
        # The start of adapters and what is reported of them, outside of jax.jit.
        if what in RULES:
            frozen, adapters = lora_jax.lora_init(jax.random.key(0), sharded, config)
            assert_equal(adapters, each[0][1])
            assert lora_jax.summary(frozen, adapters)
            assert lora_jax.rounding(frozen, adapters)


@NO_EXPLICIT
def test_axes_of_kernels_that_must_be_sharded():
    """`nn.with_partitioning` asserts the sharding that the kernel has."""
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model, mesh = nn.Dense(4, kernel_init=init), make_mesh("explicit")
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((4, 6)))
    variables = jax.tree.map(lambda s: outputs(mesh, "model", jnp.ones(s.shape)), shapes)
    with within(mesh):
        x = put(mesh, jnp.ones((4, 6)), "data")
        model.apply(variables, x)
        assert list(lora_jax.kernel_axes(model, variables, x)) == ["kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_sharded_decoder_equals_one_device(variant):
    """Scanned on axis 1, with the factors sharded too: U over its inputs, V over its outputs."""
    model, tokens = Decoder(vocabulary=16, layers=2), jnp.arange(16).reshape(4, 4)
    variables = random_variables(model, tokens)
    axes = lora_jax.kernel_axes(model, variables, tokens)
    config = lora_jax.LoraConfig([lora_jax.Rule("|".join(axes), rank=2, variant=variant)])
    params = nn.unbox(variables["params"])
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config, axes=axes)
    adapters = random_like(adapters)

    @jax.jit
    @jax.value_and_grad
    def step(adapters, frozen, tokens):
        return (lora_jax.lora_apply(model, {"params": frozen}, adapters, tokens) ** 2).sum()

    mesh = make_mesh("auto")

    def shard(path, leaf):
        """The last axis that the mesh divides, for V and kernels; the last but one for U."""
        axis = leaf.ndim - 2 if jax.tree_util.keystr(path).endswith(".U") else leaf.ndim - 1
        return put(mesh, leaf, *(None,) * axis, "model" if leaf.ndim > 1 else None)

    sharded = jax.tree_util.tree_map_with_path(shard, (adapters, frozen))
    value, grads = step(*sharded, put(mesh, tokens, "data"))
    expected, expected_grads = step(adapters, frozen, tokens)
    assert relative_error(value, expected) < 1e-5
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert relative_error(got, want) < 1e-4
