"""A variant that says its arrays and its formula gets every layer and everything else."""

import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from helpers import random_like, relative_error
from variants import IA3, MORE, PROOFS, LoHa, LoKr, PiSSA, Rotation, VeRA

import lora_jax
from lora_jax.core.variants import _registry
from lora_jax.core.variants._check_variant import RESERVED

KERNELS = r"(.*/)?(kernel|embedding)"
EVERY = PROOFS | MORE


@pytest.fixture
def registered(monkeypatch):
    """The variants by their names, for as long as a test runs."""
    own = {name: cls for name, cls in _registry._VARIANTS.items() if "lora_jax" in cls.__module__}
    monkeypatch.setattr(_registry, "_VARIANTS", own)
    for variant in EVERY.values():
        lora_jax.register_variant(type(variant))


@pytest.mark.parametrize("variant", PROOFS.values(), ids=PROOFS)
def test_a_variant_is_twenty_lines(variant):
    lines = inspect.getsource(type(variant)).splitlines()
    code = [line for line in lines if line.strip() and '"""' not in line]
    assert len(code) <= 20


def trained_like(adapters, seed=3):
    """Numbers near the start: where a variant is not at zero, it is not far from there."""
    noise = random_like(adapters, seed=seed, scale=0.3)
    return jax.tree.map(lambda a, b: a + b, adapters, noise)


QUICK = ("scan, axis 1", "Embed, tied", "attention", "ConvTranspose", "bfloat16 compute")
WITH_ALL = ("compact",)


def of_every_layer():
    """Every case with one of the variants in turn, and some with all."""
    for i, name in enumerate(zoo.CASES):
        for j, variant in enumerate(PROOFS):
            if name in WITH_ALL or i % len(PROOFS) == j:
                marks = () if name in (*QUICK, *WITH_ALL) else [pytest.mark.slow]
                yield pytest.param(name, variant, marks=marks)


@pytest.mark.parametrize(("name", "variant"), list(of_every_layer()))
def test_every_layer(name, variant):
    """At the start nothing changes; then output and gradients are those of the merged model."""
    case = zoo.CASES[name]
    variables, x = case.init()
    rule = lora_jax.Rule(KERNELS, rank=2, alpha=3.0, variant=PROOFS[variant])
    frozen, adapters = lora_jax.lora_init_model(
        jax.random.key(2), case.model, variables, lora_jax.LoraConfig([rule]), x
    )
    rest = {name: tree for name, tree in variables.items() if name != "params"}
    tolerance = 1e-4 if case.exact else 8e-2  # merged kernels are rounded to 16 bits

    @jax.jit
    def adapted(adapters, x):
        return lora_jax.lora_apply(case.model, {**rest, "params": frozen}, adapters, x)

    @jax.jit
    def merged(adapters, x):
        params = lora_jax.lora_merge(frozen, adapters)
        return case.model.apply({**rest, "params": params}, x)

    plain = jax.jit(lambda x: case.model.apply(variables, x))(x)
    assert relative_error(adapted(adapters, x), plain) < tolerance
    noise = random_like(adapters, seed=3, scale=0.2)
    adapters = jax.tree.map(lambda a, b: 0.5 * a + b, adapters, noise)
    assert relative_error(adapted(adapters, x), merged(adapters, x)) < tolerance
    if case.exact:
        got, expected = (
            jax.grad(lambda adapters, f=f: jnp.sum(jnp.sin(f(adapters, x))))(adapters)
            for f in (adapted, merged)
        )
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert relative_error(one, other) < 1e-3


MODEL = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(4)])
X = random_like(jnp.zeros((4, 6)), seed=1, scale=1.0)
PARAMS = random_like(MODEL.init(jax.random.key(0), X)["params"], seed=2)


def made(variant, seed=0, rank=2, **rule):
    config = lora_jax.LoraConfig([lora_jax.Rule(".*kernel", rank, variant=variant, **rule)])
    frozen, adapters = lora_jax.lora_init(jax.random.key(seed), PARAMS, config)
    return frozen, trained_like(adapters, seed)


def applied(frozen, adapters, x=X, **kwargs):
    return lora_jax.lora_apply(MODEL, {"params": frozen}, adapters, x, **kwargs)


