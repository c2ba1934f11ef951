"""Adapters are where their kernels are: made, loaded, stacked and trained on a mesh."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from helpers import random_like, relative_error
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import KernelAxes, LoraConfig, Rule
from lora_jax.core._placement import array_specs

KEY = jax.random.key(0)
MESH = {"data": 4, "model": 2}


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh(tuple(MESH.values()), tuple(MESH), (kind, kind))


# A kernel's shape, its axes (inputs, outputs, batch), its spec; then those of U, V and m.
CASES = {
    "matrix": ((8, 6), KernelAxes(), P("data", "model"), P("data"), P(None, "model"), P("model")),
    "by both": (
        (16, 6),
        KernelAxes(),
        P(("model", "data"), None),
        P(("model", "data")),
        P(),
        P(),
    ),
    "short spec": ((8, 6), KernelAxes(), P("data"), P("data"), P(), P()),
    "heads": (
        (8, 2, 3),
        KernelAxes((0,), (1, 2)),
        P("data", "model", None),
        P("data"),
        P(None, "model"),
        P("model"),
    ),
    "in the second of two axes": (  # whose blocks do not lie one after another
        (8, 3, 2),
        KernelAxes((0,), (1, 2)),
        P("data", None, "model"),
        P("data"),
        P(),
        P(),
    ),
    "the first axis in single entries": (
        (8, 2, 4),
        KernelAxes((0,), (1, 2)),
        P(None, "model", "data"),
        P(),
        P(None, ("model", "data")),
        P(("model", "data")),
    ),
    "the first axis in pieces": (
        (8, 4, 4),
        KernelAxes((0,), (1, 2)),
        P(None, "model", "data"),
        P(),
        P(None, "model"),
        P("model"),
    ),
    "stacked": (
        (8, 3, 6),
        KernelAxes((0,), (2,), (1,)),
        P("data", None, "model"),
        P(None, "data"),
        P(None, None, "model"),
        P(None, "model"),
    ),
    "experts": (
        (4, 8, 6),
        KernelAxes((1,), (2,), (0,)),
        P("data", None, "model"),
        P("data"),
        P("data", None, "model"),
        P("data", "model"),
    ),
    "fused side by side": (
        (8, 12),
        KernelAxes((0,), (1,), fused=3),
        P("data", "model"),
        P(None, "data"),
        P(None, None, "model"),
        P(None, "model"),
    ),
    "fused in an axis of its own": (
        (8, 3, 4),
        KernelAxes((0,), (1, 2), fused=3, parts=(0, 2)),
        P("data", None, "model"),
        P(None, "data"),
        P(None, None, "model"),
        P(None, "model"),
    ),
}


def full(spec, ndim):
    return (*spec, *(None,) * (ndim - len(spec)))


@pytest.mark.parametrize("name", CASES)
def test_specs_of_an_adapter(name):
    shape, axes, spec, *expected = CASES[name]
    config = LoraConfig(
        [
            Rule(
                "kernel",
                rank=2,
                variant="dora",
                batch_axes=axes.batch,
                input_axes=axes.inputs,
                fused=axes.fused,
                parts=axes.parts if axes.fused > 1 else None,
            )
        ]
    )
    params = {"kernel": random_like(jnp.zeros(shape))}
    _, adapters = lora_jax.lora_init(KEY, params, config)
    node = adapters["kernel"]
    assert node.axes == axes
    found = array_specs(node, spec, MESH, shape)
    for (array_name, got), want in zip(found.items(), expected, strict=True):
        assert tuple(got) == full(want, node.arrays[array_name].ndim), array_name
    # Each is a placement that the arrays can have.
    where = lora_jax.shardings({"kernel": spec}, adapters, mesh=mesh_of())
    jax.block_until_ready(jax.device_put(adapters, where))
    stacked = lora_jax.stack([adapters, adapters])["kernel"]
    for array_name, got in array_specs(stacked, spec, MESH, shape).items():
        assert tuple(got) == (None, *tuple(found[array_name])), array_name


def test_other_variants_and_what_does_not_divide():
    """Whose arrays are of other shapes, and an axis that the mesh does not divide."""

    class Scaled(lora_jax.Variant):
        name = "scaled"

        def shapes(self, d, k, r):
            return {"c": (k,), "a": (d, 1), "b": (r, r)}

        def init(self, key, W, rule):
            return {
                "c": jnp.ones(W.shape[1]),
                "a": jnp.zeros((W.shape[0], 1)),
                "b": jnp.ones((rule.rank,) * 2),
            }

        def kernel(self, W, s, c, a, b):
            return c * W + a * b.sum()

    config = LoraConfig([Rule("kernel", rank=2, variant=Scaled())])
    _, adapters = lora_jax.lora_init(KEY, {"kernel": jnp.ones((8, 6))}, config)
    found = array_specs(adapters["kernel"], P("data", "model"), MESH, (8, 6))
    assert {name: tuple(spec) for name, spec in found.items()} == {
        "c": ("model",),
        "a": ("data", None),
        "b": (None, None),
    }
    config = LoraConfig([Rule("kernel", rank=2, fused=3)])
    _, adapters = lora_jax.lora_init(KEY, {"kernel": jnp.ones((8, 6))}, config)
    found = array_specs(adapters["kernel"], P(None, "data"), MESH, (8, 6))
    assert tuple(found["V"]) == (None, None, None)  # of 2 columns each, on 4 devices


# --- a model ---


class Model(nn.Module):
    """Attention, a layer that is scanned, and a head."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x, x)
        scan = nn.scan(Block, {"params": 1}, split_rngs={"params": True}, length=3)
        x, _ = scan(name="blocks")(x, None)
        return nn.Dense(4, name="head")(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(16, name="up")(x))), None


