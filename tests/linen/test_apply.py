"""The adapted model equals the model with the explicit W', for every layer and way to hold it."""

import functools
import math
import types

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import zoo
from flax.traverse_util import flatten_dict
from helpers import checking_leaks, dense_case, random_like, random_variables, relative_error
from jax import export

import lora_jax

KERNELS = r"(.*/)?(kernel|embedding)"
VARIANTS = {
    "lora": {"variant": "lora", "rank": 2, "alpha": 3.0},
    "rslora": {"variant": "lora", "rank": 3, "rslora": True, "zero": "V"},
    "dora": {"variant": "dora", "rank": 2, "alpha": 3.0},
    "dora detached": {"variant": "dora", "rank": 1, "detach_norm": True, "zero": "V"},
}


def explicit_kernel(kernel, adapter, axes, variant):
    """W' from the papers' formulas, on a stack of matrices; nothing here is the library's."""
    rank, (inputs, outputs, stacks) = variant["rank"], axes
    s = variant.get("alpha", rank) / (rank**0.5 if variant.get("rslora") else rank)
    order = (*stacks, *inputs, *outputs)
    front = jnp.transpose(kernel.astype(jnp.float32), order)
    n, d, k = (math.prod(kernel.shape[axis] for axis in some) for some in axes[2:] + axes[:2])
    U, V = (jnp.reshape(a, (n, *a.shape[-2:])) for a in (adapter.U, adapter.V))
    W = jnp.reshape(front, (n, d, k)) + s * (U @ V)
    if adapter.m is not None:
        norm = jnp.sqrt((W**2).sum(1, keepdims=True))
        W = W / (jax.lax.stop_gradient(norm) if variant.get("detach_norm") else norm)
        W = W * jnp.reshape(adapter.m, (n, 1, k))
    whole = jnp.reshape(W, front.shape)
    return jnp.transpose(whole, [order.index(axis) for axis in range(len(order))])


def explicit_params(params, adapters, variant, case):
    variant = VARIANTS[variant]

    def walk(params, adapters, path):
        out = {}
        for name, value in params.items():
            here = f"{path}/{name}"
            if isinstance(value, dict):
                out[name] = walk(value, adapters.get(name, {}), here)
            elif name in adapters:
                axes = zoo.CASES[case].axes_of(here, jax.tree.leaves(value)[0].ndim)
                out[name] = jax.tree.map(
                    lambda W, name=name, axes=axes: explicit_kernel(
                        W, adapters[name], axes, variant
                    ).astype(W.dtype),
                    value,
                )
            else:
                out[name] = value
        return out

    return walk(flax.core.unfreeze(params), flax.core.unfreeze(adapters), "")


@functools.cache
def setup(name, variant):
    case, variant = zoo.CASES[name], VARIANTS[variant]
    variables, x = case.init()
    params = variables["params"]
    params = flax.core.freeze(params) if case.freeze else params
    config = lora_jax.LoraConfig([lora_jax.Rule(KERNELS, **variant)])
    axes = lora_jax.kernel_axes(case.model, {**variables, "params": params}, x)
    frozen, adapters = lora_jax.lora_init(jax.random.key(2), params, config, axes=axes)
    rest = {name: value for name, value in variables.items() if name != "params"}
    return types.SimpleNamespace(
        variant=variant,
        exact=case.exact,
        bitwise=case.bitwise,
        axes=axes,
        x=x,
        params=params,
        frozen=frozen,
        adapters=adapters,
        trained=random_like(adapters),
        base=jax.jit(lambda params, x: case.model.apply({**rest, "params": params}, x)),
        adapted=lambda frozen, adapters, x: lora_jax.lora_apply(
            case.model, {**rest, "params": frozen}, adapters, x
        ),
    )