apply = jax.jit(applied)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.mark.parametrize("name", EVERY)
def test_saved_loaded_merged_and_reported(name, tmp_path, registered):
    variant = EVERY[name]
    frozen, adapters = made(variant, alpha=3.0)
    lora_jax.save(tmp_path / "a", adapters, frozen=frozen)
    again, loaded = lora_jax.load(tmp_path / "a", frozen, verify=True)
    same(loaded, adapters)
    same(again, frozen)
    merged = lora_jax.lora_merge(frozen, adapters)
    assert relative_error(MODEL.apply({"params": merged}, X), apply(frozen, adapters)) < 1e-5
    summary = lora_jax.summary(frozen, adapters)
    sizes = variant.shapes(6, 8, 2), variant.shapes(8, 4, 2)
    assert [row.trained for row in summary.rows] == [
        sum(map(np.prod, shapes.values())) for shapes in sizes
    ]
    assert {row.variant for row in summary.rows} == {name}
    cached = lora_jax.cache_norm(frozen, adapters)
    assert relative_error(apply(frozen, cached), apply(frozen, adapters)) < 1e-5


def test_settings_are_in_the_file(tmp_path, registered):
    frozen, adapters = made(VeRA(seed=7))
    lora_jax.save(tmp_path, adapters)
    _, loaded = lora_jax.load(tmp_path, PARAMS)
    assert loaded["layers_0"]["kernel"].variant == VeRA(seed=7)
    assert relative_error(apply(PARAMS, loaded), apply(frozen, made(VeRA(seed=8))[1])) > 1e-2


def test_a_variant_that_is_not_known_is_not_loaded(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no one could load it.*register_variant\(LoHa\)"):
        lora_jax.save(tmp_path, made(LoHa())[1])
    with monkeypatch.context() as patched:
        patched.setitem(_registry._VARIANTS, "loha", LoHa)
        lora_jax.save(tmp_path, made(LoHa())[1])
    with pytest.raises(ValueError, match=r"no variant 'loha'.*register_variant"):
        lora_jax.load(tmp_path, PARAMS)


def test_a_changed_base(tmp_path, registered):
    """PiSSA starts with the model's outputs, and is of no use on another base."""
    config = lora_jax.LoraConfig([lora_jax.Rule(".*kernel", 2, alpha=3.0, variant=PiSSA())])
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), PARAMS, config)
    assert relative_error(frozen["layers_0"]["kernel"], PARAMS["layers_0"]["kernel"]) > 1e-2
    plain = MODEL.apply({"params": PARAMS}, X)
    assert relative_error(apply(frozen, adapters), plain) < 1e-5
    for use in (
        lambda: applied(PARAMS, adapters),
        lambda: lora_jax.lora_merge(PARAMS, adapters),
        lambda: lora_jax.cache_norm(PARAMS, adapters),
        lambda: lora_jax.save(tmp_path, adapters, frozen=PARAMS),
        lambda: lora_jax.export(tmp_path / "m", PARAMS, adapters),
        lambda: lora_jax.combine([adapters], [1.0], params=PARAMS),
        lambda: lora_jax.AdapterPool(PARAMS, adapters, slots=2),
        lambda: applied(PARAMS, lora_jax.stack([adapters, adapters]), adapter_ids=1),
    ):
        with pytest.raises(ValueError, match="changed the base at the start"):
            use()
    with pytest.raises(ValueError, match="pass frozen="):
        lora_jax.save(tmp_path, adapters)
    lora_jax.save(tmp_path, adapters, frozen=frozen)
    with pytest.raises(ValueError, match=r"changed the base .* 'layers_0/kernel'"):
        lora_jax.load(tmp_path, PARAMS)
    with pytest.raises(ValueError, match=r"changed the base .* cannot share it"):
        lora_jax.stack([adapters, made("lora")[1]])
    with pytest.raises(ValueError, match="changed the base"):
        lora_jax.peft.save(tmp_path / "peft", frozen, adapters)


def test_saved_as_lora_or_dora_of_peft(tmp_path):
    """What has factors is, in PEFT's files, the LoRA or the DoRA that computes the same."""
    for name in ("fixed_magnitude", "vera", "ia3"):
        frozen, adapters = made(EVERY[name], alpha=3.0)
        lora_jax.peft.save(tmp_path / name, frozen, adapters)
        _, loaded = lora_jax.peft.load(tmp_path / name, PARAMS)
        kinds = {node["kernel"].kind for node in loaded.values()}
        assert kinds == {"lora" if name == "vera" else "dora"}
        assert relative_error(apply(frozen, loaded), apply(frozen, adapters)) < 1e-5
    for name in ("loha", "lokr"):
        with pytest.raises(ValueError, match="not a product of two factors"):
            lora_jax.peft.save(tmp_path / name, *made(EVERY[name]))