SPECS = {
    "out/kernel": P("model", None, "data"),
    "up/kernel": P("data", None, "model"),
    "down/kernel": P("model", None, "data"),
    "head/kernel": P("data", "model"),
    "kernel": P("data", "model", None),
}
HEADS = P(None, "model", None)
LAST = P(None, None, "model")
EXPLICIT = dict.fromkeys(("query", "key", "value"), HEADS)
EXPLICIT |= dict.fromkeys(("out", "up", "down"), LAST) | {"head": P(None, "model")}
X = jax.random.normal(KEY, (8, 4, 8))
RULES = LoraConfig([Rule("all-linear", rank=2, variant="dora")], ["head/.*"])


def specs(params):
    def one(path):
        return next((spec for name, spec in SPECS.items() if "/".join(path).endswith(name)), P())

    flat = flatten_dict(params)
    return jax.tree.unflatten(jax.tree.structure(params), [one(path) for path in sorted(flat)])


@functools.cache
def base():
    params = jax.jit(Model().init)(KEY, X)["params"]
    axes = lora_jax.kernel_axes(Model(), {"params": params}, X)
    return params, specs(params), axes


def on(mesh, tree, tree_of_specs):
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, tree_of_specs)


def placed(adapters, where):
    """Whether all arrays are there."""
    same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), adapters, where)
    return jax.tree.all(same)


KINDS = [
    AxisType.Auto,
    pytest.param(
        AxisType.Explicit,
        marks=pytest.mark.skipif(
            not hasattr(jax, "set_mesh"), reason="in this jax explicit axes are not complete"
        ),
    ),
]


@pytest.mark.parametrize("kind", KINDS, ids=["auto", "explicit"])
def test_all_that_is_made_follows_the_base(kind, tmp_path):
    plain, tree_of_specs, axes = base()
    mesh = mesh_of(kind)
    params = on(mesh, plain, tree_of_specs)
    frozen, adapters = lora_jax.lora_init(KEY, params, RULES, axes=axes)
    where = lora_jax.shardings(params, adapters)
    assert placed(adapters, where)
    assert placed(lora_jax.lora_merge(frozen, adapters), jax.tree.map(lambda x: x.sharding, params))
    cut = [x for x in jax.tree.leaves(adapters) if not x.sharding.is_fully_replicated]
    assert len(cut) >= 3 * 6 + 1
    _, alone = lora_jax.lora_init(KEY, plain, RULES, axes=axes)
    for one, other in zip(*map(jax.tree.leaves, (adapters, alone)), strict=True):
        assert relative_error(one, other) < 1e-6

    lora_jax.save(tmp_path / "ours", adapters, frozen=frozen)
    again = lora_jax.load(tmp_path / "ours", params, verify=True)
    assert placed(again, jax.tree.map(lambda x: x.sharding, (frozen, adapters)))
    stacked = lora_jax.stack([adapters, adapters], params)
    of_stack = lora_jax.shardings(params, stacked)
    assert placed(stacked, of_stack)
    for s, one in zip(*map(jax.tree.leaves, (of_stack, where)), strict=True):
        assert tuple(s.spec)[: 1 + len(one.spec)] == (None, *one.spec)

    head = {"head": {"kernel": params["head"]["kernel"]}}
    _, lora = lora_jax.lora_init(KEY, head, LoraConfig([Rule("head/kernel", rank=2)]))
    lora_jax.peft.save(tmp_path / "peft", head, lora)
    _, from_peft = lora_jax.peft.load(tmp_path / "peft", head)
    assert placed(from_peft, jax.tree.map(lambda x: x.sharding, lora))