# What these test in one model, or in another dtype, quicker cases test alone.
SLOW = (
    "many batch axes",
    "subclass",
    "remat of blocks",
    "scan, axis -1",
    "bfloat16 parameters and input",
    "bfloat16 parameters, float32 compute",
    "Conv, 1-D",
    "Conv, 1 x 1",
    "Conv, 3-D",
    "Conv, depthwise",
    "Conv, no batch",
    "ConvLocal, 1-D",
    "ConvTranspose, no batch, bfloat16",
    "Embed, tied, in bfloat16",
    "every layer, jit",
    "scan of scan, axes 1, 1",
    "jit of remat",
    "Conv, remat and jit",
    "attention in bfloat16",
    "float16 compute",
    "Conv, bfloat16 parameters",
    "ConvTranspose, bfloat16 parameters",
    "Einsum, bfloat16 parameters",
    "Embed, bfloat16 parameters",
    "every layer, scan, axis 1, remat",
    "every layer, vmap, axis -1",
    "attention, scan, axis -1, remat",
    "attention, bfloat16 parameters",
)


# Where `make test` has LoRA too, which is a part of DoRA: one of each kind of layer and transform.
WITH_LORA = (
    "compact",
    "jit of Dense",
    "vmap, axis 1",
    "scan, axis 1",
    "bfloat16 compute",
    "DenseGeneral, two outputs",
    "Einsum, stack last, with bias",
    "Conv, 2-D",
    "ConvTranspose",
    "ConvLocal, 2-D",
    "Embed",
    "Embed, tied",
)


def is_slow(case, variant):
    return case in SLOW or (variant == "lora" and case not in WITH_LORA)


every_case = pytest.mark.parametrize(
    ("case", "variant"),
    [
        pytest.param(case, variant, marks=[pytest.mark.slow] if is_slow(case, variant) else ())
        for case in zoo.CASES
        for variant in (("dora",) if case in SLOW else ("lora", "dora"))
    ]
    + [
        (case, variant)
        for case in ("compact", "Embed, tied")
        for variant in ("rslora", "dora detached")
    ],
)


@pytest.mark.parametrize("case", zoo.CASES)
def test_axes_of_every_kernel(case):
    s, axes_of = setup(case, "lora"), zoo.CASES[case].axes_of
    kernels = {
        path: jax.tree.leaves(leaf)[0].ndim
        for path, leaf in flatten_dict(flax.core.unfreeze(s.params), sep="/").items()
        if path.endswith(("kernel", "embedding"))
    }
    found = {path: (axes.inputs, axes.outputs, axes.batch) for path, axes in s.axes.items()}
    assert found == {path: axes_of(path, ndim) for path, ndim in kernels.items()}
    assert not s.axes.tied
    assert not s.axes.refused


@every_case
def test_starts_as_no_op_and_equals_merged_model(case, variant):
    s = setup(case, variant)
    adapted = jax.jit(s.adapted)
    base, start = s.base(s.params, s.x), adapted(s.frozen, s.adapters, s.x)
    assert (start.dtype, start.shape) == (base.dtype, base.shape)
    if s.variant["variant"] == "lora" and s.bitwise:
        assert jnp.array_equal(start, base)
    else:
        assert relative_error(start, base) < 1e-6

    merged = jax.jit(lora_jax.lora_merge)(s.frozen, s.trained)
    assert jax.tree.structure(merged) == jax.tree.structure(s.params)
    explicit = jax.jit(explicit_params, static_argnums=(2, 3))(s.params, s.trained, variant, case)
    for got, expected in zip(jax.tree.leaves(merged), jax.tree.leaves(explicit), strict=True):
        assert got.dtype == expected.dtype
        assert relative_error(got, expected) < (1e-6 if s.exact else 1e-2)
    y = adapted(s.frozen, s.trained, s.x)
    assert relative_error(y, base) > 1e-2
    assert relative_error(y, s.base(merged, s.x)) < (1e-5 if s.exact else 5e-2)