MIXED = ("lora", "dora", *PROOFS, *(name for name in MORE if name != "pissa"))


def several():
    alphas, ranks = (1.0, 3.0, 2.0, 4.0), (2, 1, 3)
    return [
        made(EVERY.get(name, name), seed=i, rank=ranks[i % 3], alpha=alphas[i % 4])[1]
        for i, name in enumerate(MIXED)
    ]


def test_mixed_in_one_batch():
    trees = several()
    stacked = lora_jax.stack(trees)
    alone = [apply(PARAMS, tree) for tree in trees]
    base = MODEL.apply({"params": PARAMS}, X)
    ids = np.array([*range(len(trees)), -1])
    x = jnp.concatenate([X, X])[: len(ids)]
    rows = [i % len(X) for i in range(len(ids))]
    got = apply(PARAMS, stacked, x, adapter_ids=ids)
    for i, row, y in zip(ids, rows, got, strict=True):
        assert relative_error(y, (base if i < 0 else alone[i])[row]) < 1e-5
    for adapter_ids in (2, jnp.array(2)):
        assert relative_error(apply(PARAMS, stacked, adapter_ids=adapter_ids), alone[2]) < 1e-5
    assert relative_error(apply(PARAMS, stacked, adapter_ids=-1), base) < 1e-6
    cached = lora_jax.cache_norm(PARAMS, stacked)
    assert relative_error(apply(PARAMS, cached, x, adapter_ids=ids), got) < 1e-5
    for tree, back in zip(trees, lora_jax.unstack(stacked), strict=True):
        same(back, tree)


@pytest.mark.parametrize(
    # With an epsilon that is above rounding errors, of which Adam would make steps.
    "optimizer",
    [
        optax.adamw(1e-2, eps=1e-2, weight_decay=0.1),
        pytest.param(optax.sgd(1e-3, 0.9), marks=pytest.mark.slow),
    ],
)
def test_each_takes_the_steps_that_it_takes_alone(optimizer):
    """In a mixed batch, whatever the variants, scales and ranks of the others."""
    trees = several()
    x = random_like(jnp.zeros((len(trees), 6)), seed=5, scale=1.0)

    def loss(adapters, x, **kwargs):
        return jnp.sum(jnp.sin(apply(PARAMS, adapters, x, **kwargs)))

    def run(adapters, optimizer, x, **kwargs):
        state = optimizer.init(adapters)

        @jax.jit
        def step(adapters, state):
            grads = jax.grad(loss)(adapters, x, **kwargs)
            updates, state = optimizer.update(grads, state, adapters)
            return optax.apply_updates(adapters, updates), state

        for _ in range(3):
            adapters, state = step(adapters, state)
        return adapters

    together = run(lora_jax.stack(trees), optimizer, x, adapter_ids=np.arange(len(trees)))
    for i, (tree, got) in enumerate(zip(trees, lora_jax.unstack(together), strict=True)):
        alone = run(tree, optimizer, x[i : i + 1])
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(alone), strict=True):
            assert relative_error(one, other) < 1e-4, MIXED[i]


@pytest.mark.slow
def test_a_hundred_adapters_are_one_trace():
    traces = []
    kinds = [*EVERY.values(), "lora", "dora"]
    kinds = [kind for kind in kinds if not isinstance(kind, PiSSA)]
    trees = [
        made(kinds[i % len(kinds)], seed=i, rank=1 + i % 3, alpha=1.0 + i % 5)[1]
        for i in range(100)
    ]
    stacked = lora_jax.stack(trees)

    @jax.jit
    def serve(stacked, ids):
        traces.append(None)
        return apply(PARAMS, stacked, adapter_ids=ids)

    for ids in ([0, 1, 2, 3], [97, 98, -1, 99]):
        got = serve(stacked, jnp.array(ids))
        for row, i in enumerate(ids):
            tree = [] if i < 0 else trees[i]
            expected = (apply(PARAMS, tree) if i >= 0 else MODEL.apply({"params": PARAMS}, X))[row]
            assert relative_error(got[row], expected) < 1e-5
    assert len(traces) == 1


