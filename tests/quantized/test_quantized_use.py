"""What is done with a quantized base besides calling a model: files, sums, pools, transforms."""

import dataclasses
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import random_like, relative_error

import lora_jax
from lora_jax import LoraConfig, Quantization, Rule
from lora_jax.core.products import _dequantized

KEY = jax.random.key(0)
WIDTH = 128


class Mlp(nn.Module):
    layers: int = 2

    @nn.compact
    def __call__(self, x):
        for _ in range(self.layers):
            x = nn.tanh(nn.Dense(WIDTH)(x))
        return nn.Dense(3, name="head")(x)


MODEL = Mlp()
X = jnp.asarray(np.random.default_rng(0).standard_normal((4, WIDTH)), jnp.float32)


def params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(MODEL.init, KEY, X)["params"]
    return jax.tree.map(lambda s: jnp.asarray(0.1 * rng.standard_normal(s.shape), s.dtype), shapes)


def made(variant="dora", kind="nf4", **rule):
    """A quantized base, adapters that are trained, and the same base in floats."""
    base = lora_jax.quantize(params(), {"Dense.*kernel": kind})
    config = LoraConfig([Rule("Dense.*kernel", 2, variant=variant, **rule)], trainable=["head/.*"])
    frozen, adapters = lora_jax.lora_init(KEY, base, config)
    return base, frozen, random_like(adapters), lora_jax.dequantize(frozen)


def apply(frozen, adapters, x=X, **options):
    return lora_jax.lora_apply(MODEL, {"params": frozen}, adapters, x, **options)


# --- files ---


def test_saved_and_loaded(tmp_path):
    base, frozen, adapters, _ = made()
    lora_jax.save(tmp_path / "a", adapters, frozen=frozen)
    again = lora_jax.load(tmp_path / "a", base, verify=True)
    assert jnp.array_equal(apply(*again), apply(frozen, adapters))
    for other in (params(), lora_jax.quantize(params(), {"Dense.*kernel": "int4"})):
        with pytest.raises(ValueError, match="not the base"):
            lora_jax.load(tmp_path / "a", other, verify=True)


def test_to_peft_and_back(tmp_path):
    base = lora_jax.quantize(params(), {".*kernel": "nf4"})
    config = LoraConfig([Rule(".*kernel", 2, variant=lora_jax.DoRA(detach_norm=True))])
    frozen, adapters = lora_jax.lora_init(KEY, base, config)
    adapters = random_like(adapters)
    names = [lora_jax.peft.KeyMapping("{layer}/kernel", "{layer}.weight")]
    lora_jax.peft.save(tmp_path / "a", frozen, adapters, names=names)
    again = lora_jax.peft.load(tmp_path / "a", base, names=names)
    assert relative_error(apply(*again), apply(frozen, adapters)) < 1e-5


# --- merged ---


def test_merged_into_codes_again():
    _, frozen, adapters, _ = made(kind="int8")
    merged = lora_jax.lora_merge(frozen, adapters)
    again = lora_jax.lora_merge(frozen, adapters, requantize=True)
    assert again["Dense_0"]["kernel"].quantization == Quantization("int8")
    exact = merged["Dense_0"]["kernel"]
    error = jnp.abs(again["Dense_0"]["kernel"].unbox() - exact)
    assert error.max() <= 0.5001 * jnp.abs(exact).max(0).max() / 127
    report = lora_jax.rounding(frozen, adapters, requantize=True)
    assert report["Dense_0/kernel"].dtype == "int8"
    assert np.isclose(report["Dense_0/kernel"].largest, float(error.max()), rtol=1e-3)
    assert lora_jax.rounding(frozen, adapters)["Dense_0/kernel"].largest == 0
    assert jnp.allclose(
        MODEL.apply({"params": again}, X), MODEL.apply({"params": merged}, X), atol=0.1
    )