@every_case
def test_gradient_equals_that_through_the_explicit_kernel(case, variant):
    s = setup(case, variant)
    weights = random_like(jnp.zeros(jax.eval_shape(s.base, s.params, s.x).shape), seed=4)

    @jax.jit
    @jax.grad
    def ours(adapters):
        return jnp.vdot(weights, s.adapted(s.frozen, adapters, s.x).astype(jnp.float32))

    @jax.jit
    @jax.grad
    def explicit(adapters):
        params = explicit_params(s.params, adapters, variant, case)
        return jnp.vdot(weights, s.base(params, s.x).astype(jnp.float32))

    with checking_leaks():
        grads = ours(s.trained)
    for (path, grad), expected in zip(
        jax.tree_util.tree_leaves_with_path(grads),
        jax.tree.leaves(explicit(s.trained)),
        strict=True,
    ):
        assert relative_error(grad, expected) < (1e-4 if s.exact else 1e-1), path
        assert jnp.abs(grad).max() > 0, path


@pytest.mark.parametrize("case", ["compact", "jit of Dense", "jit of blocks", "jit of a method"])
def test_called_again_without_a_new_trace(case):
    """What nn.jit has in its cache is not traced again, and still counts as used."""
    s = setup(case, "dora")
    first = s.adapted(s.frozen, s.adapters, s.x)
    assert jnp.array_equal(s.adapted(s.frozen, s.adapters, s.x), first)
    assert relative_error(s.adapted(s.frozen, s.trained, s.x), first) > 1e-2


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("shape", [(0, 6), (3, 0, 6)])
def test_empty_batch(variant, shape):
    model, x = zoo.Compact(), jnp.zeros(shape)
    frozen, adapters = dense_case(model, x, variant=variant)

    def loss(adapters):
        return lora_jax.lora_apply(model, {"params": frozen}, adapters, x).sum()

    assert lora_jax.lora_apply(model, {"params": frozen}, adapters, x).shape == (*shape[:-1], 6)
    grads = jax.grad(loss)(adapters)
    assert all((grad == 0).all() for grad in jax.tree.leaves(grads))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("detach_norm", [False, True])
@pytest.mark.parametrize("zero", ["U", "V"])
def test_all_zero_columns(dtype, detach_norm, zero):
    model, x = nn.Dense(5, dtype=dtype, param_dtype=dtype), jnp.ones((3, 4), dtype)
    params = model.init(jax.random.key(0), x)["params"]
    params["kernel"] = params["kernel"].at[:, 1:3].set(0)
    rule = lora_jax.Rule("kernel", 2, variant="dora", detach_norm=detach_norm, zero=zero)
    frozen, adapters = lora_jax.lora_init(jax.random.key(1), params, lora_jax.LoraConfig([rule]))

    @jax.jit
    @jax.value_and_grad
    def loss(adapters):
        y = lora_jax.lora_apply(model, {"params": frozen}, adapters, x)
        return jnp.mean((y.astype(jnp.float32) - 1.0) ** 2)

    values = []
    for _ in range(50):
        value, grads = loss(adapters)
        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves((value, grads)))
        adapters = jax.tree.map(lambda a, g: a - 0.1 * g, adapters, grads)
        values.append(float(value))
    merged = lora_jax.lora_merge(frozen, adapters)["kernel"]
    assert jnp.isfinite(merged).all()
    if zero == "U":
        assert jnp.abs(merged[:, 1:3]).max() > 0, "a zero column must be able to learn"
    assert values[-1] < values[0]


def test_magnitude_below_the_resolution_of_bfloat16():
    """m / norm = 1 + 1/384 rounds to 1 in bfloat16; over many outputs some must still change."""
    ratio = 1 + 1 / 384
    assert jnp.bfloat16(ratio) == 1
    model, x = nn.Dense(999, dtype=jnp.bfloat16, use_bias=False), jnp.ones((1, 64))
    frozen, adapters = dense_case(model, x, variant="dora")
    start = jax.tree.map(jnp.zeros_like, adapters["kernel"])
    norm = jnp.linalg.norm(frozen["kernel"], axis=0)

    def y(m):
        return lora_jax.lora_apply(model, {"params": frozen}, {"kernel": start.replace(m=m)}, x)

    assert jnp.array_equal(y(norm), model.apply({"params": frozen}, x))
    assert 0.2 < jnp.mean(y(ratio * norm) != y(norm)) < 0.9


