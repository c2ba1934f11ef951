"""Models that hold every layer of Flax in every way that its users write it."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from helpers import random_like, random_variables

WIDTH = 6


class Parts(nn.Module):
    """A model of which a method runs a part."""

    def setup(self):
        self.encoder = nn.Dense(6)
        self.head = nn.Dense(3)

    def __call__(self, x):
        return self.head(self.encoder(x))

    def encode(self, x):
        return self.encoder(x)


class Mapped(nn.Module):
    """A dense layer of bounded weights."""

    layer: type[nn.Module] = nn.Dense
    by_class: bool = True

    @nn.compact
    def __call__(self, x):
        def bounded(tree):
            return tree if self.is_initializing() else jax.tree.map(jnp.tanh, tree)

        if self.by_class:
            mapped = nn.map_variables(self.layer, "params", bounded, init=self.is_initializing())
            return mapped(5)(x)

        def call(layer, x):
            return layer(x)

        mapped = nn.map_variables(call, "params", bounded, init=self.is_initializing())
        return mapped(self.layer(5), x)


class Compact(nn.Module):
    dense: Any = nn.Dense

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(self.dense(8, name="first")(x))
        return self.dense(WIDTH, name="second")(x)


class Setup(nn.Module):
    def setup(self):
        self.layers = [nn.Dense(8), nn.Dense(WIDTH, use_bias=False)]

    def __call__(self, x):
        for layer in self.layers:
            x = nn.tanh(layer(x))
        return x


class Activated(nn.Dense):
    """What surrounds the product must see the adapted product, once."""

    @nn.compact
    def __call__(self, x):
        return 2.0 * nn.gelu(super().__call__(1.0 + x)) + x[..., :1]


class MoreActivated(Activated):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(super().__call__(x))


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(WIDTH, name="shared")
        return layer(nn.tanh(layer(x)))


class Block(nn.Module):
    width: int = WIDTH

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Dense(9, name="up")(x)
        return x + nn.Dense(self.width, name="down")(nn.tanh(y)), None


class Stack(nn.Module):
    """Blocks one after another, each behind a lifted transform."""

    transform: Any
    block: Any = Block

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x, _ = self.transform(self.block)(name=f"block_{i}")(x)
        return x


class Scan(nn.Module):
    axis: int
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        scan = nn.scan(block, {"params": self.axis}, split_rngs={"params": True}, length=3)
        return scan(name="blocks")(x, None)[0]


class Repeat(nn.Module):
    """Three blocks in a scan."""

    block: Any
    axis: int

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(self.block, {"params": self.axis}, split_rngs={"params": True}, length=3)
        return scan(name="blocks")(x, None)[0]


class ScanOfScan(nn.Module):
    outer: int
    inner: int

    @nn.compact
    def __call__(self, x):
        inner = nn.scan(Block, {"params": self.inner}, split_rngs={"params": True}, length=2)
        outer = nn.scan(inner, {"params": self.outer}, split_rngs={"params": True}, length=3)
        return outer(name="blocks")(x, None)[0]


class Vmap(nn.Module):
    """One kernel for each of the leading axis of x, or one for all."""

    axis: int | None

    @nn.compact
    def __call__(self, x):
        dense = nn.vmap(nn.Dense, {"params": self.axis}, {"params": self.axis is not None})
        return dense(WIDTH, name="experts")(x)


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return self.inner(nn.remat(nn.Dense)(8, name="outer")(x))

    @nn.remat
    @nn.compact
    def inner(self, x):
        return nn.Dense(WIDTH, name="inner")(nn.tanh(x))


class JitMethod(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(WIDTH, name="inner")(x))


class SharesScope(nn.Module):
    """The parameters of the inner Dense lie in this module's own dict."""

    def setup(self):
        self.inner = nn.Dense(WIDTH)
        nn.share_scope(self, self.inner)

    def __call__(self, x):
        return self.inner(nn.tanh(x))