def test_summary_counts_the_kernel():
    _, frozen, adapters, floats = made()
    assert str(lora_jax.summary(frozen, adapters)) == str(lora_jax.summary(floats, adapters))


# --- many adapters ---


@pytest.mark.parametrize("ids", [jnp.array([0, 1, -1, 0]), jnp.int32(1)])
def test_stacked(ids):
    base, _, one, floats = made("dora")
    other = random_like(one, seed=5)
    stacked = lora_jax.stack([one, other], base)
    whole = {**floats, "head": base["head"]}
    y = jax.jit(lambda f, s: apply(f, s, adapter_ids=ids))(base, stacked)
    expected = apply(whole, stacked, adapter_ids=ids)
    assert relative_error(y, expected) < 1e-5


@pytest.mark.parametrize("ids", [jnp.array([0, 1, -1, 0]), jnp.int32(1)])
def test_stacked_in_place_of_the_parameter(ids):
    base, _, one, floats = made("dora", materialize=True)
    stacked = lora_jax.stack([one, random_like(one, seed=5)], base)
    y = apply(base, stacked, adapter_ids=ids)
    expected = apply({**floats, "head": base["head"]}, stacked, adapter_ids=ids)
    assert relative_error(y, expected) < 1e-5


def test_pool():
    base, _, one, floats = made("dora")
    pool = lora_jax.AdapterPool(base, slots=2, like=one)
    pool.put("one", one)
    with pool.use(["one"] * 4) as (stacked, ids):
        y = apply(base, stacked, adapter_ids=ids)
    assert relative_error(y, apply(floats, one)) < 1e-4


def test_cached_norm():
    _, frozen, adapters, floats = made("dora")
    cached = lora_jax.cache_norm(frozen, adapters)
    assert relative_error(apply(frozen, cached), apply(floats, adapters)) < 1e-5


# --- transforms of JAX ---


def losses(frozen):
    return lambda adapters, x=X: jnp.sum(apply(frozen, adapters, x) ** 2)


LORA_TOO = [pytest.param("lora", marks=pytest.mark.slow), "dora"]


@pytest.mark.parametrize("variant", LORA_TOO)
@pytest.mark.parametrize(
    "with_calls",
    [True, pytest.param(False, marks=pytest.mark.slow)],
    ids=["calls", "checkpoint"],
)
def test_derivatives(variant, with_calls, monkeypatch):
    """Forwards, twice, and for each example; also where there is only `jax.checkpoint`."""
    if not with_calls:
        monkeypatch.setattr(_dequantized, "calls_anew", None)
    _, frozen, adapters, floats = made(variant)
    tangent = random_like(adapters, seed=3)

    def all_of(frozen):
        loss = losses(frozen)
        forward = jax.jvp(loss, (adapters,), (tangent,))
        twice = jax.jvp(jax.grad(loss), (adapters,), (tangent,))
        reverse_twice = jax.grad(lambda a: jnp.vdot(*map(_flat, (jax.grad(loss)(a), tangent))))
        each = jax.vmap(jax.grad(loss), (None, 0))(adapters, X[:, None])
        of_x = jax.grad(loss, 1)(adapters, X)
        return forward, twice, reverse_twice(adapters), each, of_x

    got, expected = jax.jit(all_of)(frozen), jax.jit(all_of)(floats)
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert relative_error(a, b) < 1e-4


def _flat(tree):
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])


def test_over_a_stack_by_vmap():
    _, frozen, one, floats = made("dora")
    several = jax.tree.map(lambda *a: jnp.stack(a), one, random_like(one, seed=9))
    got, expected = (jax.vmap(lambda a, f=f: apply(f, a))(several) for f in (frozen, floats))
    assert relative_error(got, expected) < 1e-5