def test_base_of_another_dtype_is_not_copied_to_float32():
    """Adapters are float32 whatever the base is; the base keeps its dtype."""
    model, x = nn.Dense(5, param_dtype=jnp.bfloat16), jnp.ones((2, 4))
    frozen, adapters = dense_case(model, x, variant="dora")
    assert frozen["kernel"].dtype == jnp.bfloat16
    assert {a.dtype for a in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}


def test_other_collections_pass_through():
    model, x = zoo.Normed(), jax.random.normal(jax.random.key(0), (4, 6))
    variables = model.init(jax.random.key(0), x)
    config = lora_jax.LoraConfig([lora_jax.Rule(".*kernel", rank=2)])
    frozen, adapters = lora_jax.lora_init(jax.random.key(1), variables["params"], config)
    adapted = {**variables, "params": frozen}
    for mutable in (False, ["batch_stats"], ["batch_stats", "intermediates"], True, "params"):
        for capture in (False, True):
            if capture and not mutable:
                continue
            options = {"mutable": mutable, "capture_intermediates": capture}
            expected = model.apply(variables, x, train=mutable is True, **options)
            got = lora_jax.lora_apply(model, adapted, adapters, x, train=mutable is True, **options)
            assert jax.tree.structure(got) == jax.tree.structure(expected)
            same = jax.tree.map(lambda a, b: jnp.array_equal(a, b), got, expected)
            assert all(jax.tree.leaves(same)), options


def test_dropout_acts_on_the_input_of_the_factors():
    """One unit input: either its row of U V is there, scaled by 1 / (1 - rate), or it is not."""
    model = nn.Dense(3, use_bias=False)
    x = jnp.zeros((4000, 5)).at[:, 2].set(1.0)
    frozen, adapters = dense_case(model, x, dropout=0.25)
    y = lora_jax.lora_apply(
        model, {"params": frozen}, adapters, x, rngs={"dropout": jax.random.key(0)}
    )
    delta = (adapters["kernel"].U @ adapters["kernel"].V)[2] / 0.75
    kept = jnp.isclose(y, frozen["kernel"][2] + delta, atol=1e-5).all(-1)
    dropped = jnp.isclose(y, frozen["kernel"][2], atol=1e-5).all(-1)
    assert (kept != dropped).all()
    assert abs(float(kept.mean()) - 0.75) < 0.03


@pytest.mark.parametrize("split", [True, False, None])
def test_dropout_in_scan(split):
    rngs = {"params": True} if split is None else {"params": True, "dropout": split}
    model = nn.scan(zoo.Block, {"params": 0}, split_rngs=rngs, length=3)()
    x = jnp.ones((2, zoo.WIDTH))
    params = model.init(jax.random.key(0), x, None)["params"]
    rule = lora_jax.Rule(".*kernel", rank=2, dropout=0.5, batch_axes=(0,))
    frozen, adapters = lora_jax.lora_init(jax.random.key(1), params, lora_jax.LoraConfig([rule]))
    adapters = random_like(adapters)

    def apply(**kwargs):
        return lora_jax.lora_apply(model, {"params": frozen}, adapters, x, None, **kwargs)[0]

    rngs = {"dropout": jax.random.key(0)}
    if split is None:
        with pytest.raises(ValueError, match=r"up.*split_rngs=\{'dropout': True\}"):
            apply(rngs=rngs)
    else:
        assert relative_error(apply(rngs=rngs), apply()) > 1e-3