@pytest.mark.parametrize("kind", KINDS, ids=["auto", "explicit"])
def test_codes_are_where_their_kernel_was(kind):
    plain, tree_of_specs, axes = base()
    mesh = mesh_of(kind)
    params = on(mesh, plain, tree_of_specs)
    kinds = {"(?!head).*kernel": lora_jax.Quantization("nf4", 4)}
    quantized = lora_jax.quantize(params, kinds, axes=axes)
    query = quantized["attention"]["query"]["kernel"]
    assert query.shape == (8, 2, 4)
    assert tuple(query.codes.sharding.spec) == ("data", "model", None)
    assert tuple(query.scale.sharding.spec) == (None, "model", None)  # of 2 blocks, on 4 devices
    frozen, adapters = lora_jax.lora_init(KEY, quantized, RULES, axes=axes)
    assert placed(adapters, lora_jax.shardings(params, adapters))
    assert placed(adapters, lora_jax.shardings(quantized, adapters))
    merged = lora_jax.lora_merge(frozen, adapters)
    assert placed(merged, jax.tree.map(lambda x: x.sharding, params))
    again = lora_jax.lora_merge(frozen, adapters, requantize=True)
    assert placed(again, jax.tree.map(lambda x: x.sharding, {**quantized, "head": params["head"]}))


def test_a_pool_stays_where_its_base_is():
    plain, tree_of_specs, axes = base()
    params = on(mesh_of(), plain, tree_of_specs)
    _, adapters = lora_jax.lora_init(KEY, params, RULES, axes=axes)
    trees = {name: random_like(adapters, seed) for seed, name in enumerate("ab")}
    pool = lora_jax.AdapterPool(params, like=trees["a"], slots=2, load=trees.__getitem__)
    where = lora_jax.shardings(params, pool.stacked)

    @jax.jit
    def serve(params, stacked, ids):
        return lora_jax.lora_apply(Model(), {"params": params}, stacked, X, adapter_ids=ids)

    for names in ("ab", "ba", "a"):
        with pool.use([*names, *[None] * (8 - len(names))]) as (stacked, ids):
            assert placed(stacked, where)
            y = serve(params, stacked, ids)
    assert serve._cache_size() == 1
    frozen, _ = lora_jax.lora_init(KEY, params, RULES, axes=axes)
    alone = lora_jax.lora_apply(Model(), {"params": frozen}, trees["a"], X)
    assert relative_error(y[0], alone[0]) < 1e-5


