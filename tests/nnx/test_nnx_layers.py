"""The adapted model equals the merged model, for every layer and way to hold it."""

import functools
import types

import jax
import jax.numpy as jnp
import nnx_zoo as zoo
import numpy as np
import pytest
from flax import nnx
from helpers import random_like, relative_error

import lora_jax
from lora_jax.core._boxes import unbox
from lora_jax.trees._paths import flatten, path_of

VARIANTS = {
    "lora": {"variant": "lora", "rank": 2, "alpha": 3.0},
    "dora": {"variant": "dora", "rank": 1, "zero": "V"},
}
IDS = (1, 0, -1)


def called(graphdef, state, *args):
    """The model itself, with variables of the trace that is going on."""
    return nnx.merge(graphdef, jax.tree.map(lambda x: x, state))(*args)


def objects(state):
    """What must be the same before and after a call: the variables, and the arrays in them."""
    return [(id(v), id(unbox(v))) for v in flatten(state, "state").values()]


@functools.cache
def setup(name, variant):
    case = zoo.CASES[name]
    graphdef, state, args = case.init()
    axes = lora_jax.kernel_axes(graphdef, state, *args, handlers=case.handlers)
    config = lora_jax.LoraConfig([lora_jax.Rule(zoo.KERNELS, **VARIANTS[variant], **case.rule)])
    frozen, adapters = lora_jax.lora_init(jax.random.key(2), state, config, axes=axes)
    weights = random_like(
        jnp.zeros(jax.eval_shape(functools.partial(called, graphdef), state, *args).shape), seed=4
    )

    traces = []

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def adapted(adapters, frozen, args):
        traces.append(name)
        y = lora_jax.lora_apply(graphdef, frozen, adapters, *args, handlers=case.handlers)
        return jnp.vdot(weights, y.astype(jnp.float32)), y

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def merged(adapters, frozen, args):
        y = called(graphdef, lora_jax.lora_merge(frozen, adapters), *args)
        return jnp.vdot(weights, y.astype(jnp.float32)), y

    trained = random_like(adapters)
    return types.SimpleNamespace(**locals())


@pytest.mark.parametrize("name", zoo.CASES)
def test_axes_of_every_kernel(name):
    s = setup(name, "dora")
    kernels = {
        path_of(key): unbox(leaf).ndim
        for key, leaf in flatten(s.state, "state").items()
        if key[-1] in ("kernel", "embedding", "w")
    }
    found = {path: (axes.inputs, axes.outputs, axes.batch) for path, axes in s.axes.items()}
    known = {path: s.case.axes_of(path, ndim) for path, ndim in kernels.items()}
    assert found == ({} if s.case.rule.get("materialize") else known)
    assert not s.axes.refused
    assert set(s.axes.tied) == ({"embed/embedding"} if "tied" in s.case.rule else set())


# Where `make test` has LoRA too, which is a part of DoRA, and rows with an adapter each.
QUICK = (
    "Mlp",
    "subclass of subclass",
    "LinearGeneral, two inputs",
    "Einsum",
    "Conv, 1-D",
    "ConvTranspose, kernel transposed",
    "Embed, tied",
    "own layer",
    "jit of a subclass",
    "scan, axis 1, as many as the width",
    "scan of remat",
)


# What these test, quicker cases test too.
SLOW = (
    "no batch",
    "subclass",
    "Sequential",
    "List",
    "dot_general",
    "LinearGeneral, batch axes",
    "Conv, 2-D",
    "attention, norms, dropout, bfloat16",
    "vmap, axis 0",
    "scan by the types of variables",
    "scan, axis 0, as many as the width",
    "many batch axes",
    "bfloat16 parameters",
    "Conv, no batch, bfloat16",
    "Embed, tied, in bfloat16",
    "GRU",
    "jit",
    "jit of remat",
    "scan, axis 0",
    "scan, axis 1",
    "every layer, scan, axis 1, remat",
)
DORA = [pytest.param(n, "dora", marks=[pytest.mark.slow] if n in SLOW else []) for n in zoo.CASES]


def marked(name, *more):
    return pytest.param(name, *more, marks=[] if name in QUICK else [pytest.mark.slow])


@pytest.mark.parametrize(
    ("name", "variant"),
    DORA + [marked(name, "lora") for name in zoo.CASES],
)
def test_no_op_at_the_start_and_equal_to_the_merged_model(name, variant):
    s = setup(name, variant)
    before = objects(s.state), objects(s.frozen)
    (_, base), _ = s.merged(s.adapters, s.frozen, s.args)
    (_, start), _ = s.adapted(s.adapters, s.frozen, s.args)
    assert (start.dtype, start.shape) == (base.dtype, base.shape)
    assert relative_error(start, base) < (1e-6 if s.case.exact else 1e-2)
    if variant == "lora" and s.case.bitwise:
        assert jnp.array_equal(start, base)
    (_, y), grads = s.adapted(s.trained, s.frozen, s.args)
    assert relative_error(y, base) > 1e-2
    (_, expected), explicit = s.merged(s.trained, s.frozen, s.args)
    assert relative_error(y, expected) < (1e-5 if s.case.exact else 5e-2)
    for (path, got), grad in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(explicit), strict=True
    ):
        assert relative_error(got, grad) < (1e-4 if s.case.exact else 1e-1), path
        assert jnp.abs(grad).max() > 0, path
    assert (objects(s.state), objects(s.frozen)) == before
    assert len(s.traces) == 1


@pytest.mark.parametrize("name", [marked(name) for name, case in zoo.CASES.items() if case.rows])
def test_rows_of_a_mixed_batch_equal_each_alone(name):
    s, other = setup(name, "lora"), setup(name, "dora")
    stack = lora_jax.stack([s.trained, other.trained], s.state)
    x = s.args[0]
    args = (jnp.concatenate([x, x[:1]])[: len(IDS)], *s.args[1:])
    take = jax.jit(
        lambda frozen, stack, args: lora_jax.lora_apply(
            s.graphdef, frozen, stack, *args, adapter_ids=jnp.array(IDS), handlers=s.case.handlers
        )
    )
    mixed = np.asarray(take(s.frozen, stack, args), np.float32)
    (_, base), _ = s.merged(s.adapters, s.frozen, s.args)
    alone = [one.adapted(one.trained, one.frozen, s.args)[0][1] for one in (s, other)] + [base]
    for row, id_ in enumerate(IDS):
        expected = np.asarray(alone[id_], np.float32)[row % len(x)]
        assert relative_error(mixed[row], expected) < (1e-5 if s.case.exact else 5e-2), (row, id_)