def test_dropout_switches_inside_jit():
    """nn.jit must trace again when dropout goes on or off."""
    model, x = zoo.Compact(nn.jit(nn.Dense)), jnp.ones((3, 6))
    frozen, adapters = dense_case(model, x, dropout=0.5)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic=False):
            return zoo.Compact(nn.jit(nn.Dense), name="inner")(x)

    def apply(deterministic):
        return lora_jax.lora_apply(
            Outer(),
            {"params": {"inner": frozen}},
            {"inner": adapters},
            x,
            deterministic=deterministic,
            rngs={"dropout": jax.random.key(0)},
        )

    on, off = apply(False), apply(True)
    assert relative_error(on, off) > 1e-2
    assert jnp.array_equal(apply(False), on)


def test_jit_of_a_layer_that_two_methods_reach():
    """The second method hits the cache of nn.jit, where the first one was traced."""
    layer = nn.jit(nn.Dense)

    class Model(nn.Module):
        def setup(self):
            self.encoder = layer(6)

        def __call__(self, x):
            return self.encoder(x)

        def encode(self, x):
            return self.encoder(x) + 1

    model, x = Model(), jnp.ones((2, 6))
    frozen, adapters = dense_case(model, x)
    y = lora_jax.lora_apply(model, {"params": frozen}, adapters, x)
    encoded = lora_jax.lora_apply(model, {"params": frozen}, adapters, x, method="encode")
    assert jnp.array_equal(encoded, y + 1)


def test_complex_inputs():
    model, x = nn.Dense(5), jnp.ones((3, 6)) * jnp.array(1 + 2j)
    frozen, adapters = dense_case(model, x, variant="dora")
    merged = model.apply({"params": lora_jax.lora_merge(frozen, adapters)}, x)
    y = lora_jax.lora_apply(model, {"params": frozen}, adapters, x)
    assert jnp.abs(y - merged).max() < 1e-5 * jnp.abs(merged).max()


# --- errors ---


def init(model, x):
    frozen, adapters = dense_case(model, x)
    return {"params": frozen}, adapters


def test_adapters_of_another_model():
    model, x = zoo.Parts(), jnp.ones((2, 6))
    variables, adapters = init(model, x)
    other, other_adapters = init(zoo.Compact(), x)
    with pytest.raises(ValueError, match=r"'first/kernel'.*another model.*Nearest.*head/kernel"):
        lora_jax.lora_apply(model, variables, other_adapters, x)
    with pytest.raises(ValueError, match=r"another model"):
        lora_jax.lora_apply(zoo.Compact(), other, adapters, x)


def test_adapters_that_do_not_fit():
    model, x = zoo.Parts(), jnp.ones((2, 6))
    variables, adapters = init(model, x)
    good = adapters["head"]["kernel"]
    adapters["head"]["kernel"] = good.replace(V=jnp.ones((2, 4)))
    match = r"'head/kernel' does not fit the kernel \(6, 3\): V is \(2, 4\), but should be \(2, 3\)"
    with pytest.raises(ValueError, match=match):
        lora_jax.lora_apply(model, variables, adapters, x)
    with pytest.raises(ValueError, match=match):
        lora_jax.lora_merge(variables["params"], adapters)
    adapters["head"]["kernel"] = good
    adapters["new"] = "U"
    with pytest.raises(TypeError, match=r"'U' at 'new'.*neither an adapter nor an array"):
        lora_jax.lora_apply(model, variables, adapters, x)


@pytest.mark.parametrize("batch_axes", [(0,), (-1,)])
def test_batch_axes_that_are_not_those_of_the_scan(batch_axes):
    model, x = zoo.Scan(1), jnp.ones((2, zoo.WIDTH))
    params = random_variables(model, x)["params"]
    rule = lora_jax.Rule(".*down/kernel", rank=3, batch_axes=batch_axes)
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, lora_jax.LoraConfig([rule]))
    with pytest.raises(
        ValueError, match=r"'blocks/down/kernel' the kernel is \(9, 6\).*batch_axes="
    ):
        lora_jax.lora_apply(model, {"params": frozen}, adapters, x)