@pytest.mark.parametrize("quantization", [None, lora_jax.Quantization("nf4", 4)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=["auto", "explicit"])
def test_a_step_is_that_of_one_device_and_leaves_all_in_its_place(kind, quantization):
    plain, tree_of_specs, axes = base()
    tx = optax.adam(1e-2)

    def step(adapters, state, frozen, x):
        def loss(adapters):
            return jnp.mean(jnp.sin(lora_jax.lora_apply(Model(), {"params": frozen}, adapters, x)))

        grads = jax.grad(loss)(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, grads

    def started(params):
        if quantization is not None:
            params = lora_jax.quantize(params, {"(?!head).*kernel": quantization}, axes=axes)
        frozen, adapters = lora_jax.lora_init(KEY, params, RULES, axes=axes)
        return random_like(adapters, scale=0.1), frozen

    adapters, frozen = started(plain)
    expected = jax.jit(step)(adapters, tx.init(adapters), frozen, X)
    mesh = mesh_of(kind)
    whole = NamedSharding(mesh, P())
    if kind == AxisType.Explicit:  # there the plain model contracts no sharded axes
        tree_of_specs = jax.tree_util.tree_map_with_path(
            lambda path, _: EXPLICIT.get(path[-2].key, P()) if path[-1].key == "kernel" else P(),
            plain,
        )
    with jax.set_mesh(mesh) if kind == AxisType.Explicit else contextlib.nullcontext():
        like, frozen = started(on(mesh, plain, tree_of_specs))
        where = lora_jax.shardings(
            frozen, lora_jax.lora_init(KEY, on(mesh, plain, tree_of_specs), RULES, axes=axes)[1]
        )
        adapters = jax.device_put(like, where)
        state = jax.tree.map(
            lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, whole),
            tx.init(adapters),
        )
        where_state = jax.tree.map(lambda x: x.sharding, state)
        assert placed(state[0].mu, where)
        run = jax.jit(step, out_shardings=(where, where_state, where))
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        new, new_state, grads = run(adapters, state, frozen, x)
        for tree, places in ((new, where), (new_state, where_state), (grads, where)):
            assert placed(tree, places)
        run(new, new_state, frozen, x)
        assert run._cache_size() == 1
    for one, other in zip(*map(jax.tree.leaves, ((new, grads), expected[::2])), strict=True):
        assert relative_error(one, other) < 1e-4


def gathered(tree, where):
    """What is cut inside of a `jax.shard_map`, whole; its gradient is summed up and cut again."""

    def one(x, sharding):
        for axis, names in enumerate(sharding.spec):
            if names is not None:
                x = jax.lax.all_gather(x, names, axis=axis, tiled=True)
        return x

    return jax.tree.map(one, tree, where)


def test_a_step_inside_of_shard_map():
    """Where devices say themselves what they send: each has its part of all arrays, as derived."""
    plain, tree_of_specs, axes = base()
    mesh, tx = mesh_of(), optax.adam(1e-2)
    frozen, start = lora_jax.lora_init(KEY, on(mesh, plain, tree_of_specs), RULES, axes=axes)
    where, where_frozen = (
        lora_jax.shardings(frozen, start),
        jax.tree.map(lambda x: x.sharding, frozen),
    )
    adapters = jax.device_put(random_like(start, scale=0.1), where)

    def loss(adapters, frozen, x):
        return jnp.mean(jnp.sin(lora_jax.lora_apply(Model(), {"params": frozen}, adapters, x)))

    def of_device(adapters, frozen, x):
        frozen = gathered(frozen, where_frozen)
        return jax.grad(lambda a: loss(gathered(a, where), frozen, x) / mesh.size)(adapters)

    def specs_of(tree):
        return jax.tree.map(lambda sharding: sharding.spec, tree)

    grads_of = jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(specs_of(where), specs_of(where_frozen), P(("data", "model"))),
        out_specs=specs_of(where),
    )

    @jax.jit
    def step(adapters, state, frozen, x):
        grads = grads_of(adapters, frozen, x)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, grads

    x = jax.device_put(X, NamedSharding(mesh, P(("data", "model"))))
    new, state, grads = step(adapters, tx.init(adapters), frozen, x)
    for tree in (new, grads, state[0].mu):
        assert placed(tree, where)
    alone = jax.tree.map(np.asarray, (adapters, frozen))
    expected = jax.jit(jax.grad(loss))(*alone, X)
    for one, other in zip(*map(jax.tree.leaves, (grads, expected)), strict=True):
        assert relative_error(one, other) < 1e-4


@pytest.mark.parametrize("kind", KINDS, ids=["auto", "explicit"])
def test_under_jit_nothing_is_on_one_device_first(kind):
    """Places are derived of shapes alone, and a compiled program makes each array in its place."""
    plain, tree_of_specs, axes = base()
    mesh = mesh_of(kind)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s)),
        plain,
        tree_of_specs,
    )
    init = functools.partial(lora_jax.lora_init, KEY, config=RULES, axes=axes)
    _, adapters = jax.eval_shape(init, shapes)
    where = lora_jax.shardings(shapes, adapters)
    where_frozen = jax.tree.map(lambda x: x.sharding, shapes)
    del where_frozen["head"]
    compiled = jax.jit(init, out_shardings=(where_frozen, where)).lower(shapes).compile()
    _, made = compiled(on(mesh, plain, tree_of_specs))
    assert placed(made, where)
    whole = jax.tree.map(lambda x, s: s.shard_shape(x.shape), adapters, where)
    assert sum(map(np.prod, jax.tree.leaves(whole, is_leaf=lambda x: isinstance(x, tuple)))) < sum(
        x.size for x in jax.tree.leaves(adapters)
    )