def test_a_gradient_of_the_scales_is_theirs():
    """Nobody trains a quantized base, but what is differentiated is not silently zero."""
    _, frozen, adapters, _ = made("dora", Quantization("int8"))

    def loss(scale):
        leaf = frozen["Dense_0"]["kernel"].replace(scale=scale)
        return losses({**frozen, "Dense_0": {**frozen["Dense_0"], "kernel": leaf}})(adapters)

    scale = frozen["Dense_0"]["kernel"].scale
    step = 1e-2 * scale.max() * jnp.ones_like(scale)
    found = jnp.vdot(jax.grad(loss)(scale), step)
    assert jnp.allclose(found, (loss(scale + step) - loss(scale - step)) / 2, rtol=0.05)


# --- memory ---


def temporary_bytes(model, frozen, adapters, x):
    def loss(adapters, frozen, x):
        return jnp.sum(lora_jax.lora_apply(model, {"params": frozen}, adapters, x) ** 2)

    compiled = jax.jit(jax.grad(loss)).lower(adapters, frozen, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.tanh(nn.Dense(256)(x)), None


class Deep(nn.Module):
    """Eight layers, in a loop or one after the other, with remat or without."""

    loop: bool
    remat: bool

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Layer, prevent_cse=not self.loop) if self.remat else Layer
        if self.loop:
            scan = nn.scan(
                layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=8
            )
            return scan()(x, None)[0]
        for _ in range(8):
            x, _ = layer()(x)
        return x


@pytest.mark.parametrize("variant", LORA_TOO)
@pytest.mark.parametrize(
    "remat", [pytest.param(False, marks=pytest.mark.slow), True], ids=["", "remat"]
)
@pytest.mark.parametrize("loop", [False, True], ids=["unrolled", "scan"])
def test_no_two_layers_are_dequantized_at_once(loop, remat, variant):
    """By the compiler: of eight kernels a step holds one in floats, besides what it has anyway."""
    model, x = Deep(loop, remat), jnp.ones((4, 256))
    shapes = jax.eval_shape(model.init, KEY, x)["params"]
    some = jax.tree.map(
        lambda s: jnp.asarray(np.random.default_rng(0).normal(size=s.shape), s.dtype), shapes
    )
    axes = lora_jax.kernel_axes(model, {"params": some}, x)
    config = LoraConfig([Rule(".*kernel", 2, variant=variant)])
    found = {}
    for kind in ("floats", "nf4"):
        base = some if kind == "floats" else lora_jax.quantize(some, {".*kernel": kind}, axes=axes)
        frozen, adapters = lora_jax.lora_init(KEY, base, config, axes=axes)
        found[kind] = temporary_bytes(model, frozen, adapters, x)
    kernel = 256 * 256 * 4
    assert found["nf4"] - found["floats"] < 2 * kernel


# --- LoftQ ---


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_loftq_starts_nearer(variant):
    config = LoraConfig([Rule("Dense.*kernel", 8, variant=variant, alpha=2.0)])
    frozen, adapters = lora_jax.lora_init(KEY, params(), config)
    kinds = {".*kernel": Quantization("nf4", 64)}
    quantized, started, report = lora_jax.loftq(frozen, adapters, kinds)
    assert set(report.rows) == {"Dense_0/kernel", "Dense_1/kernel"}  # the head has no adapter
    for name in ("Dense_0", "Dense_1"):
        W, leaf = frozen[name]["kernel"], quantized[name]["kernel"]
        adapter, row = started[name]["kernel"], report[f"{name}/kernel"]
        alone = lora_jax.quantize({"k": W}, {"k": kinds[".*kernel"]})["k"].unbox()
        merged = lora_jax.lora_merge(quantized, started)[name]["kernel"]
        assert relative_error(merged, leaf.unbox() + adapter.scale * adapter.U @ adapter.V) < 1e-5
        size = jnp.linalg.norm(W)
        assert np.isclose(row.quantized, jnp.linalg.norm(W - alone) / size, rtol=1e-4)
        assert np.isclose(row.with_adapter, jnp.linalg.norm(W - merged) / size, rtol=1e-3)
        assert row.with_adapter < 0.95 * row.quantized
        _, values, _ = np.linalg.svd(np.asarray(W - leaf.unbox()))
        best = np.sqrt((values[8:] ** 2).sum()) / size
        assert np.isclose(row.with_adapter, best, rtol=1e-3)
    assert "with adapter" in str(report)
    y = lora_jax.lora_apply(MODEL, {"params": quantized}, started, X)
    plain = MODEL.apply({"params": params()}, X)
    of_quantized = MODEL.apply({"params": lora_jax.quantize(params(), kinds)}, X)
    assert jnp.linalg.norm(y - plain) < jnp.linalg.norm(of_quantized - plain)