class Normed(nn.Module):
    """Other collections: batch statistics and sown intermediates."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Dense(WIDTH, name="dense")(x)
        self.sow("intermediates", "hidden", x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(3, name="head")(x)


def boxed(features, name=None):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    return nn.Dense(features, kernel_init=init, name=name)


def dense(**kwargs):
    return lambda features, name=None: nn.Dense(features, name=name, **kwargs)


class Attention(nn.Module):
    """Attention of a scanned block, as decoders have it."""

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, name="attention")(x)
        return x + y, None


class Einsum(nn.Module):
    """The equation may come with the call."""

    shape: tuple[int, ...]
    equation: str
    at_call: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @nn.compact
    def __call__(self, x):
        layer = nn.Einsum(self.shape, None if self.at_call else self.equation, **self.options)
        return layer(x, self.equation) if self.at_call else layer(x)


class Convolutions(nn.Module):
    """Convolutions one after another, and a mean over all but the batch and the features."""

    layers: tuple[nn.Module, ...]

    @nn.compact
    def __call__(self, x):
        for layer in self.layers:
            x = nn.tanh(layer(x))
        return x


class Tied(nn.Module):
    """One embedding for the tokens and for the logits."""

    dtype: Any = None

    def setup(self):
        self.embed = nn.Embed(11, WIDTH, dtype=self.dtype)
        self.dense = nn.Dense(WIDTH, dtype=self.dtype)

    def __call__(self, tokens):
        return self.embed.attend(nn.tanh(self.dense(self.embed(tokens))))


class EveryLayer(nn.Module):
    """One of each kind, to be put behind a transform."""

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Einsum((WIDTH, 2, 3), "btd,dhk->bthk", name="einsum")(x)
        y = nn.DenseGeneral(WIDTH, axis=(-2, -1), name="general")(jnp.tanh(y))
        y = nn.Conv(4, (3,), name="conv")(jnp.tanh(y))
        y = nn.ConvTranspose(WIDTH, (2,), name="transpose")(jnp.tanh(y))
        y = nn.ConvLocal(WIDTH, (2,), name="local")(jnp.tanh(y))
        embed = nn.Embed(5, WIDTH, name="embed")
        return x + embed.attend(jnp.tanh(y)) @ embed(jnp.arange(5)), None


class VmapEveryLayer(nn.Module):
    """A model for each of the leading axis of x, its parameters stacked on the last axis."""

    @nn.compact
    def __call__(self, x):
        return nn.vmap(EveryLayer, {"params": -1}, {"params": True})(name="many")(x)[0]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, the shape of its input, and which axes of its kernels are what.

    `axes` has for the last part of a path `(inputs, outputs, stacks)`, said by hand; a kernel that
    it does not name is a matrix, stacked on `batch_axes`.
    """

    model: nn.Module
    shape: tuple[int, ...] = (4, WIDTH)
    batch_axes: tuple[int, ...] = ()
    axes: dict[str, tuple[tuple[int, ...], ...]] = dataclasses.field(default_factory=dict)
    freeze: bool = False
    x_dtype: Any = jnp.float32
    exact: bool = True  # computes and stores in float32
    bitwise: bool = True  # XLA compiles the product alike with and without a term added to it

    def init(self):
        """The variables and an input."""
        if jnp.issubdtype(self.x_dtype, jnp.integer):
            x = jnp.arange(math.prod(self.shape)).reshape(self.shape).astype(self.x_dtype) % 11
        else:
            x = random_like(jnp.zeros(self.shape, self.x_dtype), seed=7, scale=1.0)
        return random_variables(self.model, x), x

    def axes_of(self, path, ndim):
        """`(inputs, outputs, stacks)` of a kernel."""
        for name, axes in self.axes.items():
            if path.endswith(name):
                return axes
        stacks = tuple(sorted(axis % ndim for axis in self.batch_axes))
        inputs, outputs = (axis for axis in range(ndim) if axis not in stacks)
        return (inputs,), (outputs,), stacks


