"""Kernels as codes: what they stand for, how many bytes they have, and what is refused."""

import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax
from lora_jax import KernelAxes, LoraConfig, Quantization, Rule
from lora_jax.core.quantized._array import scale_of
from lora_jax.core.quantized._blocks import spread
from lora_jax.core.quantized._kinds import NF4

KINDS = ("int8", "int4", "nf4", "fp8")
KEY = jax.random.key(0)


def normal(shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def one(W, kind, **options):
    return lora_jax.quantize({"kernel": W}, {"kernel": kind}, **options)["kernel"]


# --- what codes stand for ---

_OF_8_BITS = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn)
GRIDS = {
    "nf4": np.array(NF4),
    "int4": np.arange(-7, 8.0),
    "int8": np.arange(-127, 128.0),
    "fp8": np.array([x for x in map(float, _OF_8_BITS) if np.isfinite(x)]),
}
SHAPES = {
    "a matrix": ((128, 6), KernelAxes()),
    "one row": ((1, 5), KernelAxes()),
    "an odd number of inputs": ((67, 4), KernelAxes()),
    "odd": ((67, 3), KernelAxes()),
    "a convolution": ((3, 3, 40, 6), KernelAxes((0, 1, 2), (3,))),
    "two inputs, a stack": ((4, 3, 16, 5), KernelAxes((0, 2), (3,), (1,))),
    "outputs first": ((6, 128), KernelAxes((1,), (0,))),
}


QUICK = ("a matrix", "odd", "a convolution")


@pytest.mark.parametrize("double", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SHAPES],
)
def test_each_number_is_the_nearest_that_there_is_a_code_for(shape, kind, double):
    """In units of the scale of its block, which is the block's largest number, or near to it."""
    shape, axes = SHAPES[shape]
    W = normal(shape)
    leaf = one(W, Quantization(kind, 16, double), axes={"kernel": axes})
    assert leaf.shape == shape
    assert leaf.dtype == W.dtype
    got = np.asarray(leaf.unbox(), np.float64)
    scale = np.broadcast_to(spread(scale_of(leaf), shape), shape).astype(np.float64)
    grid = GRIDS[kind]
    units = np.asarray(W, np.float64) / scale
    nearest = np.abs(units[..., None] - grid).min(-1)
    assert np.abs(np.abs(got / scale - units) - nearest).max() < 1e-3 * np.abs(grid).max()
    blocks = axes.as_matrix(jnp.asarray(scale)).reshape(-1, axes.matrix_shape(shape)[1])
    largest = axes.as_matrix(jnp.abs(W)).max()
    assert blocks.max() * np.abs(grid).max() <= largest * 1.01
    if not double:  # the largest of each block has a code of its own
        exact = np.isclose(np.abs(units), np.abs(grid).max(), rtol=1e-5)
        assert exact.sum() >= np.asarray(scale_of(leaf)).size


def test_known_codes():
    """Of a column: NF4 by appendix E of QLoRA, integers by rounding."""
    W = jnp.array([[-2.0], [0.0], [0.68], [2.0]])
    assert one(W, Quantization("nf4", 4, False)).codes.ravel().tolist() == [
        0 + (7 << 4),
        11 + (15 << 4),
    ]
    assert one(W, "int8").codes.ravel().tolist() == [-127, 0, 43, 127]
    assert jnp.allclose(one(W, "int8").unbox().ravel(), jnp.array([-2, 0, 43 * 2 / 127, 2]))


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind):
    W = jnp.zeros((64, 3)).at[:, 1].set(1.0)
    got = one(W, kind).unbox()
    assert jnp.array_equal(got == 0, W == 0)
    assert jnp.allclose(got, W)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_of_16_bits(dtype):
    W = normal((128, 32), dtype)
    leaf = one(W, "int8")
    assert leaf.unbox().dtype == dtype
    assert jnp.abs(leaf.unbox() - W).max() < 0.03