def test_loftq_of_a_stack_and_steps():
    model = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    x = jnp.ones((2, 256))
    variables = model.init(KEY, x, None)
    axes = lora_jax.kernel_axes(model, variables, x, None)
    config = LoraConfig([Rule(".*kernel", 4)])
    split = lora_jax.lora_init(KEY, variables["params"], config, axes=axes)
    errors = [
        lora_jax.loftq(*split, {".*kernel": "int4"}, steps=steps)[2]["Dense_0/kernel"].with_adapter
        for steps in (1, 3)
    ]
    assert errors[1] <= errors[0]
    with pytest.raises(ValueError, match="steps"):
        lora_jax.loftq(*split, {".*kernel": "int4"}, steps=0)


class NoUV(lora_jax.Variant):
    name = "no_uv"

    def shapes(self, d, k, r):
        return {"b": (d, k)}

    def init(self, key, W, rule):
        return {"b": jnp.zeros_like(W)}

    def kernel(self, W, s, b):
        return W + b


class MovesBase(lora_jax.LoRA):
    name = "moves_base"
    changes_base = True

    def base(self, W, s, U, V):
        return W - s * U @ V


def test_other_variants_and_loftq():
    config = LoraConfig([Rule("Dense.*kernel", 2, variant=NoUV())])
    split = lora_jax.lora_init(KEY, params(), config)
    with pytest.raises(ValueError, match=r"'Dense_0/kernel' is of variant 'no_uv'"):
        lora_jax.loftq(*split, {".*kernel": "nf4"})


def test_a_variant_that_changes_the_base_is_refused():
    base = lora_jax.quantize(params(), {"Dense.*kernel": "nf4"})
    config = LoraConfig([Rule("Dense.*kernel", 2, variant=MovesBase())])
    with pytest.raises(ValueError, match=r"'Dense_0/kernel' is quantized, and its variant"):
        lora_jax.lora_init(KEY, base, config)


def test_a_variant_without_a_normal_form():
    config = LoraConfig([Rule("Dense.*kernel", 2, variant=NoUV())])
    base = lora_jax.quantize(params(), {"Dense.*kernel": "int8"})
    frozen, adapters = lora_jax.lora_init(KEY, base, config)
    trained = random_like(adapters)
    floats = lora_jax.dequantize(frozen)
    assert relative_error(apply(frozen, trained), apply(floats, trained)) < 1e-5
    got, expected = (jax.grad(losses(f))(trained) for f in (frozen, floats))
    assert relative_error(got["Dense_0"]["kernel"].b, expected["Dense_0"]["kernel"].b) < 1e-4


# --- a base of qwix ---


@dataclasses.dataclass(frozen=True)
class WithAux:
    """As qwix keeps a kernel in the parameters."""

    array: object
    how: object = None