# --- what says it, and what does not ---


def dense(names=None, logical=False):
    wrap = nn.with_logical_partitioning if logical else nn.with_partitioning
    init = nn.initializers.lecun_normal()
    layer = nn.Dense(6, kernel_init=wrap(init, names) if names else init, use_bias=False)
    return layer.init(KEY, jnp.ones((1, 8)))["params"]


def adapters_of(params):
    return lora_jax.lora_init(KEY, params, LoraConfig([Rule("kernel", 2)]))[1]


def test_names_in_boxes():
    mesh = mesh_of()
    expected = {"U": ("data", None), "V": (None, "model")}

    def found(params, **kwargs):
        where = lora_jax.shardings(params, adapters_of(params), **kwargs)["kernel"]
        return {name: tuple(s.spec) for name, s in where.arrays.items()}

    assert found(dense(("data", "model")), mesh=mesh) == expected
    logical = dense(("embed", "mlp"), logical=True)
    with nn.logical_axis_rules([("embed", "data"), ("mlp", "model")]):
        assert found(logical, mesh=mesh) == expected
    kernel = nnx.with_partitioning(
        nnx.initializers.lecun_normal(), ("data", "model"), eager_sharding=False
    )
    layer = nnx.Linear(8, 6, kernel_init=kernel, rngs=nnx.Rngs(0))
    assert found(nnx.state(layer), mesh=mesh) == expected
    if hasattr(jax, "set_mesh"):
        params = dense(("data", "model"))
        with jax.set_mesh(mesh):
            assert found(params) == expected
    where = lora_jax.shardings(
        dense(("data", "model")), adapters_of(dense()), mesh=mesh, replicate=True
    )
    assert all(tuple(s.spec) == () for s in jax.tree.leaves(where))


def test_what_is_not_known_is_asked_for():
    params = dense()
    adapters, mesh = adapters_of(params), mesh_of()
    with pytest.raises(ValueError, match=r"Nothing says how 'kernel' is sharded.*mesh=mesh"):
        lora_jax.shardings(params, adapters)
    with pytest.raises(ValueError, match="Nothing says how 'kernel' is sharded"):
        lora_jax.shardings({"kernel": P("data")}, adapters)
    with pytest.raises(ValueError, match=r"'kernel' has the axes \('tensor', None\).*tensor"):
        lora_jax.shardings({"kernel": P("tensor", None)}, adapters, mesh=mesh)
    with pytest.raises(ValueError, match="'kernel' has 2 axes, and its sharding is for more"):
        lora_jax.shardings({"kernel": P("data", None, "model")}, adapters, mesh=mesh)
    with pytest.raises(ValueError, match="adapter for 'kernel', which frozen lacks"):
        lora_jax.shardings({"weight": P()}, adapters, mesh=mesh)
    with pytest.raises(ValueError, match=r"does not fit the kernel \(8, 7\)"):
        lora_jax.shardings({"kernel": jnp.ones((8, 7))}, adapters, mesh=mesh)
    with pytest.raises(TypeError, match="frozen must be a nested dict"):
        lora_jax.shardings(params["kernel"], adapters, mesh=mesh)
    with pytest.raises(TypeError, match=r"mesh must be a mesh, as of jax\.make_mesh"):
        lora_jax.shardings({"kernel": P()}, adapters, mesh=("data", "model"))


def test_one_device_that_was_chosen():
    device = jax.devices()[3]
    params = jax.device_put(dense(), device)
    adapters = adapters_of(params)
    assert {x.device for x in jax.tree.leaves(adapters)} == {device}
    assert not any(x.committed for x in jax.tree.leaves(adapters_of(dense())))


def test_leaves_fully_trained_in_a_stack():
    """The axis in front is whole, also where only specs are known."""
    params = {**dense(), "head": jnp.ones((8, 4))}
    config = LoraConfig([Rule("kernel", 2)], ["head"])
    _, adapters = lora_jax.lora_init(KEY, params, config)
    stacked = lora_jax.stack([adapters, adapters], params)
    specs = {"kernel": P("data", "model"), "head": P("data", "model")}
    where = lora_jax.shardings(specs, stacked, mesh=mesh_of())
    assert tuple(where["head"].spec) == (None, "data", "model")
    alone = lora_jax.shardings(specs, adapters, mesh=mesh_of())
    assert tuple(alone["head"].spec) == ("data", "model")
