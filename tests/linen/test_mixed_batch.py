"""A batch of mixed requests equals, row by row, each adapter alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from helpers import random_like, relative_error
from zoo import KERNELS, NO_ROWS

import lora_jax

RULES = [
    {"variant": "lora", "rank": 2, "alpha": 3.0},
    {"variant": "dora", "rank": 1, "zero": "V"},
    {"variant": "lora", "rank": 1, "rslora": True, "alpha": 0.5},
]
# Where they are not the first axis of the result.
ROWS_LAST = {"Einsum, stack last, with bias"}
# One for every way in which a layer has its kernel or its rows.
ROWS = [
    "compact",
    "subclass of subclass",
    "called twice",
    "remat of blocks",
    "jit of blocks",
    "scan, axis 1",
    "scan of remat",
    "scan of scan, axes 0, 1",
    "share_scope",
    "boxed",
    "FrozenDict",
    "many batch axes",
    "other collections",
    "bfloat16 compute",
    "attention",
    "DenseGeneral, two inputs",
    "Einsum, stack last, with bias",
    "Conv, groups",
    "Conv, many batch axes",
    "ConvTranspose",
    "ConvLocal, 2-D",
    "Embed, bfloat16 parameters",
    "Embed, tied",
]
# Those that stand for the others; `make test-slow` has them all.
SOME = {"scan of remat", "attention", "Conv, many batch axes", "Embed, tied"}
IDS = (1, 0, -1, 2, 1)


def cases(names):
    return [pytest.param(name, marks=[] if name in SOME else [pytest.mark.slow]) for name in names]


@functools.cache
def setup(name):
    case = zoo.CASES[name]
    variables, x = case.init()
    axes = lora_jax.kernel_axes(case.model, variables, x)
    adapters = []
    for seed, rule in enumerate(RULES):
        config = lora_jax.LoraConfig([lora_jax.Rule(KERNELS, **rule)])
        one = lora_jax.lora_init(jax.random.key(seed), variables["params"], config, axes=axes)[1]
        adapters.append(random_like(one, seed=seed))
    return case, variables, x, adapters


def several(x, axis=0):
    """As many different inputs as there are ids, from those that there are."""
    n = len(IDS)
    rows = [jnp.take(x, i % x.shape[axis], axis) if axis == 0 else x for i in range(n)]
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.stack([(row * (i + 1) + i) % 11 for i, row in enumerate(rows)])
    return jnp.stack([row * (1 + 0.1 * i) for i, row in enumerate(rows)])


def check(case, variables, adapters, x, mixed, rows_axis):
    """That a mixed batch has the outputs and the gradients of each adapter alone.

    Args:
      mixed: of the stack and all rows.
      rows_axis: the axis of the rows in the result, or `None` where the model does not see it.
    """
    model = case.model
    stacked = lora_jax.stack(adapters, variables["params"])
    floating = jnp.issubdtype(x.dtype, jnp.inexact)
    weights = random_like(jnp.zeros(jax.eval_shape(mixed, stacked, x).shape), seed=5, scale=1.0)

    def gradient(function):
        def loss(adapters, x, weights):
            y = function(adapters, x)
            return jnp.sum(y * weights), y

        return jax.jit(jax.value_and_grad(loss, (0, 1) if floating else 0, has_aux=True))

    (_, y), got = gradient(mixed)(stacked, x, weights)
    # By NumPy, which compiles nothing for each of the rows.
    y, x, weights = jax.tree.map(np.asarray, (y, x, weights))
    one = gradient(lambda adapters, x: lora_jax.lora_apply(model, variables, adapters, x))
    base = gradient(lambda _, x: model.apply(variables, x))
    got, got_x = got if floating else (got, None)
    got = lora_jax.unstack(got)
    total = [jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), one) for one in got]
    total_x = np.zeros(x.shape, np.float32)
    for b, i in enumerate(IDS):
        at = (Ellipsis, b) if rows_axis == -1 else b
        own = slice(b, b + 1) if rows_axis is not None else b
        weights_b = weights[..., own] if rows_axis == -1 else weights[own]
        (_, y_b), grads = (base if i < 0 else one)(adapters[max(i, 0)], x[own], weights_b)
        assert relative_error(y[at], np.reshape(y_b, y[at].shape)) < tolerance(case), (b, i)
        of_adapter, of_x = grads if floating else (grads, None)
        if i >= 0:
            for sums, grad in zip(*map(jax.tree.leaves, (total[i], of_adapter)), strict=True):
                sums += np.asarray(grad, np.float32)
        if floating:
            total_x[b] = np.reshape(of_x, x[b].shape)
    got, expected = (got, total) if not floating else ((got, got_x), (total, total_x))
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        a = np.asarray(a, np.float32)
        # Of kernels that matter less than others the rounding of the others is in the gradient.
        bound = tolerance(case) * (float(np.abs(b).max()) + 0.1 * largest)
        assert float(np.abs(a - b).max()) <= bound


def tolerance(case):
    return 1e-5 if case.exact else 3e-2


@pytest.mark.parametrize("name", cases(ROWS))
def test_each_row_equals_its_adapter_alone(name):
    case, variables, x, adapters = setup(name)

    def mixed(stacked, x):
        return lora_jax.lora_apply(case.model, variables, stacked, x, adapter_ids=jnp.array(IDS))

    check(case, variables, adapters, several(x), mixed, -1 if name in ROWS_LAST else 0)


@pytest.mark.parametrize("name", cases(sorted({*NO_ROWS, "jit of blocks", "Embed, tied"})))
def test_vmap_over_one_id_equals_per_adapter_alone(name):
    case, variables, x, adapters = setup(name)

    def mixed(stacked, x):
        def one(i, x):
            return lora_jax.lora_apply(case.model, variables, stacked, x, adapter_ids=i)

        return jax.vmap(one)(jnp.array(IDS), x)

    check(case, variables, adapters, several(x, axis=1), mixed, None)