def of_qwix(W, kind):
    """Per column, as qwix has codes and scales; for 4 bits by tiles of 32."""
    tiles = 1 if kind in (jnp.int8, jnp.float8_e4m3fn) else W.shape[0] // 32
    blocks = W.reshape(tiles, -1, W.shape[1])
    largest = {"nf4": 1.0, jnp.int8: 127.5, jnp.int4: 7.5, jnp.float8_e4m3fn: 448.0}[kind]
    scale = jnp.abs(blocks).max(1) / largest
    units = blocks / scale[:, None]
    if kind == "nf4":
        from lora_jax.core.quantized._kinds import NF4

        codes = jnp.abs(units[..., None] - jnp.array(NF4)).argmin(-1).astype(jnp.uint4)
        values = jnp.array(NF4)[codes.astype(int)]
    else:
        codes = (jnp.round(units) if kind != jnp.float8_e4m3fn else units).astype(kind)
        values = codes.astype(jnp.float32)
    array = types.SimpleNamespace(
        qvalue=codes.reshape(W.shape), scale=scale, zero_point=None, qtype=kind
    )
    return WithAux(array), (values * scale[:, None]).reshape(W.shape)


@pytest.mark.parametrize("kind", ["nf4", jnp.int8, jnp.int4, jnp.float8_e4m3fn], ids=str)
def test_codes_of_qwix_are_taken(kind):
    whole = params()
    floats = dict(whole)
    for name in ("Dense_0", "Dense_1"):
        leaf, values = of_qwix(whole[name]["kernel"], kind)
        whole = {**whole, name: {**whole[name], "kernel": leaf}}
        floats = {**floats, name: {**floats[name], "kernel": values}}
    config = LoraConfig([Rule("Dense.*kernel", 2, variant="dora")])
    frozen, adapters = lora_jax.lora_init_model(KEY, MODEL, {"params": whole}, config, X)
    assert relative_error(apply(frozen, adapters), MODEL.apply({"params": floats}, X)) < 1e-5
    trained = random_like(adapters)
    assert relative_error(apply(whole, trained), apply(floats, trained)) < 1e-5
    merged = lora_jax.lora_merge(frozen, trained)
    assert relative_error(MODEL.apply({"params": merged}, X), apply(frozen, trained)) < 1e-5


def test_codes_of_qwix_with_other_scales():
    """Those of mxfp8 are powers of two, in 8 bits: nothing to dequantize to."""
    leaf, _ = of_qwix(params()["Dense_0"]["kernel"], jnp.float8_e4m3fn)
    leaf.array.scale, leaf.array.qtype = leaf.array.scale.astype(jnp.float8_e5m2), "mxfp8"
    with pytest.raises(ValueError, match="'kernel' is quantized by qwix as 'mxfp8'"):
        lora_jax.dequantize({"kernel": leaf})


def test_codes_of_qwix_that_are_not_known():
    array = types.SimpleNamespace(
        qvalue=jnp.ones((4, 4), jnp.uint8), scale=jnp.ones((1, 4)), zero_point=None, qtype="mxfp4"
    )
    with pytest.raises(ValueError, match="'kernel' is quantized by qwix as 'mxfp4'"):
        lora_jax.dequantize({"kernel": WithAux(array)})


# --- NNX ---


def test_model_of_nnx_as_an_object():
    model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
    graphdef, state = nnx.split(model)
    base = lora_jax.quantize(state, {".*kernel": Quantization("nf4", 4)})
    config = LoraConfig([Rule(".*kernel", 2, variant="dora")])
    x = jnp.ones((3, 8))
    frozen, adapters = lora_jax.lora_init_model(KEY, graphdef, base, config, x)
    trained = random_like(adapters)
    expected = lora_jax.lora_apply(graphdef, lora_jax.dequantize(frozen), trained, x)
    adapted = lora_jax.lora_model(graphdef, frozen, trained)
    assert relative_error(adapted(x), expected) < 1e-5
    assert relative_error(lora_jax.lora_apply(graphdef, frozen, trained, x), expected) < 1e-5
    _, after = lora_jax.lora_apply(graphdef, frozen, trained, x, mutable=True)
    assert jax.tree.structure(after) == jax.tree.structure(frozen)