# int8 and fp8 at most 0.55 of bfloat16, int4 and nf4 0.32, with double quantization 0.27.
BYTES = {
    Quantization("int8"): 0.55,
    Quantization("fp8"): 0.55,
    Quantization("int4", double_quant=False): 0.32,
    Quantization("nf4", double_quant=False): 0.32,
    Quantization("int4"): 0.27,
    Quantization("nf4"): 0.27,
}


@pytest.mark.parametrize("quantization", BYTES, ids=str)
@pytest.mark.parametrize(
    ("shape", "axes"),
    [((576, 1536), KernelAxes()), ((3, 12, 64, 768), KernelAxes((1, 2), (3,), (0,)))],
)
def test_bytes(quantization, shape, axes):
    W = normal(shape, jnp.bfloat16)
    leaf = one(W, quantization, axes={"kernel": axes})
    assert leaf.nbytes == sum(x.nbytes for x in jax.tree.leaves(leaf))
    assert leaf.nbytes <= BYTES[quantization] * W.nbytes


# --- in a tree ---


def test_boxes_say_what_they_said():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.normal(), ("data", "model"))
            return nn.Dense(6, kernel_init=init)(x)

    model, x = Model(), normal((2, 8))
    params = model.init(KEY, x)["params"]
    base = lora_jax.quantize(params, {".*kernel": "nf4"})
    spec = nn.get_partition_spec(base)["Dense_0"]["kernel"]
    assert tuple(spec) == ("data", "model")
    floats = lora_jax.dequantize(base)
    assert floats["Dense_0"]["kernel"].names == ("data", "model")
    assert jnp.array_equal(model.apply({"params": base}, x), model.apply({"params": floats}, x))
    config = LoraConfig([Rule(".*kernel", 2, variant="dora")])
    frozen, adapters = lora_jax.lora_init(KEY, base, config)
    mesh = jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1])
    found = lora_jax.shardings(frozen, adapters, mesh=mesh)["Dense_0"]["kernel"]
    assert tuple(found.U.spec) == ("data", None)
    merged = lora_jax.lora_merge(frozen, adapters)
    assert merged["Dense_0"]["kernel"].names == ("data", "model")


class Doubled(nnx.Param):
    """A variable that says what a layer sees, in newer versions of Flax by a method."""

    if hasattr(nnx.Param, "get_value"):

        def get_value(self, **kwargs):
            return 2 * super().get_value(**kwargs)


@pytest.mark.parametrize("kind", [nnx.Param, Doubled])
def test_variables_are_of_their_types(kind):
    linear = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    linear.kernel = kind(jax.random.normal(KEY, (8, 6)))
    graphdef, state = nnx.split(linear)
    base = lora_jax.quantize(state, {"kernel": "int8"})
    assert isinstance(base["kernel"], kind)
    x = normal((2, 8))
    assert jnp.abs(nnx.merge(graphdef, base)(x) - linear(x)).max() < 0.1
    floats = lora_jax.dequantize(base)
    if hasattr(nnx.Param, "get_value"):  # older variables keep the hook that reads them
        assert jax.tree.structure(floats) == jax.tree.structure(state)
    assert jnp.array_equal(nnx.merge(graphdef, floats)(x), nnx.merge(graphdef, base)(x))
    copy = pickle.loads(pickle.dumps(base["kernel"]))
    assert type(copy) is type(base["kernel"])
    again = jax.jit(lambda base: nnx.merge(graphdef, base)(x))
    assert jnp.allclose(again(base), nnx.merge(graphdef, base)(x))


def test_first_pattern_counts():
    params = {"a": {"kernel": normal((8, 4))}, "b": {"kernel": normal((8, 4))}}
    base = lora_jax.quantize(params, {"a/kernel": "int8", ".*kernel": Quantization("nf4", 4)})
    kinds = {name: base[name]["kernel"].quantization.kind for name in base}
    assert kinds == {"a": "int8", "b": "nf4"}


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(8, name="first")(x)))


