"""The layers of Flax: what stays theirs around the product, and which of them are refused."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from helpers import dense_case, random_like, random_variables, relative_error

import lora_jax
from lora_jax import LoraConfig, Rule

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(5), (4, 6))
NORMAL = nn.initializers.normal()
KERNELS = r"(.*/)?(kernel|embedding)"


class RoundsWeights:
    """A dot_general as quantization libraries inject it."""

    def __call__(self, x, W, dims, **kwargs):
        return jax.lax.dot_general(x, jnp.round(W * 4) / 4, dims, **kwargs)


@pytest.mark.parametrize(
    "options", [{"dot_general": RoundsWeights()}, {"dot_general_cls": RoundsWeights}]
)
def test_injected_dot_general_is_for_the_base_only(options):
    model, x = nn.Dense(5, **options), jax.random.normal(jax.random.key(3), (2, 4))
    frozen, adapters = dense_case(model, x)
    U, V = adapters["kernel"].U, adapters["kernel"].V
    y = lora_jax.lora_apply(model, {"params": frozen}, adapters, x)
    expected = x @ (jnp.round(frozen["kernel"] * 4) / 4) + frozen["bias"] + x @ U @ V
    assert relative_error(y, expected) < 1e-6


class Keyword(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.layer(inputs=x)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dense(3),
        nn.DenseGeneral((3, 2)),
        nn.Einsum((6, 3), "...d,dk->...k"),
        nn.Conv(3, (3,)),
        nn.ConvTranspose(3, (3,)),
        nn.ConvLocal(3, (3,)),
        nn.Embed(7, 3),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_called_by_keyword(layer):
    x = jnp.arange(4) if isinstance(layer, nn.Embed) else jnp.ones((2, 5, 6))
    model = Keyword(layer)
    variables = random_variables(model, x)
    axes = lora_jax.kernel_axes(model, variables, x)
    config = lora_jax.LoraConfig([lora_jax.Rule(KERNELS, 2)])
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), variables["params"], config, axes=axes)
    y = lora_jax.lora_apply(model, {"params": frozen}, adapters, x)
    assert jnp.array_equal(y, model.apply(variables, x))


PRECISE = {
    "Dense": (nn.Dense(4, precision="highest"), (2, 5)),
    "DenseGeneral": (nn.DenseGeneral((2, 3), axis=(-2, -1), precision="highest"), (2, 5, 3)),
    "batched": (nn.DenseGeneral(3, batch_dims=(0,), precision="highest"), (2, 5, 3)),
    "attention": (nn.MultiHeadDotProductAttention(2, precision="highest"), (2, 5, 4)),
    "Einsum": (nn.Einsum((5, 4), "bd,dk->bk", precision="highest"), (2, 5)),
    "Conv": (nn.Conv(4, (3,), precision="highest"), (2, 5, 6)),
    "groups": (nn.Conv(4, (3,), feature_group_count=2, precision="highest"), (2, 5, 6)),
    "ConvLocal": (nn.ConvLocal(4, (3,), precision="highest"), (2, 5, 6)),
    "ConvTranspose": (nn.ConvTranspose(4, (3,), precision="highest"), (2, 5, 6)),
}


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("layer", PRECISE)
def test_every_product_has_the_precision_of_its_layer(layer, variant):
    """Forwards and backwards, with `U` and with `V`."""
    model, shape = PRECISE[layer]
    x = jnp.ones(shape)
    params = model.init(jax.random.key(0), x)["params"]
    axes = lora_jax.kernel_axes(model, {"params": params}, x)
    config = lora_jax.LoraConfig([lora_jax.Rule(".*kernel", 1, variant=variant)])
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config, axes=axes)

    def loss(adapters, x):
        return jnp.sum(lora_jax.lora_apply(model, {"params": frozen}, adapters, x))

    text = jax.jit(jax.grad(loss, (0, 1))).lower(adapters, x).as_text()
    products = [line for line in text.splitlines() if re.search("dot_general|convolution", line)]
    assert len(products) >= 4
    assert not [line for line in products if "HIGHEST" not in line]


# --- what is refused ---


def test_masked_convolution_is_refused():
    model = nn.Conv(4, (3,), mask=jnp.ones((3, 6, 4)))
    variables = random_variables(model, X[None])
    axes = lora_jax.kernel_axes(model, variables, X[None])
    assert axes.kernels["kernel"].inputs == (0, 1)
    assert list(axes) == []
    with pytest.raises(ValueError, match=r"'kernel' .*has a mask.*materialize=True"):
        lora_jax.lora_init(KEY, variables["params"], LoraConfig([Rule("kernel", 2)]), axes=axes)
    config = LoraConfig([Rule("kernel", 2, input_axes=(0, 1))])
    frozen, adapters = lora_jax.lora_init(KEY, variables["params"], config)
    with pytest.raises(ValueError, match=r"'kernel' .*has a mask.*materialize=True"):
        lora_jax.lora_apply(model, {"params": frozen}, adapters, X[None])


@pytest.mark.parametrize("use_bias", [True, False])
def test_equation_that_is_no_matrix_product(use_bias):
    """The model still runs, other layers can be adapted, and the error names this one."""
    model = nn.Sequential(
        [nn.Einsum((6,), "td,d->td", use_bias=use_bias, kernel_init=NORMAL), nn.Dense(3)]
    )
    variables = random_variables(model, X)
    axes = lora_jax.kernel_axes(model, variables, X)
    assert set(axes) == {"layers_1/kernel"}
    config = LoraConfig([Rule(".*kernel", 2)])
    with pytest.raises(ValueError, match=r"'layers_0/kernel' \(6,\).*(no matrix|must share)"):
        lora_jax.lora_init(KEY, variables["params"], config, axes=axes)


def test_dropout_of_a_lookup_is_refused():
    model, tokens = nn.Embed(11, 6), jnp.arange(4)
    params = model.init(KEY, tokens)["params"]
    config = LoraConfig([Rule("embedding", 2, dropout=0.5)])
    frozen, adapters = lora_jax.lora_init(KEY, params, config)
    lora_jax.lora_apply(model, {"params": frozen}, adapters, tokens)
    with pytest.raises(ValueError, match=r"'embedding' has dropout.*int32.*dropout=0"):
        lora_jax.lora_apply(model, {"params": frozen}, adapters, tokens, rngs={"dropout": KEY})


@pytest.mark.parametrize("model", [nn.Conv(30, (3,)), nn.Einsum((6, 30), "...d,dk->...k")])
def test_dropout_of_other_layers(model):
    x = jnp.ones((2, 5, 6))
    variables = random_variables(model, x)
    axes = lora_jax.kernel_axes(model, variables, x)
    config = LoraConfig([Rule("kernel", 2, dropout=0.5)])
    frozen, adapters = lora_jax.lora_init(KEY, variables["params"], config, axes=axes)
    adapters = random_like(adapters)

    def apply(**kwargs):
        return lora_jax.lora_apply(model, {"params": frozen}, adapters, x, **kwargs)

    assert relative_error(apply(rngs={"dropout": KEY}), apply()) > 1e-2


def test_embedding_of_one_row():
    """Flax broadcasts it instead of looking it up."""
    model, tokens = nn.Embed(1, 6), jnp.zeros((2, 3), int)
    params = model.init(KEY, tokens)["params"]
    frozen, adapters = lora_jax.lora_init(KEY, params, LoraConfig([Rule("embedding", 1)]))
    adapters = random_like(adapters)
    y = lora_jax.lora_apply(model, {"params": frozen}, adapters, tokens)
    merged = lora_jax.lora_merge(frozen, adapters)
    assert relative_error(y, model.apply({"params": merged}, tokens)) < 1e-6


def standardized(base, name="kernel"):
    """A subclass that normalizes its kernel on the way to the product, as many are written."""

    class Standardized(base):
        def param(self, param_name, *args, **kwargs):
            value = super().param(param_name, *args, **kwargs)
            return value / (jnp.std(value) + 1e-5) if param_name == name else value

    return Standardized


def tanh_of_kernel(x, kernel, bias, **kwargs):
    return x, jnp.tanh(kernel), bias


class ScaledEmbed(nn.Embed):
    def setup(self):
        super().setup()
        self.embedding = self.embedding * 3.0


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (standardized(nn.Dense)(5), "overrides param"),
        (standardized(nn.Conv)(5, (3,)), "overrides param"),
        (standardized(nn.ConvTranspose)(5, (3,)), "overrides param"),
        (standardized(nn.Einsum)((6, 5), "...d,dk->...k"), "overrides param"),
        (standardized(nn.Embed, "embedding")(11, 5), "overrides param"),
        (ScaledEmbed(11, 5), "overrides setup"),
        (nn.Dense(5, promote_dtype=tanh_of_kernel), "promote_dtype does more"),
    ],
)
def test_layer_that_computes_with_another_kernel(model, reason):
    """It is refused, and right where its kernel is materialized."""
    x = jnp.arange(5) if isinstance(model, nn.Embed) else X[None]
    name = "embedding" if isinstance(model, nn.Embed) else "kernel"
    variables = random_variables(model, x)
    axes = lora_jax.kernel_axes(model, variables, x)
    config = LoraConfig([Rule(name, 2)])
    with pytest.raises(ValueError, match=rf"'{name}'.*{reason}.*materialize=True"):
        lora_jax.lora_init(KEY, variables["params"], config, axes=axes)
    kernel = variables["params"][name]
    inputs = tuple(range(kernel.ndim - 1))
    for materialize in (True, False):
        config = LoraConfig([Rule(name, 2, materialize=materialize, input_axes=inputs)])
        frozen, adapters = lora_jax.lora_init(KEY, variables["params"], config)
        adapters = random_like(adapters)
        if materialize:
            y = lora_jax.lora_apply(model, {"params": frozen}, adapters, x)
            merged = lora_jax.lora_merge(frozen, adapters)
            assert jnp.array_equal(y, model.apply({"params": merged}, x))
        else:
            with pytest.raises(ValueError, match=rf"'{name}'.*{reason}.*materialize=True"):
                lora_jax.lora_apply(model, {"params": frozen}, adapters, x)


class OffsetEmbed(nn.Embed):
    """A larger table than Flax's own, as OPT has it for its positions."""

    def setup(self):
        shape = (self.num_embeddings + 2, self.features)
        self.embedding = self.param("embedding", self.embedding_init, shape, self.param_dtype)

    def __call__(self, positions):
        return super().__call__(positions + 2)


def test_own_setup_that_keeps_the_kernel():
    model, x = OffsetEmbed(5, 4), jnp.arange(5)
    variables = random_variables(model, x)
    axes = lora_jax.kernel_axes(model, variables, x)
    config = LoraConfig([Rule("embedding", 2, variant="dora")])
    frozen, adapters = lora_jax.lora_init(KEY, variables["params"], config, axes=axes)
    adapters = random_like(adapters)
    y = lora_jax.lora_apply(model, {"params": frozen}, adapters, x)
    merged = lora_jax.lora_merge(frozen, adapters)
    assert relative_error(y, model.apply({"params": merged}, x)) < 1e-5


def casts(*arrays, dtype=None, **kwargs):
    return [None if a is None else a.astype(dtype or jnp.float32) for a in arrays]


def test_own_promotion_of_dtypes_is_no_other_kernel():
    model = nn.Dense(5, promote_dtype=casts)
    variables = random_variables(model, X)
    axes = lora_jax.kernel_axes(model, variables, X)
    assert not axes.refused