def test_in_a_pool():
    trees = dict(zip(MIXED, several(), strict=True))
    pool = lora_jax.AdapterPool(PARAMS, list(trees.values()), slots=3, load=trees.__getitem__)
    traces = []

    @jax.jit
    def serve(stacked, ids):
        traces.append(None)
        return apply(PARAMS, stacked, adapter_ids=ids)

    for names in (["lora", "loha", None, "vera"], ["ia3", "dora", "ia3", "fixed_magnitude"]):
        with pool.use(names) as (stacked, ids):
            got = serve(stacked, ids)
        for row, name in enumerate(names):
            alone = apply(PARAMS, trees[name]) if name else MODEL.apply({"params": PARAMS}, X)
            assert relative_error(got[row], alone[row]) < 1e-5
    assert len(traces) == 1


def test_added_to_others():
    trees = several()
    weights = [0.5, -0.3, 1.0, 0.2, 0.7, 0.1, 0.4][: len(trees)]
    combined, _ = lora_jax.combine(trees, weights, params=PARAMS)
    expected = jax.tree.map(jnp.copy, PARAMS)
    for weight, tree in zip(weights, trees, strict=True):
        merged = lora_jax.lora_merge(PARAMS, tree)
        expected = jax.tree.map(lambda e, m, p, w=weight: e + w * (m - p), expected, merged, PARAMS)
    plain = MODEL.apply({"params": expected}, X)
    assert relative_error(apply(PARAMS, combined), plain) < 1e-4


@pytest.mark.parametrize("name", ["vera", "loha"])
def test_dropout_is_of_the_input_of_what_is_added(name):
    """In the mean over many masks the output of one layer is that without dropout."""
    model, x = nn.Dense(4), X
    params = {"kernel": PARAMS["layers_0"]["kernel"][:, :4], "bias": jnp.zeros(4)}
    config = lora_jax.LoraConfig([lora_jax.Rule("kernel", 2, variant=EVERY[name], dropout=0.5)])
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config)
    adapters = trained_like(adapters)

    def one(key):
        return lora_jax.lora_apply(model, {"params": frozen}, adapters, x, rngs={"dropout": key})

    many = jax.vmap(one)(jax.random.split(jax.random.key(1), 4000))
    plain = lora_jax.lora_apply(model, {"params": frozen}, adapters, x)
    base = model.apply({"params": params}, x)
    assert jnp.std(many, axis=0).max() > 0.05 * jnp.abs(plain - base).max()
    assert relative_error(many.mean(0) - base, plain - base) < 0.1


def test_arrays_of_three_axes_under_scan():
    case = zoo.CASES["scan, axis 1"]
    variables, x = case.init()
    rule = lora_jax.Rule(".*kernel", rank=1, variant=Rotation())
    frozen, adapters = lora_jax.lora_init_model(
        jax.random.key(2), case.model, variables, lora_jax.LoraConfig([rule]), x
    )
    adapters = trained_like(adapters)
    got = lora_jax.lora_apply(case.model, {"params": frozen}, adapters, x)
    merged = lora_jax.lora_merge(frozen, adapters)
    assert relative_error(got, case.model.apply({"params": merged}, x)) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="explicit axes are not complete")
def test_in_a_mesh_with_explicit_axes():
    trees = [made(EVERY.get(v, v), i, alpha=1.0 + i)[1] for i, v in enumerate(("dora", *PROOFS))]
    stacked, ids = lora_jax.stack(trees), jnp.arange(4)

    def loss(stacked, params, x, ids):
        y = apply(params, stacked, x, adapter_ids=ids)
        return jnp.sum(jnp.sin(y)), y

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    expected, y = gradient(stacked, PARAMS, X, ids)
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])

    def put(array, *spec):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return jax.device_put(array, sharding)

    with jax.set_mesh(mesh):
        params = {
            "layers_0": {
                "kernel": put(PARAMS["layers_0"]["kernel"], None, "model"),
                "bias": put(PARAMS["layers_0"]["bias"], "model"),
            },
            "layers_2": jax.tree.map(lambda x: put(x, *(None,) * x.ndim), PARAMS["layers_2"]),
        }
        x = put(X, "data", None)
        got, y_ = gradient(stacked, params, x, put(ids, "data"))
        assert relative_error(np.asarray(y_), y) < 1e-5
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert relative_error(np.asarray(one), other) < 1e-4
        alone = jax.jit(lambda params, x, i: apply(params, stacked, x, adapter_ids=i))
        assert relative_error(np.asarray(alone(params, x, jnp.int32(2)))[2], y[2]) < 1e-5