def test_arguments_in_the_wrong_place():
    model, x = zoo.Parts(), jnp.ones((2, 6))
    variables, adapters = init(model, x)
    with pytest.raises(ValueError, match=r"\{'params': params\}"):
        lora_jax.lora_apply(model, variables["params"], adapters, x)
    with pytest.raises(TypeError, match=r"flax\.linen.*model\.module.*got function"):
        lora_jax.lora_apply(model.apply.__func__, variables, adapters, x)
    with pytest.raises(TypeError, match=r"adapters must be a nested dict.*tuple"):
        lora_jax.lora_apply(model, variables, (adapters,), x)
    trained = {**adapters, "encoder": {"bias": jnp.ones(6)}}
    with pytest.raises(ValueError, match=r"'encoder/bias' is in the base and"):
        lora_jax.lora_apply(model, variables, trained, x)


def test_variables_that_come_back_are_the_base():
    """Adapters are taken out of them, and what was materialized is as it was given."""
    model, x = zoo.Compact(), jnp.ones((3, 6))
    params = random_variables(model, x)["params"]
    rules = [lora_jax.Rule("first/kernel", 2), lora_jax.Rule("second/kernel", 2, materialize=True)]
    config = lora_jax.LoraConfig(rules, trainable=["second/bias"])
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config)
    adapters = random_like(adapters)
    _, updates = lora_jax.lora_apply(model, {"params": frozen}, adapters, x, mutable=True)
    expected = {**params, "second": {**params["second"], "bias": adapters["second"]["bias"]}}
    assert jax.tree.all(jax.tree.map(jnp.array_equal, updates["params"], expected))


def test_adapters_saved_with_another_variant():
    model, x = nn.Dense(5), jnp.ones((2, 6))
    frozen, lora = dense_case(model, x)
    _, dora = dense_case(model, x, variant="dora")
    for wrong, match in [
        (
            lora["kernel"].replace(m=dora["kernel"].m),
            "'kernel' is of variant 'lora', but also has 'm'",
        ),
        (dora["kernel"].replace(m=None), "'kernel' is of variant 'dora', but has no m"),
    ]:
        with pytest.raises(ValueError, match=match):
            lora_jax.lora_apply(model, {"params": frozen}, {"kernel": wrong}, x)
        with pytest.raises(ValueError, match=match):
            lora_jax.lora_merge(frozen, {"kernel": wrong})


def test_arrays_without_structure_and_trees_swapped():
    model, x = nn.Dense(5), jnp.ones((2, 6))
    frozen, adapters = dense_case(model, x)
    bare = {"kernel": {"U": adapters["kernel"].U, "V": adapters["kernel"].V}}
    with pytest.raises(TypeError, match=r"'kernel/U', where the base has a parameter 'kernel'"):
        lora_jax.lora_apply(model, {"params": frozen}, bare, x)
    with pytest.raises(TypeError, match="were they swapped"):
        lora_jax.lora_merge(adapters, frozen)
    with pytest.raises(TypeError, match="were they swapped"):
        lora_jax.summary(adapters, frozen)


@pytest.mark.parametrize("transform", [lambda cls: cls, nn.jit])
def test_one_adapted_model_inside_another(transform):
    """Each is adapted once, by its own adapters."""
    inner = zoo.Compact(transform(nn.Dense))

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x, frozen, adapters):
            x = nn.Dense(6, name="own")(x)
            return lora_jax.lora_apply(inner, {"params": frozen}, adapters, x)

    x = random_like(jnp.zeros((3, 6)), scale=1.0)
    inner_frozen, inner_adapters = dense_case(inner, x)
    own, adapters = dense_case(nn.Dense(6), x)
    y = lora_jax.lora_apply(
        Outer(), {"params": {"own": own}}, {"own": adapters}, x, inner_frozen, inner_adapters
    )
    hidden = nn.Dense(6).apply({"params": lora_jax.lora_merge(own, adapters)}, x)
    merged = {"params": lora_jax.lora_merge(inner_frozen, inner_adapters)}
    assert relative_error(y, inner.apply(merged, hidden)) < 1e-5


