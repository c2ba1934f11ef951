"""Layers that do more to a kernel than to read it, with a quantized kernel, adapted or not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import random_like, relative_error

import lora_jax
from lora_jax import LoraConfig, Quantization, Rule

KEY = jax.random.key(0)
NF4 = Quantization("nf4", 4)
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8)), jnp.float32)
IDS = jnp.array([1, 2, 3])


class ScaledInSetup(nn.Embed):
    def setup(self):
        init = self.embedding_init
        shape = (self.num_embeddings, self.features)
        self.embedding = 3.0 * self.param("embedding", init, shape, self.param_dtype)


class ScaledParam(nn.Embed):
    def param(self, name, *args, **kwargs):
        return 3.0 * super().param(name, *args, **kwargs)


class ScaledTranspose(nn.ConvTranspose):
    def param(self, name, *args, **kwargs):
        return 3.0 * super().param(name, *args, **kwargs)


class ScaledEinsum(nn.Einsum):
    def param(self, name, *args, **kwargs):
        return 3.0 * super().param(name, *args, **kwargs)


class WithOther(nn.Module):
    """A layer that is quantized, and one that is adapted."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="other")(self.layer(x))


class Intercepted(nn.Module):
    @nn.compact
    def __call__(self, x):
        with nn.intercept_methods(lambda f, args, kwargs, _: 2 * f(*args, **kwargs)):
            x = nn.Dense(8, name="layer")(x)
        return nn.Dense(3, name="other")(x)


class Gain(nn.Module):
    """Its product has a parameter of the module in it."""

    @nn.compact
    def __call__(self, x):
        g = self.param("gain", nn.initializers.constant(2.0), (8,))
        dot = lambda x, W, dims, **kwargs: g * jax.lax.dot_general(x, W, dims)  # noqa: E731
        return nn.Dense(3, name="other")(nn.Dense(8, dot_general=dot, name="layer")(x))


CASES = {
    "own setup": (WithOther(ScaledInSetup(10, 8)), IDS),
    "own param, Embed": (WithOther(ScaledParam(10, 8)), IDS),
    "own param, ConvTranspose": (WithOther(ScaledTranspose(8, (3,))), X[None]),
    "own param, Einsum": (WithOther(ScaledEinsum((8, 8), "bd,dk->bk")), X),
    "intercepted": (Intercepted(), X),
    "a closure": (Gain(), X),
}


def split(model, x, kinds, rule):
    variables = jax.jit(model.init)(KEY, x)
    axes = lora_jax.kernel_axes(model, variables, x)
    base = lora_jax.quantize(variables["params"], kinds, axes=axes)
    config = LoraConfig([Rule(rule, 2, variant="dora")])
    frozen, adapters = lora_jax.lora_init(KEY, base, config, axes=axes)
    return frozen, random_like(adapters), lora_jax.dequantize(frozen)


@pytest.mark.parametrize("name", CASES)
def test_quantized_and_not_adapted(name):
    """The model's own computation stays the model's."""
    model, x = CASES[name]
    frozen, adapters, floats = split(model, x, {"layer/.*(kernel|embedding)": NF4}, "other/kernel")

    @jax.jit
    @jax.value_and_grad
    def loss(adapters, frozen):
        return jnp.sum(lora_jax.lora_apply(model, {"params": frozen}, adapters, x) ** 2)

    got, expected = loss(adapters, frozen), loss(adapters, floats)
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize(
    ("layer", "x"),
    [(nn.ConvTranspose(3, (3,)), X[None]), (nn.ConvLocal(3, (3,)), X[None])],
    ids=["ConvTranspose", "ConvLocal"],
)
def test_layers_that_are_called_inside_of_themselves(layer, x):
    """Their handler calls the module's own method, which must not be put off."""
    frozen, adapters, floats = split(layer, x, {"kernel": NF4}, "kernel")
    apply = jax.jit(lambda f, a: lora_jax.lora_apply(layer, {"params": f}, a, x))
    assert relative_error(apply(frozen, adapters), apply(floats, adapters)) < 1e-5


class MoreInSetup(nn.Embed):
    def setup(self):
        super().setup()
        self.more = 1


def test_a_setup_that_leaves_the_kernel_is_adapted():
    model = WithOther(MoreInSetup(10, 8))
    frozen, adapters, floats = split(model, IDS, {"layer/.*": NF4}, "layer/embedding")
    got, expected = (
        lora_jax.lora_apply(model, {"params": f}, adapters, IDS) for f in (frozen, floats)
    )
    assert relative_error(got, expected) < 1e-5
    model = WithOther(ScaledInSetup(10, 8))
    with pytest.raises(ValueError, match="overrides setup"):
        split(model, IDS, {"layer/.*": NF4}, "layer/embedding")