# --- what is refused ---


class Wrong(lora_jax.LoRA):
    """Its normal form, inherited, is another one than its formula."""

    name = "wrong"

    def kernel(self, W, s, U, V):
        return W * (1 + s * U @ V)


class Nameless(lora_jax.LoRA):
    pass


class Reserved(IA3):
    name = "reserved"

    def shapes(self, d, k, r):
        return {"rank": (k,)}


class Misshapen(IA3):
    name = "misshapen"

    def normal_form(self, W, s, l):  # noqa: E741
        return lora_jax.NormalForm(L=W, R=l)


class NoFormula(lora_jax.Variant):
    name = "no_formula"

    def shapes(self, d, k, r):
        return {"l": (k,)}

    def init(self, key, W, rule):
        return {"l": jnp.zeros(W.shape[1])}


class Undeclared(LoHa):
    """Its setting is not a field of a dataclass."""

    name = "undeclared"

    def __init__(self, seed):
        self.__dict__["seed"] = seed


class Undecorated(IA3):
    name = "undecorated"
    seed: int = 0


class Restarted(IA3):
    """Which does not start as W."""

    name = "restarted"

    def init(self, key, W, rule):
        return {"l": jnp.zeros(W.shape[1])}


class Tuple(IA3):
    name = "tuple"

    def normal_form(self, W, s, l):  # noqa: E741
        return (l, None, None)


class Integers(IA3):
    name = "integers"

    def init(self, key, W, rule):
        return {"l": jnp.ones(W.shape[1], int)}


class Tupled(IA3):
    name = "tupled"

    def init(self, key, W, rule):
        return (jnp.ones(W.shape[1]),)


@pytest.mark.parametrize(
    ("variant", "kind", "message"),
    [
        (Undeclared(1), TypeError, "Undeclared: 'seed' is not one of its settings.*Decorate"),
        (Undecorated(), TypeError, "Undecorated: 'seed' is not one of its settings"),
        (Restarted(), ValueError, "Restarted: at the start W' is not W"),
        (Tuple(), TypeError, r"Tuple.normal_form\(\) must give a lora_jax.NormalForm.*got tuple"),
        (Tupled(), TypeError, r"Tupled.init\(\) must give a dict of arrays, \['l'\], got tuple"),
        (Integers(), ValueError, "gives int32 for 'l': it must be floating-point"),
        (Wrong(), ValueError, r"Wrong: normal_form\(\) gives another W' than kernel\(\)"),
        (Nameless(), ValueError, "has the name 'lora' of LoRA: give it its own"),
        (Reserved(), ValueError, "an array cannot have the name 'rank'"),
        (Misshapen(), ValueError, r"Misshapen.normal_form\(\): for a kernel"),
        (NoFormula(), TypeError, r"NoFormula gives neither kernel\(\) nor normal_form\(\)"),
        (VeRA(seed=np.zeros(2)), TypeError, "VeRA: the setting seed must be a number"),
    ],
)
def test_what_is_not_a_variant(variant, kind, message):
    with pytest.raises(kind, match=message):
        lora_jax.Rule("kernel", 1, variant=variant)


def test_init_must_give_what_shapes_says():
    class Other(IA3):
        name = "other"

        def init(self, key, W, rule):
            return {"l": jnp.ones(W.shape[0])}

    with pytest.raises(ValueError, match=r"Other.init\(\) gives arrays of the shapes"):
        made(Other())


def test_names_are_taken_once(registered):
    with pytest.raises(ValueError, match="There is a variant 'loha' already"):

        @lora_jax.register_variant
        class Mine(LoKr):
            name = "loha"

    with pytest.raises(TypeError, match=r"derived from lora_jax\.Variant"):
        lora_jax.register_variant(LoHa())


def test_a_row_of_a_stack_must_say_which_it_is():
    """Inside of jax.vmap a stack is for adapters that are alike."""
    lora, dora = made("lora")[1], made("dora")[1]
    two, three = made("lora", rank=2)[1], made("lora", seed=1, rank=3)[1]
    got = jax.vmap(functools.partial(apply, PARAMS))(lora_jax.stack([two, three]))
    for one, tree in zip(got, (two, three), strict=True):
        assert relative_error(one, apply(PARAMS, tree)) < 1e-5
    with pytest.raises(
        ValueError, match=r"'layers_0/kernel' in a stack differ in variant.*unstack"
    ):
        jax.vmap(functools.partial(apply, PARAMS))(lora_jax.stack([lora, dora]))
    with pytest.raises(ValueError, match="differ in scale"):
        jax.tree.map(lambda x: x[0], lora_jax.stack([two, made("lora", alpha=5.0)[1]]))["layers_0"][
            "kernel"
        ].one("layers_0/kernel")


