"""The zoo under the settings of JAX under which Flax itself runs: nothing fails."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import pytest
import zoo
from helpers import only_new_garbage, random_like, relative_error
from zoo import KERNELS, NO_ROWS

import lora_jax

SETTINGS = {
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
    "jax_check_tracer_leaks": True,
    "jax_debug_nans": True,
    "jax_enable_x64": True,
    "jax_threefry_partitionable": False,  # the default is True
    "jax_default_prng_impl": "rbg",
}
# Those that the zoo is traced under at once, as they cannot hide what another one shows.
TOGETHER = [
    (
        "jax_numpy_rank_promotion",
        "jax_threefry_partitionable",
        "jax_default_prng_impl",
        "jax_enable_x64",
        "jax_check_tracer_leaks",
    ),
    ("jax_numpy_dtype_promotion",),
    ("jax_debug_nans",),
]
# What each of them is telling for; `make test-slow` has the whole zoo under each.
TELLING = {
    ("jax_numpy_rank_promotion", "Conv, groups"),
    ("jax_numpy_rank_promotion", "Embed, tied"),
    ("jax_numpy_dtype_promotion", "bfloat16 compute"),
    ("jax_debug_nans", "share_scope"),
}
# NaN come of what is computed, and not of the module or the transform that a Dense is in.
OF_DENSE = (
    "setup",
    "subclass",
    "remat",
    "jit of",
    "vmap",
    "scan",
    "boxed",
    "FrozenDict",
)
IDS = (1, 0, -1)


@contextlib.contextmanager
def using(*settings):
    before = {setting: getattr(jax.config, setting) for setting in settings}
    for setting in settings:
        jax.config.update(setting, SETTINGS[setting])
    try:
        with only_new_garbage():
            yield
    finally:
        for setting in settings:
            jax.config.update(setting, before[setting])


def plain(case, variables):
    """The case's own model, as a function of its parameters."""
    rest = {name: value for name, value in variables.items() if name != "params"}
    return lambda params, x: case.model.apply({**rest, "params": params}, x)


def with_gradient(function):
    """The result, and the gradient of something that all of it is in."""

    def value(trained, *args):
        y = function(trained, *args)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    def both(*args):
        gradient, y = jax.grad(value, has_aux=True)(*args)
        return y, gradient

    return both


def everything(case, run):
    """Axes, adapters, and by `run` what they compute, alone, merged and in a mixed batch."""
    variables, x = case.init()
    params = variables["params"]
    rest = {name: value for name, value in variables.items() if name != "params"}
    axes = lora_jax.kernel_axes(case.model, variables, x)

    def start(key, variant):
        config = lora_jax.LoraConfig([lora_jax.Rule(KERNELS, rank=2, variant=variant)])
        return lora_jax.lora_init(key, params, config, axes=axes)

    def adapted(adapters, frozen, x, **kwargs):
        variables = {**rest, "params": frozen}
        return lora_jax.lora_apply(case.model, variables, adapters, x, **kwargs)

    def mixed(stacked, params, x):
        return adapted(stacked, params, x, adapter_ids=jnp.array(IDS))

    each = []
    for seed, variant in enumerate(("dora", "lora")):
        out = run(functools.partial(start, variant=variant))(jax.random.key(seed))
        _, adapters = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), out)
        each.append(random_like(adapters, seed=seed))
    yield run(with_gradient(adapted))(each[0], params, x)
    yield run(lora_jax.lora_merge)(params, each[0])
    if case not in [zoo.CASES[name] for name in NO_ROWS]:
        stacked = run(lambda params, *each: lora_jax.stack(each, params))(params, *each)
        stacked = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), stacked)
        stacked = random_like(stacked, seed=3)
        rows = jnp.concatenate([x] * len(IDS))[: len(IDS)]
        yield run(with_gradient(mixed))(stacked, params, rows)


def traced(function):
    return functools.partial(jax.eval_shape, function)


def eager(function):
    return function


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        pytest.param(s, name, marks=[] if (s[0], name) in TELLING else [pytest.mark.slow])
        for s in TOGETHER
        for name in zoo.CASES
        if s != ("jax_debug_nans",) or not name.startswith(OF_DENSE)
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_zoo_under_a_setting(settings, name):
    case = zoo.CASES[name]
    with using(*settings):
        try:
            variables, x = case.init()
            jax.eval_shape(with_gradient(plain(case, variables)), variables["params"], x)
        except Exception as error:
            pytest.skip(f"Flax's own model fails under {settings}: {str(error).splitlines()[0]}")
        # What a setting refuses it refuses where it is traced, but NaN, for which JAX looks in all
        # that is computed outside of jax.jit.
        assert list(everything(case, eager if settings == ("jax_debug_nans",) else traced))


@pytest.mark.parametrize(
    "setting",
    [
        "jax_enable_x64",
        pytest.param("jax_threefry_partitionable", marks=pytest.mark.slow),
        pytest.param("jax_default_prng_impl", marks=pytest.mark.slow),
    ],
)
def test_numbers_are_the_same_under_a_setting(setting):
    case = zoo.CASES["share_scope"]
    with using(setting):
        got = list(everything(case, jax.jit))
    expected = list(everything(case, jax.jit))
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert relative_error(a, b) < 1e-4