def test_an_adapted_closure():
    frozen, adapters, floats = split(Gain(), X, {".*kernel": NF4}, "layer/kernel")
    loss = jax.grad(lambda f, a: jnp.sum(lora_jax.lora_apply(Gain(), {"params": f}, a, X) ** 2), 1)
    got, expected = jax.jit(loss)(frozen, adapters), jax.jit(loss)(floats, adapters)
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert relative_error(one, other) < 1e-4
    with jax.disable_jit():
        assert jnp.isfinite(lora_jax.lora_apply(Gain(), {"params": frozen}, adapters, X)).all()


class Mapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        doubled = lambda tree: jax.tree.map(lambda w: 2 * w, tree)  # noqa: E731
        dense = nn.map_variables(nn.Dense, "params", doubled, init=True)
        return nn.Dense(3, name="other")(dense(8, name="layer")(x))


def test_mapped_codes_are_refused():
    frozen, adapters, _ = split(Mapped(), X, {"layer/kernel": "int8"}, "other/kernel")
    with pytest.raises(ValueError, match=r"'layer/kernel' is quantized.*map_variables"):
        lora_jax.lora_apply(Mapped(), {"params": frozen}, adapters, X)


class Own(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(1.0), (8, 8))
        return x @ (w * self.param("s", nn.initializers.constant(3.0), (8,)))


def own(layer, w, x):
    return w.einsum("bd,dk->bk", x, w.value * layer.get_variable("params", "s"))


def test_a_handler_that_gives_its_own_kernel():
    handlers = lora_jax.Handlers().with_handler(Own, "w", handler=own)
    params = Own().init(KEY, X)["params"]
    base = lora_jax.quantize(params, {"w": NF4})
    config = LoraConfig([Rule("w", 2)], trainable=["s"])
    frozen, adapters = lora_jax.lora_init(KEY, base, config)

    def loss(adapters, frozen):
        y = lora_jax.lora_apply(Own(), {"params": frozen}, adapters, X, handlers=handlers)
        return jnp.sum(y**2)

    got, expected = (
        jax.value_and_grad(loss)(adapters, f) for f in (frozen, lora_jax.dequantize(frozen))
    )
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert relative_error(one, other) < 1e-5


def test_a_small_column_next_to_large_ones_keeps_its_own_scale():
    W = jax.random.normal(KEY, (64, 4)) * jnp.array([1.0, 1e-2, 1e-4, 0.0])
    q = lora_jax.quantize({"k": W}, {"k": "nf4"})["k"].unbox()
    errors = jnp.linalg.norm(q - W, axis=0)[:3] / jnp.linalg.norm(W, axis=0)[:3]
    assert errors.max() < 0.15
    assert not q[:, 3].any()


def test_numbers_that_have_no_scale_are_refused():
    with pytest.raises(ValueError, match="'k' has numbers that are too small"):
        lora_jax.quantize({"k": jnp.full((4, 4), 1e-37)}, {"k": "int8"})
    with pytest.raises(TypeError, match=r"'k' is a jax\.ShapeDtypeStruct"):
        lora_jax.quantize({"k": jax.ShapeDtypeStruct((4, 4), jnp.float32)}, {"k": "int8"})


def test_codes_are_not_rounded_stochastically():
    frozen, adapters, _ = split(nn.Dense(8), X, {"kernel": NF4}, "kernel")
    for function in (lora_jax.lora_merge, lora_jax.rounding):
        with pytest.raises(ValueError, match="one of the two"):
            function(frozen, adapters, key=KEY, requantize=True)


class TiedHead(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(10, 8, rngs=nnx.Rngs(0))

    def __call__(self, ids):
        return self.embed(ids) @ self.embed.embedding.T


def test_a_model_may_read_a_kernel_as_an_array():
    graphdef, state = nnx.split(TiedHead())
    base = lora_jax.quantize(state, {"embed/embedding": NF4})
    got = nnx.merge(graphdef, base)(IDS)
    assert relative_error(got, nnx.merge(graphdef, lora_jax.dequantize(base))(IDS)) < 1e-6
    leaf = base["embed"]["embedding"]
    assert jnp.asarray(leaf).shape == (10, 8)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        leaf.get_raw_value().nothing if hasattr(leaf, "get_raw_value") else leaf.raw_value.nothing


def test_loftq_on_a_mesh_with_explicit_axes():
    if not hasattr(jax, "set_mesh"):
        pytest.skip("in this jax explicit axes are not complete")
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((2, 2), ("a", "b"), (AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    W = jax.random.normal(KEY, (16, 8))
    split_of = [
        lora_jax.lora_init(KEY, {"k": one}, LoraConfig([Rule("k", 2)]))
        for one in (W, jax.device_put(W, NamedSharding(mesh, PartitionSpec("a", "b"))))
    ]
    alone, on_mesh = (lora_jax.loftq(*one, {"k": NF4}) for one in split_of)
    assert np.isclose(alone[2]["k"].with_adapter, on_mesh[2]["k"].with_adapter, rtol=1e-4)
    assert tuple(on_mesh[0]["k"].codes.sharding.spec) == ("a", "b")
    assert tuple(on_mesh[1]["k"].U.sharding.spec) == ("a", None)