def test_rates_of_dropout_stay_with_their_adapters():
    none, half = made("lora")[1], made("lora", dropout=0.5)[1]
    stacked = lora_jax.stack([none, half])
    key = {"dropout": jax.random.key(3)}
    got = apply(PARAMS, stacked, adapter_ids=np.array([0, 0, 1, -1]), rngs=key)
    off = apply(PARAMS, stacked, adapter_ids=np.array([0, 0, 1, -1]))
    assert relative_error(got[:2], off[:2]) < 1e-6
    assert relative_error(got[3], off[3]) < 1e-6
    assert relative_error(got[2], off[2]) > 1e-3
    same_rate = applied(PARAMS, stacked, adapter_ids=0, rngs=key)
    assert relative_error(same_rate, apply(PARAMS, none)) < 1e-6
    with pytest.raises(ValueError, match="does not say which rate"):
        apply(PARAMS, stacked, adapter_ids=0, rngs=key)


# --- what a reader found ---


class Tanh(lora_jax.LoRA):
    """A LoRA whose product is bounded: no product of factors any more."""

    name = "tanh"

    def kernel(self, W, s, U, V):
        return W + s * jnp.tanh(U @ V)

    def normal_form(self, W, s, U, V):
        return None


class Logarithmic(lora_jax.DoRA):
    """A DoRA that keeps the logarithm of its magnitude."""

    name = "logarithmic"

    def init(self, key, W, rule):
        arrays = super().init(key, W, rule)
        return arrays | {"m": jnp.log(arrays["m"])}

    def kernel(self, W, s, U, V, m):
        return super().kernel(W, s, U, V, jnp.exp(m))

    def normal_form(self, W, s, U, V, m):
        return super().normal_form(W, s, U, V, jnp.exp(m))

    def exact_normal_form(self, W, s, U, V, m):
        return super().exact_normal_form(W, s, U, V, jnp.exp(m))


class ByShape(lora_jax.LoRA):
    """Its normal form is another one for tall kernels."""

    name = "by_shape"

    def kernel(self, W, s, U, V):
        return W + s * (1 if W.shape[0] <= W.shape[1] else 2) * U @ V

    def normal_form(self, W, s, U, V):
        return lora_jax.NormalForm(None, U, V if W.shape[0] <= W.shape[1] else 2 * V)


class Gated(lora_jax.Variant):
    """With an array of no axes."""

    name = "gated"

    def shapes(self, d, k, r):
        return {"U": (d, r), "V": (r, k), "g": ()}

    def init(self, key, W, rule):
        U, V = self.init_factors(key, W, rule)
        return {"U": U, "V": V, "g": 1.0}

    def normal_form(self, W, s, U, V, g):
        return lora_jax.NormalForm(None, g * U, V)


class Root(lora_jax.Variant):
    """Which is not real where g is negative."""

    name = "root"

    def shapes(self, d, k, r):
        return {"g": (k,)}

    def init(self, key, W, rule):
        return {"g": jnp.ones(W.shape[1])}

    def normal_form(self, W, s, g):
        return lora_jax.NormalForm(jnp.sqrt(g))


class OfAnyShape(IA3):
    name = "of_any_shape"

    def init(self, key, W, rule):
        return {"l": np.ones(W.shape[1])}  # float64


