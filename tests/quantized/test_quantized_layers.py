"""A model on a quantized base is the model on what the base dequantizes to, in every layer."""

import functools
import types

import jax
import jax.numpy as jnp
import nnx_zoo
import numpy as np
import pytest
import zoo
from flax import nnx
from helpers import random_like, relative_error

import lora_jax
from lora_jax import LoraConfig, Rule
from lora_jax.core._boxes import content, is_quantized
from lora_jax.trees._paths import flatten

KEY = jax.random.key(2)
VARIANTS = {
    "lora": {"variant": "lora", "rank": 2, "alpha": 3.0},
    "dora": {"variant": "dora", "rank": 1, "zero": "V"},
}
# Two axes of a kernel as one of its codes, a scale for a part of a column, and a scale for it all.
KINDS = {
    "nf4": lora_jax.Quantization("nf4", block_size=4),
    "int8": lora_jax.Quantization("int8"),
}


def of_linen(name):
    case = zoo.CASES[name]
    variables, x = case.init()
    rest = {k: v for k, v in variables.items() if k != "params"}

    def with_params(params):
        return {**rest, "params": params}

    return types.SimpleNamespace(
        model=case.model,
        params=variables["params"],
        args=(x,),
        options={},
        rule={},
        with_params=with_params,
        plain=lambda params, *args: case.model.apply(with_params(params), *args),
        kernels=zoo.KERNELS,
        exact=case.exact,
    )


def of_nnx(name):
    case = nnx_zoo.CASES[name]
    graphdef, state, args = case.init()
    return types.SimpleNamespace(
        model=graphdef,
        params=state,
        args=args,
        options={"handlers": case.handlers},
        rule=case.rule,
        with_params=lambda params: params,
        plain=lambda params, *args: nnx.merge(graphdef, jax.tree.map(lambda x: x, params))(*args),
        kernels=nnx_zoo.KERNELS,
        exact=case.exact,
    )


def check(s, variant, kind):
    """Values and gradients of the adapted model, on a quantized base and on the same in floats."""
    axes = lora_jax.kernel_axes(s.model, s.with_params(s.params), *s.args, **s.options)
    base = lora_jax.quantize(s.params, {s.kernels: KINDS[kind]}, axes=axes)
    of_quantized = lora_jax.kernel_axes(s.model, s.with_params(base), *s.args, **s.options)
    assert of_quantized == axes
    assert not of_quantized.refused
    config = LoraConfig([Rule(s.kernels, **VARIANTS[variant], **s.rule)])
    frozen, adapters = lora_jax.lora_init(KEY, base, config, axes=of_quantized)
    assert jax.tree.structure(frozen) == jax.tree.structure(base)
    floats = lora_jax.dequantize(base)
    assert not any(is_quantized(content(leaf)) for leaf in flatten(floats, "floats").values())

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def adapted(adapters, frozen, args):
        y = lora_jax.lora_apply(s.model, s.with_params(frozen), adapters, *args, **s.options)
        y = y.astype(jnp.float32)
        weights = random_like(np.zeros(y.shape, np.float32), seed=4)
        return jnp.vdot(weights, y), y

    tolerance = 1e-5 if s.exact else 2e-2
    plain = jax.jit(s.plain)
    start = plain(base, *s.args).astype(jnp.float32)
    assert relative_error(start, plain(floats, *s.args).astype(jnp.float32)) < tolerance / 10
    (_, y), _ = adapted(adapters, frozen, s.args)
    assert relative_error(y, start) < tolerance

    trained = random_like(adapters)
    (_, y), gradient = adapted(trained, frozen, s.args)
    (_, expected), of_floats = adapted(trained, floats, s.args)
    assert relative_error(y, expected) < tolerance
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))
    for g, expected in zip(*map(jax.tree.leaves, (gradient, of_floats)), strict=True):
        assert relative_error(g, expected) < (1e-4 if s.exact else 5e-2)

    merged = lora_jax.lora_merge(frozen, trained)
    assert relative_error(plain(merged, *s.args).astype(jnp.float32), y) < (
        1e-4 if s.exact else 5e-2
    )


QUICK = (
    "compact",
    "scan, axis -1",
    "scan of scan, axes 0, 1",
    "vmap, axis 1",
    "remat",
)


QUICK_NNX = ("Mlp", "scan of remat", "scan, axis 1, as many as the width", "Embed, tied")


def slow_but(names, cases):
    """Each case with DoRA in blocks of 4 bits; quick ones with LoRA in columns of 8 too."""
    slow = pytest.mark.slow
    finer = [pytest.param(n, "dora", "nf4", marks=() if n in names else slow) for n in cases]
    return [*finer, *(pytest.param(n, "lora", "int8", marks=slow) for n in names)]


@pytest.mark.parametrize(("name", "variant", "kind"), slow_but(QUICK, zoo.CASES))
def test_linen(name, variant, kind):
    check(of_linen(name), variant, kind)


@pytest.mark.parametrize(("name", "variant", "kind"), slow_but(QUICK_NNX, nnx_zoo.CASES))
def test_nnx(name, variant, kind):
    check(of_nnx(name), variant, kind)