def test_all_linear_leaves_the_head():
    model, x = Mlp(), normal((2, 4))
    variables = model.init(KEY, x)
    axes = lora_jax.kernel_axes(model, variables, x)
    base = lora_jax.quantize(variables["params"], {"all-linear": "int8"}, axes=axes)
    assert isinstance(base["first"]["kernel"], lora_jax.QuantizedArray)
    assert not isinstance(base["head"]["kernel"], lora_jax.QuantizedArray)


PARAMS = {"kernel": normal((8, 4)), "bias": jnp.zeros(4), "conv": {"kernel": normal((3, 3, 4, 4))}}
REFUSED = {
    "a pattern of nothing": ({"kernal": "nf4"}, r"'kernal' matches no parameter.*'kernel'"),
    "a bias": ({"bias": "int8"}, r"'bias', of shape \(4,\), which is not a matrix"),
    "a convolution": ({"conv/kernel": "int8"}, r"'conv/kernel', of shape .*axes="),
    "no such kind": ({"kernel": "int3"}, r"no kind of quantization 'int3'.*nf4"),
    "no kind": ({"kernel": 8}, r"kinds\['kernel'\] must be one of int8"),
    "no mapping": ("nf4", r"kinds must be a mapping"),
    "linear layers": ({"all-linear": "nf4"}, r"kernel_axes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    kinds, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=message):
        lora_jax.quantize(PARAMS, kinds)


def test_a_pattern_that_never_counts():
    with pytest.raises(ValueError, match=r"'kernel' never counts"):
        lora_jax.quantize({"kernel": normal((8, 4))}, {"k.*": "int8", "kernel": "nf4"})


def test_what_has_no_codes_is_refused():
    W = normal((8, 4))
    with pytest.raises(ValueError, match="'kernel' has NaN"):
        one(W.at[0, 0].set(jnp.nan), "nf4")
    with pytest.raises(ValueError, match=r"'kernel' is quantized.*dequantize"):
        lora_jax.quantize({"kernel": one(W, "int8")}, {"kernel": "nf4"})
    with pytest.raises(ValueError, match="int32 at 'kernel'"):
        one(jnp.ones((4, 4), jnp.int32), "int8")
    with pytest.raises(ValueError, match="no numbers"):
        one(jnp.ones((0, 4)), "int8")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"block_size": -1}, ValueError),
        ({"block_size": 1.5}, TypeError),
        ({"double_quant": 1}, TypeError),
    ],
)
def test_quantization_is_checked(options, error):
    with pytest.raises(error, match=next(iter(options))):
        Quantization("nf4", **options)


def test_nothing_quantized_is_fully_trained():
    base = {"kernel": one(normal((8, 4)), "int8")}
    with pytest.raises(ValueError, match="'kernel' is quantized, and cannot be fully trained"):
        lora_jax.lora_init(KEY, base, LoraConfig(trainable=["kernel"]))


# --- what a transform leaves of a kernel ---


def test_a_slice_that_is_not_known_is_refused():
    """Of two stacks one is sliced off by JAX itself, and which one decides what a byte holds."""
    axes = {"kernel": KernelAxes((1,), (3,), (0, 2))}
    leaf = one(normal((2, 8, 2, 4)), "nf4", axes=axes)
    sliced = jax.tree.map(lambda x: x[0], leaf)
    with pytest.raises(ValueError, match="not known which are left"):
        sliced.dequantize()
    told = sliced.replace(packing=leaf.remove_axis(0, {}).packing)  # as nn.scan does
    assert jnp.array_equal(told.dequantize(), leaf.dequantize()[0])


def test_boxed_axes_come_and_go():
    axes = {"kernel": KernelAxes((0,), (2,), (1,))}
    leaf = one(normal((8, 3, 4)), "nf4", axes=axes)
    assert leaf.remove_axis(1, {}).add_axis(1, {}).packing == leaf.packing
    inner = jax.tree.map(lambda x: x[:, 1], leaf)
    assert jnp.array_equal(inner.dequantize(), leaf.dequantize()[:, 1])