@pytest.mark.parametrize(
    "variant",
    [
        Tanh(),
        Logarithmic(),
        Gated(),
        *(pytest.param(v, marks=pytest.mark.slow) for v in (ByShape(), Root(), OfAnyShape())),
    ],
    ids=lambda v: v.name,
)
def test_every_way_is_that_of_the_formula(variant):
    """The layer, the sums, stacks, cached norms: also of what derives from LoRA and DoRA."""
    _, one = made(variant, alpha=3.0)
    one = jax.tree.map(lambda a: jnp.abs(a) if variant.name == "root" else a, one)
    assert {leaf.dtype for leaf in jax.tree.leaves(one)} == {jnp.dtype("float32")}
    _, lora = made("lora", seed=1)
    merged = lora_jax.lora_merge(PARAMS, one)
    plain = MODEL.apply({"params": merged}, X)
    assert relative_error(apply(PARAMS, one), plain) < 1e-5
    assert relative_error(apply(PARAMS, lora_jax.cache_norm(PARAMS, one)), plain) < 1e-5
    stacked = lora_jax.stack([lora, one])
    assert relative_error(apply(PARAMS, stacked, adapter_ids=1), plain) < 1e-5
    assert relative_error(apply(PARAMS, stacked, adapter_ids=np.full(4, 1)), plain) < 1e-5
    summed, _ = lora_jax.combine([one, one], [0.5, 0.7], params=PARAMS)
    change = jax.tree.map(lambda W, W_: W + 1.2 * (W_ - W), PARAMS, merged)
    assert relative_error(apply(PARAMS, summed), MODEL.apply({"params": change}, X)) < 1e-5


def test_an_unknown_id_gives_nan_whatever_the_members_are():
    stacked = lora_jax.stack([made("lora", rank=1)[1], made("lora", alpha=7.0)[1], made("dora")[1]])
    serve = jax.jit(lambda i: apply(PARAMS, stacked, adapter_ids=i))
    for i in (3, 99, -5):
        assert jnp.isnan(serve(jnp.int32(i))).all()
    assert jnp.isfinite(serve(jnp.int32(-1))).all()


class Tied(nn.Module):
    @nn.compact
    def __call__(self, x):
        embed = nn.Embed(11, 6, name="embed")
        return nn.tanh(embed(x)) @ embed.embedding.T


def test_a_tied_kernel_is_not_changed_for_its_other_readers():
    x = jnp.arange(4)
    variables = Tied().init(jax.random.key(0), x)
    rule = lora_jax.Rule(".*embedding", 2, variant=PiSSA(), tied="untie")
    config = lora_jax.LoraConfig([rule])
    with pytest.raises(ValueError, match=r"'embed/embedding' is tied.*tied='materialize'"):
        lora_jax.lora_init_model(jax.random.key(0), Tied(), variables, config, x)


def test_what_is_made_of_a_changed_base_stays_bound_to_it(tmp_path, registered):
    config = lora_jax.LoraConfig([lora_jax.Rule(".*kernel", 2, variant=PiSSA())])
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), PARAMS, config)
    frozen_by_jit, by_jit = jax.jit(lambda p: lora_jax.lora_init(jax.random.key(0), p, config))(
        PARAMS
    )
    summed, _ = lora_jax.combine([adapters, adapters], [0.5, 0.5], params=frozen)
    cached = lora_jax.cache_norm(frozen, adapters)
    jitted = lora_jax.cache_norm(frozen_by_jit, by_jit)
    for i, tree in enumerate((summed, cached, jitted)):
        base = frozen_by_jit if tree is jitted else frozen
        with pytest.raises(ValueError, match="pass frozen="):
            lora_jax.save(tmp_path / str(i), tree)
        lora_jax.save(tmp_path / str(i), tree, frozen=base)
        with pytest.raises(ValueError, match="changed the base"):
            lora_jax.load(tmp_path / str(i), PARAMS)
        _, loaded = lora_jax.load(tmp_path / str(i), base)
        assert relative_error(apply(base, loaded), apply(base, tree)) < 1e-6
        with pytest.raises(ValueError, match="changed the base"):
            lora_jax.peft.save(tmp_path / f"peft{i}", base, tree)
    with pytest.raises(ValueError, match="base_hash"):
        lora_jax.combine([adapters, made("lora")[1]], [1.0, 1.0], params=frozen)


class Branching(IA3):
    name = "branching"

    def normal_form(self, W, s, l):  # noqa: E741
        return lora_jax.NormalForm(l if s > 0 else -l)


def test_a_scale_may_be_an_array():
    with pytest.raises(ValueError, match="cannot take the scale s as an array"):
        lora_jax.Rule("kernel", 1, variant=Branching())


def test_a_setting_is_of_the_type_of_its_default():
    with pytest.raises(TypeError, match="d_initial must be float, as its default is, got 1"):
        lora_jax.Rule("kernel", 1, variant=VeRA(d_initial=1))


@pytest.mark.parametrize("kind", [lora_jax.Adapter, lora_jax.AdapterStack])
def test_no_array_has_the_name_of_something_else(kind):
    public = {name for name in dir(kind) if not name.startswith("_")}
    assert public <= RESERVED | {"variant"}