def conv(shape, *layers, exact=True):
    inputs = tuple(range(len(layers[0].kernel_size) + 1))
    return Case(Convolutions(layers), shape, axes={"": (inputs, (len(inputs),), ())}, exact=exact)


BF16 = jnp.bfloat16
# A field that the oldest Flax does not have.
PREFERRED = {"dtype": BF16} | (
    {"preferred_element_type": jnp.float32} if hasattr(nn.Einsum, "preferred_element_type") else {}
)
ATTENTION = {"out/kernel": ((0, 1), (2,), ()), "kernel": ((0,), (1, 2), ())}
CASES = {
    "compact": Case(Compact()),
    "setup": Case(Setup()),
    "subclass": Case(Compact(Activated)),
    "subclass of subclass": Case(Compact(MoreActivated)),
    "called twice": Case(Twice()),
    "remat": Case(Remat()),
    "remat of blocks": Case(Stack(nn.remat)),
    "jit of Dense": Case(Compact(nn.jit(nn.Dense))),
    "jit of blocks": Case(Stack(nn.jit)),
    "jit of subclass": Case(Compact(nn.jit(Activated))),
    "jit of a method": Case(JitMethod()),
    "jit of remat": Case(Stack(lambda cls: nn.jit(nn.remat(cls)))),
    "vmap, axis 0": Case(Vmap(0), (3, 4, WIDTH), (0,)),
    "vmap, axis 1": Case(Vmap(1), (3, 4, WIDTH), (1,)),
    "vmap, shared": Case(Vmap(None), (3, 4, WIDTH)),
    "scan, axis 0": Case(Scan(0), batch_axes=(0,)),
    "scan, axis 1": Case(Scan(1), batch_axes=(1,)),
    "scan, axis -1": Case(Scan(-1), batch_axes=(-1,)),
    "scan of remat": Case(Scan(0, remat=True), batch_axes=(0,)),
    "scan of scan, axes 1, 1": Case(ScanOfScan(1, 1), batch_axes=(1, 2)),
    "scan of scan, axes 0, 1": Case(ScanOfScan(0, 1), batch_axes=(0, 2)),
    "share_scope": Case(SharesScope()),
    "boxed": Case(Compact(boxed)),
    "FrozenDict": Case(Compact(), freeze=True),
    "no batch": Case(Compact(), (WIDTH,), bitwise=False),
    "many batch axes": Case(Compact(), (2, 1, 3, WIDTH)),
    "other collections": Case(Normed()),
    "bfloat16 compute": Case(Compact(dense(dtype=BF16)), exact=False),
    "bfloat16 parameters": Case(Compact(dense(param_dtype=BF16)), exact=False),
    "bfloat16 parameters, float32 compute": Case(
        Compact(dense(dtype=jnp.float32, param_dtype=BF16)), exact=False
    ),
    "bfloat16 parameters and input": Case(
        Compact(dense(param_dtype=BF16)), x_dtype=BF16, exact=False
    ),
    "float16 compute": Case(Compact(dense(dtype=jnp.float16)), exact=False),
    "DenseGeneral, two outputs": Case(
        nn.DenseGeneral((3, 2)), (4, 5, WIDTH), axes={"": ((0,), (1, 2), ())}
    ),
    "DenseGeneral, two inputs": Case(
        nn.DenseGeneral(7, axis=(1, -1)), (4, 3, 2, WIDTH), axes={"": ((0, 1), (2,), ())}
    ),
    "DenseGeneral, batch axes": Case(
        nn.DenseGeneral((3, 2), axis=-1, batch_dims=(0,)),
        (2, 5, WIDTH),
        axes={"": ((1,), (2, 3), (0,))},
    ),
    "attention": Case(
        nn.MultiHeadDotProductAttention(2, qkv_features=8), (2, 5, WIDTH), axes=ATTENTION
    ),
    "attention in bfloat16": Case(
        nn.MultiHeadDotProductAttention(2, dtype=BF16), (2, 5, WIDTH), axes=ATTENTION, exact=False
    ),
    "attention, scan, axis -1, remat": Case(
        Repeat(nn.remat(Attention, prevent_cse=False), -1),
        (2, 5, WIDTH),
        axes={"out/kernel": ((0, 1), (2,), (3,)), "kernel": ((0,), (1, 2), (3,))},
        bitwise=False,
    ),
    "Einsum": Case(
        Einsum((WIDTH, 3, 2), "btd,dhk->bhtk"), (4, 5, WIDTH), axes={"": ((0,), (1, 2), ())}
    ),
    "Einsum at call, stacked": Case(
        Einsum((3, 5, WIDTH), "ecd,efd->cef", at_call=True, options={"use_bias": False}),
        (3, 4, WIDTH),
        axes={"": ((2,), (1,), (0,))},
    ),
    "Einsum, stack last, with bias": Case(
        Einsum((WIDTH, 5, 3), "ced,dfe -> efc"), (4, 3, WIDTH), axes={"": ((0,), (1,), (2,))}
    ),
    "Einsum with ellipsis and a sum": Case(
        Einsum((WIDTH, 5), "...sd,dk->...k", at_call=True), (2, 3, 4, WIDTH)
    ),
    "Einsum in bfloat16": Case(
        Einsum((WIDTH, 5), "...d,dk->...k", options={"dtype": BF16}), (2, 3, WIDTH), exact=False
    ),
    "Conv, 1-D": conv((2, 7, 3), nn.Conv(4, (3,)), nn.Conv(5, (2,), padding="CAUSAL")),
    "Conv, 2-D": conv(
        (2, 8, 9, 3),
        nn.Conv(4, (3, 2), strides=2, padding="VALID"),
        nn.Conv(5, (3, 3), kernel_dilation=2, padding="CIRCULAR"),
        nn.Conv(6, (2, 3), padding=((1, 0), (2, 1)), use_bias=False),
        nn.Conv(4, (2, 2), input_dilation=2, padding=((1, 1), (0, 2))),
        nn.Conv(4, (2, 2), padding="REFLECT"),
    ),
    "Conv, 3-D": conv((2, 4, 5, 3, 2), nn.Conv(4, (3, 2, 2))),
    "Conv, 1 x 1": conv((2, 4, 5, 3), nn.Conv(4, (1, 1))),
    "Conv, groups": conv((2, 6, 5, 4), nn.Conv(6, (3, 3), feature_group_count=2)),
    "Conv, depthwise": conv((2, 6, 5, 4), nn.Conv(8, (3, 3), feature_group_count=4)),
    "Conv, no batch": conv((6, 5, 3), nn.Conv(4, (3, 3))),
    "Conv, many batch axes": conv((2, 3, 6, 5, 3), nn.Conv(4, (3, 3))),
    "Conv in bfloat16": conv((2, 6, 5, 3), nn.Conv(4, (3, 3), dtype=BF16), exact=False),
    "Conv, remat and jit": conv(
        (2, 6, 5, 3), nn.remat(nn.Conv)(4, (3, 3)), nn.jit(nn.Conv)(3, (3, 3))
    ),
    "ConvTranspose": conv(
        (2, 4, 5, 3),
        nn.ConvTranspose(4, (3, 2), strides=(2, 1)),
        nn.ConvTranspose(3, (4, 4), strides=(2, 2), padding="CIRCULAR"),
        nn.ConvTranspose(2, (2, 2), kernel_dilation=(2, 1), padding="VALID", use_bias=False),
    ),
    "ConvTranspose, kernel transposed": Case(
        nn.ConvTranspose(4, (3, 3), strides=(2, 2), transpose_kernel=True),
        (2, 4, 5, 3),
        axes={"": ((0, 1, 3), (2,), ())},
    ),
    "ConvTranspose, no batch, bfloat16": conv(
        (4, 5, 3), nn.ConvTranspose(4, (3, 3), dtype=BF16), exact=False
    ),
    "ConvLocal, 1-D": Case(
        nn.ConvLocal(4, (3,), padding="VALID"), (2, 7, 3), axes={"": ((1,), (2,), (0,))}
    ),
    "ConvLocal, 2-D": Case(
        nn.ConvLocal(4, (3, 2), strides=2), (2, 6, 5, 3), axes={"": ((2,), (3,), (0, 1))}
    ),
    "Embed": Case(nn.Embed(11, WIDTH), (2, 5), x_dtype=jnp.int32),
    "Embed, tied": Case(Tied(), (2, 5), x_dtype=jnp.int32),
    "Embed, tied, in bfloat16": Case(Tied(BF16), (2, 5), x_dtype=jnp.uint8, exact=False),
    "attention, bfloat16 parameters": Case(
        nn.MultiHeadDotProductAttention(2, param_dtype=BF16),
        (2, 5, WIDTH),
        axes=ATTENTION,
        exact=False,
    ),
    "Conv, bfloat16 parameters": conv(
        (2, 6, 5, 3), nn.Conv(4, (3, 3), param_dtype=BF16), exact=False
    ),
    "ConvTranspose, bfloat16 parameters": conv(
        (2, 6, 5, 3), nn.ConvTranspose(4, (3, 3), param_dtype=BF16), exact=False
    ),
    "Einsum, bfloat16 parameters": Case(
        Einsum((WIDTH, 5), "...d,dk->k...", options={"param_dtype": BF16}), (3, WIDTH), exact=False
    ),
    "Embed, bfloat16 parameters": Case(
        nn.Embed(11, WIDTH, param_dtype=BF16), (2, 5), x_dtype=jnp.int32, exact=False
    ),
    "Einsum, preferred float32": Case(
        Einsum((WIDTH, 5), "...d,dk->...k", options=PREFERRED), (2, 3, WIDTH), exact=False
    ),
    "every layer, scan, axis 1, remat": Case(
        Repeat(nn.remat(EveryLayer, prevent_cse=False), 1),
        (2, 5, WIDTH),
        axes={
            "einsum/kernel": ((0,), (2, 3), (1,)),
            "local/kernel": ((2,), (3,), (0, 1)),
            "embedding": ((0,), (2,), (1,)),
            "kernel": ((0, 2), (3,), (1,)),
        },
    ),
    "every layer, vmap, axis -1": Case(
        VmapEveryLayer(),
        (3, 2, 5, WIDTH),
        axes={
            "einsum/kernel": ((0,), (1, 2), (3,)),
            "local/kernel": ((1,), (2,), (0, 3)),
            "embedding": ((0,), (1,), (2,)),
            "kernel": ((0, 1), (2,), (3,)),
        },
    ),
    "every layer, jit": Case(
        Stack(nn.jit, EveryLayer),
        (2, 5, WIDTH),
        axes={
            "einsum/kernel": ((0,), (1, 2), ()),
            "local/kernel": ((1,), (2,), (0,)),
            "embedding": ((0,), (1,), ()),
            "kernel": ((0, 1), (2,), ()),
        },
    ),
}

# Every kernel of them.
KERNELS = r"(.*/)?(kernel|embedding)"
# Where the rows of the batch are not the first axis of every layer's input.
NO_ROWS = {
    "vmap, axis 0",
    "vmap, axis 1",
    "vmap, shared",
    "no batch",
    "DenseGeneral, batch axes",
    "Einsum at call, stacked",
    "Conv, no batch",
    "ConvTranspose, no batch, bfloat16",
    "every layer, vmap, axis -1",
    "every layer, scan, axis 1, remat",
    "every layer, jit",
}