def test_dropout_of_adapters_leaves_the_models_own_alone():
    class OwnNoise(nn.Dense):
        @nn.compact
        def __call__(self, x):
            y = super().__call__(x)
            return y + jax.random.normal(self.make_rng("dropout"), y.shape)

    model, x = zoo.Compact(OwnNoise), jnp.ones((3, 6))
    rngs = {"dropout": jax.random.key(0)}
    params = model.init({"params": jax.random.key(1), **rngs}, x)["params"]
    config = lora_jax.LoraConfig([lora_jax.Rule(".*kernel", 2, dropout=0.5)])
    frozen, adapters = lora_jax.lora_init(jax.random.key(2), params, config)
    y = lora_jax.lora_apply(model, {"params": frozen}, adapters, x, rngs=rngs)
    assert jnp.array_equal(y, model.apply({"params": params}, x, rngs=rngs))


def test_dropout_of_a_layer_called_twice_is_drawn_twice():
    class Difference(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(50)
            return layer(x) - layer(x)

    frozen, adapters = dense_case(Difference(), jnp.ones((3, 40)), dropout=0.5)
    y = lora_jax.lora_apply(
        Difference(),
        {"params": frozen},
        adapters,
        jnp.ones((3, 40)),
        rngs={"dropout": jax.random.key(0)},
    )
    assert jnp.abs(y).max() > 1e-2


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_strict_promotion(variant):
    """Users may have told jax to refuse to mix dtypes: a model all in 16 bits mixes none."""
    dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    model = nn.Sequential([nn.Dense(6, **dtypes), nn.Conv(6, (3,), **dtypes)])
    x = jnp.ones((2, 5, 6), jnp.bfloat16)
    variables = random_variables(model, x)
    with jax.numpy_dtype_promotion("strict"):
        axes = lora_jax.kernel_axes(model, variables, x)
        config = lora_jax.LoraConfig([lora_jax.Rule(KERNELS, 2, variant=variant)])
        frozen, adapters = lora_jax.lora_init(
            jax.random.key(0), variables["params"], config, axes=axes
        )
        y = lora_jax.lora_apply(model, {"params": frozen}, adapters, x)
        merged = lora_jax.lora_merge(frozen, adapters)
        assert relative_error(y, model.apply({"params": merged}, x)) < 1e-2


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize(
    "equation", ["bed,edk->bek", "bed,dek->bek", "bed,dke->bek", "bed,ked->bek", "bed,kde->bek"]
)
def test_stacks_anywhere_in_a_kernel_of_equal_sizes(equation, variant):
    """Where sizes do not tell which axis is which."""
    model, x = nn.Einsum((4, 4, 4), equation, use_bias=False), random_like(jnp.zeros((3, 4, 4)))
    params = random_variables(model, x)["params"]
    axes = lora_jax.kernel_axes(model, {"params": params}, x)
    config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=2, variant=variant)])
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config, axes=axes)
    adapters = random_like(adapters)
    y = lora_jax.lora_apply(model, {"params": frozen}, adapters, x)
    merged = lora_jax.lora_merge(frozen, adapters)
    assert relative_error(y, model.apply({"params": merged}, x)) < 1e-5


def test_exported_with_a_symbolic_batch():
    model, params = nn.Dense(4), {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=2, variant="dora")])
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config)
    adapters = random_like(adapters)

    @jax.jit
    def adapted(x):
        return lora_jax.lora_apply(model, {"params": frozen}, adapters, x)

    for name in ("b", "c"):
        shape = export.symbolic_shape(f"{name}, 4")
        exported = export.export(adapted)(jax.ShapeDtypeStruct(shape, "float32"))
        x = random_like(jnp.zeros((7, 4)))
        assert relative_error(exported.call(x), adapted(x)) < 1e-6
