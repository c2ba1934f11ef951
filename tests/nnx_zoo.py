"""Models that hold every layer of Flax NNX in every way that its users write it."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax import Handlers

WIDTH = 6
# What a list or a dict of modules is: the oldest Flax has plain ones only.
List = getattr(nnx, "List", list)
Dict = getattr(nnx, "Dict", dict)


class Mlp(nnx.Module):
    def __init__(self, rngs, layer=nnx.Linear, width=WIDTH, **options):
        self.up = layer(width, 9, rngs=rngs, **options)
        self.down = layer(9, width, rngs=rngs, **options)

    def __call__(self, x):
        return x + self.down(nnx.tanh(self.up(x)))


class Activated(nnx.Linear):
    """What surrounds the product must see the adapted product, once."""

    def __call__(self, x):
        return 2.0 * nnx.gelu(super().__call__(1.0 + x)) + x[..., :1]


class MoreActivated(Activated):
    def __call__(self, x):
        return nnx.tanh(super().__call__(x))


class Chain(nnx.Module):
    """Layers one after another."""

    def __init__(self, *layers):
        self.layers = List(layers)

    def __call__(self, x, *args):
        for layer in self.layers:
            x = nnx.tanh(layer(x, *args))
            args = ()
        return x


class Shared(nnx.Module):
    """One layer in two modules, which is called twice in one of them."""

    def __init__(self, rngs):
        self.first = Mlp(rngs)
        self.second = Mlp(rngs)
        self.second.down = self.first.down
        self.by_name = Dict({"up": self.first.up, "own": nnx.Linear(WIDTH, 9, rngs=rngs)})

    def __call__(self, x):
        x = self.second(nnx.tanh(self.first(x)))
        return x + self.first.down(self.by_name["up"](x) * self.by_name["own"](x))


class Tied(nnx.Module):
    """One embedding for the tokens and for the logits."""

    def __init__(self, rngs, dtype=jnp.float32):
        self.embed = nnx.Embed(11, WIDTH, dtype=dtype, rngs=rngs)
        self.dense = nnx.Linear(WIDTH, WIDTH, dtype=dtype, rngs=rngs)

    def __call__(self, tokens):
        return self.embed.attend(nnx.tanh(self.dense(self.embed(tokens))))


class TiedByHand(Tied):
    def __call__(self, tokens):
        return nnx.tanh(self.dense(self.embed(tokens))) @ self.embed.embedding[...].T


class Recurrent(nnx.Module):
    def __init__(self, cell, rngs):
        self.cell = nnx.RNN(cell(WIDTH, 5, rngs=rngs))

    def __call__(self, x):
        return self.cell(x)


class Experts(nnx.Module):
    """A layer that the library does not know."""

    def __init__(self, rngs):
        self.w = nnx.Param(nnx.initializers.normal()(rngs.params(), (3, WIDTH, 5)))

    def __call__(self, x):
        return nnx.relu(jnp.einsum("...d,edk->...ek", x, self.w[...]))


def experts(layer, w, x):
    return nnx.relu(w.einsum("...d,edk->...ek", x))


class Own(nnx.Module):
    """A parameter of no layer at all."""

    def __init__(self, rngs):
        self.w = nnx.Param(nnx.initializers.normal()(rngs.params(), (WIDTH, 5)))

    def __call__(self, x):
        return nnx.tanh(x @ self.w[...])


class Normed(nnx.Module):
    """Statistics and random numbers."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(WIDTH, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(self.norm(nnx.tanh(self.dense(x)))))


class Attention(nnx.Module):
    def __init__(self, rngs, decode=False, **options):
        self.attention = nnx.MultiHeadAttention(
            2, WIDTH, 8, decode=decode, deterministic=False, rngs=rngs, **options
        )
        if decode:
            self.attention.init_cache((2, 4, WIDTH))

    def __call__(self, x):
        return self.attention(x)


class Behind(nnx.Module):
    """A model, each of whose layers is called through a transform."""

    def __init__(self, inner, transform):
        self.inner = inner
        self.transform = transform

    def __call__(self, x):
        return self.transform(lambda inner, x: inner(x))(self.inner, x)


def named(names):
    """What a transform is told of the axis that it stacks on."""
    return dict.fromkeys([nnx.PARTITION_NAME], *names) if names else {}


class Scan(nnx.Module):
    """Blocks that are stacked by vmap, one after another in a scan."""

    def __init__(self, rngs, axis, length=3, block=Mlp, remat=False, names=()):
        self.axes, self.length, self.remat = axis, length, remat
        self.names = names  # of the stacked axis, or none

        @nnx.split_rngs(splits=length)
        @partial(nnx.vmap, out_axes=axis, transform_metadata=named(names))
        def make(rngs):
            return block(rngs)

        self.blocks = make(rngs)

    def __call__(self, x):
        def call(block, x):
            return block(x)

        scan = nnx.scan(
            nnx.remat(call, prevent_cse=False) if self.remat else call,
            in_axes=(self.axes, nnx.Carry),
            out_axes=nnx.Carry,
            length=self.length,
            transform_metadata=named(self.names),
        )
        return scan(self.blocks, x)


class ScanOfScan(nnx.Module):
    """Stacks of stacks."""

    def __init__(self, rngs, outer, inner):
        self.outer = Scan(rngs, outer, 2, partial(Scan, axis=inner))

    def __call__(self, x):
        return self.outer(x)


class Vmap(nnx.Module):
    """One kernel for each of the leading axis of x, or one for all."""

    def __init__(self, rngs, axis):
        self.axis = axis

        @nnx.split_rngs(splits=3)
        @partial(nnx.vmap, out_axes=axis)
        def make(rngs):
            return nnx.Linear(WIDTH, 5, rngs=rngs)

        self.layer = nnx.Linear(WIDTH, 5, rngs=rngs) if axis is None else make(rngs)

    def __call__(self, x):
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(self.axis, 0))(self.layer, x)


class SplitScan(nnx.Module):
    """A scan of JAX over a state that the model splits itself."""

    def __init__(self, rngs):
        self.blocks = Scan(rngs, 0).blocks

    def __call__(self, x):
        graphdef, state = nnx.split(self.blocks)
        return jax.lax.scan(lambda x, state: (nnx.merge(graphdef, state)(x), None), x, state)[0]


class Cond(nnx.Module):
    """Branches, and a loop that goes through one of them."""

    def __init__(self, rngs):
        self.yes, self.no = Mlp(rngs), Mlp(rngs)

    def __call__(self, x):
        def yes(model, x):
            return model.yes(x)

        def no(model, x):
            return model.no(x)

        y = nnx.cond(x[0, 0] > 0, yes, no, self, x) * nnx.cond(x[0, 0] < 0, yes, no, self, x)
        return nnx.fori_loop(0, 2, lambda i, carry: (carry[0], no(*carry)), (self, y))[1]


class OfJax(nnx.Module):
    """Transforms of JAX around layers that are closed over."""

    def __init__(self, rngs):
        self.first, self.second, self.third = (Mlp(rngs) for _ in range(3))

    def __call__(self, x):
        x = jax.vmap(self.first)(x)
        x = jax.checkpoint(lambda x: self.second(x))(x)
        return jax.jit(lambda x: self.third(x))(x)


class EveryLayer(nnx.Module):
    """One of each kind, to be put behind a transform."""

    def __init__(self, rngs):
        self.einsum = nnx.Einsum("btd,dhk->bthk", (WIDTH, 2, 3), (2, 3), rngs=rngs)
        self.general = nnx.LinearGeneral((2, 3), WIDTH, axis=(-2, -1), rngs=rngs)
        self.conv = nnx.Conv(WIDTH, 4, (3,), rngs=rngs)
        self.transpose = nnx.ConvTranspose(4, WIDTH, (2,), rngs=rngs)
        self.embed = nnx.Embed(5, WIDTH, rngs=rngs)

    def __call__(self, x):
        y = self.general(nnx.tanh(self.einsum(x)))
        y = nnx.tanh(self.transpose(nnx.tanh(self.conv(nnx.tanh(y)))))
        return x + self.embed.attend(y) @ self.embed(jnp.arange(5))


def random_state(make):
    """The graphdef of a model that is not made, and a state of random numbers for it."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def value(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            keys = jax.random.split(jax.random.key(1), leaf.shape)
            return keys if leaf.shape else jax.random.key(1)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.full(leaf.shape, 2, leaf.dtype)  # as if it had been called twice
        return jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype)

    return graphdef, jax.tree.map(value, state)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, the shape of its input, and which axes of its kernels are what.

    `axes` has for the last part of a path `(inputs, outputs, batch)`, said by hand; a kernel that
    it does not name is a matrix, stacked on `batch`.
    """

    make: Callable[[nnx.Rngs], nnx.Module]
    shape: tuple[int, ...] = (4, WIDTH)
    batch: tuple[int, ...] = ()
    axes: dict[str, tuple[tuple[int, ...], ...]] = dataclasses.field(default_factory=dict)
    x_dtype: Any = jnp.float32
    args: tuple[Any, ...] = ()
    handlers: Handlers = dataclasses.field(default_factory=Handlers)
    rule: dict[str, Any] = dataclasses.field(default_factory=dict)
    exact: bool = True  # computes and stores in float32
    bitwise: bool = True  # XLA compiles the product alike with and without a term added to it
    rows: bool = True  # those of the batch are the first axis of every layer's input

    def init(self):
        """The graphdef, a state, and the arguments."""
        graphdef, state = random_state(self.make)
        x = np.random.default_rng(7).standard_normal(self.shape)
        if jnp.issubdtype(self.x_dtype, jnp.integer):
            x = np.abs(10 * x) % 11
        return graphdef, state, (jnp.asarray(x, self.x_dtype), *self.args)

    def axes_of(self, path, ndim):
        """`(inputs, outputs, batch)` of a kernel."""
        for name, axes in self.axes.items():
            if path.endswith(name):
                return axes
        inputs, outputs = (axis for axis in range(ndim) if axis not in self.batch)
        return (inputs,), (outputs,), self.batch


def of(layer, *args, **options):
    """One layer alone."""
    return lambda rngs: layer(*args, **options, rngs=rngs)


def behind(transform, make=Mlp):
    return lambda rngs: Behind(make(rngs), transform)


def chain(*layers):
    return lambda rngs: Chain(*(layer(rngs=rngs) for layer in layers))


def own_dot_general(*args, **kwargs):
    """A dot_general of the user's, which is for the base."""
    return jax.lax.dot_general(*args, **kwargs)


BF16 = jnp.bfloat16
ATTENTION = {"out/kernel": ((0, 1), (2,), ()), "kernel": ((0,), (1, 2), ())}
CONV_1D, CONV_2D = ({"": (tuple(range(n + 1)), (n + 1,), ())} for n in (1, 2))
PARTITIONED = {  # without a mesh
    "kernel_init": nnx.with_partitioning(
        nnx.initializers.lecun_normal(), (None, "model"), eager_sharding=False
    )
}
FROZEN_REST = nnx.StateAxes({nnx.Param: 0, ...: None})
CASES = {
    "Linear": Case(of(nnx.Linear, WIDTH, 5), bitwise=False),
    "Mlp": Case(Mlp),
    "subclass": Case(partial(Mlp, layer=Activated)),
    "subclass of subclass": Case(partial(Mlp, layer=MoreActivated)),
    "shared and called twice": Case(Shared),
    "Sequential": Case(
        lambda rngs: nnx.Sequential(
            nnx.Linear(WIDTH, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs)
        )
    ),
    "List": Case(chain(partial(nnx.Linear, WIDTH, 8), partial(nnx.Linear, 8, 3))),
    "no batch": Case(Mlp, (WIDTH,), bitwise=False, rows=False),
    "many batch axes": Case(Mlp, (2, 1, 3, WIDTH)),
    "dot_general": Case(partial(Mlp, dot_general=own_dot_general)),
    "bfloat16 compute": Case(partial(Mlp, dtype=BF16), exact=False),
    "bfloat16 parameters": Case(partial(Mlp, param_dtype=BF16), exact=False),
    "LinearGeneral, two outputs": Case(
        of(nnx.LinearGeneral, WIDTH, (3, 2)), (4, 5, WIDTH), axes={"": ((0,), (1, 2), ())}
    ),
    "LinearGeneral, two inputs": Case(
        of(nnx.LinearGeneral, (3, WIDTH), 7, axis=(1, -1)),
        (4, 3, 2, WIDTH),
        axes={"": ((0, 1), (2,), ())},
    ),
    "LinearGeneral, batch axes": Case(
        of(nnx.LinearGeneral, WIDTH, (3, 2), batch_axis={0: 2}),
        (2, 5, WIDTH),
        axes={"": ((1,), (2, 3), (0,))},
        rows=False,
    ),
    "Einsum": Case(
        of(nnx.Einsum, "btd,dhk->bhtk", (WIDTH, 3, 2), (1, 3, 1, 2)),
        (4, 5, WIDTH),
        axes={"": ((0,), (1, 2), ())},
    ),
    "Einsum, stacked": Case(
        of(nnx.Einsum, "ecd,efd->cef", (3, 5, WIDTH)),
        (3, 4, WIDTH),
        axes={"": ((2,), (1,), (0,))},
        rows=False,
    ),
    "attention": Case(Attention, (2, 5, WIDTH), axes=ATTENTION),
    "attention, norms, dropout, bfloat16": Case(
        partial(Attention, normalize_qk=True, dropout_rate=0.25, dtype=BF16),
        (2, 5, WIDTH),
        axes=ATTENTION,
        exact=False,
        rows=False,
    ),
    "attention, decoding": Case(
        partial(Attention, decode=True), (2, 1, WIDTH), axes=ATTENTION, rows=False
    ),
    "Conv, 1-D": Case(
        chain(
            partial(nnx.Conv, 3, 4, (3,), strides=2),
            partial(nnx.Conv, 4, 6, (2,), padding="CAUSAL"),
            partial(nnx.Conv, 6, 6, (3,), feature_group_count=2, use_bias=False),
        ),
        (2, 7, 3),
        axes=CONV_1D,
    ),
    "Conv, 2-D": Case(
        chain(
            partial(nnx.Conv, 3, 4, (3, 2), strides=2, padding="VALID"),
            partial(nnx.Conv, 4, 5, (3, 3), kernel_dilation=2, padding="CIRCULAR"),
        ),
        (2, 3, 8, 9, 3),
        axes=CONV_2D,
    ),
    "Conv, no batch, bfloat16": Case(
        chain(partial(nnx.Conv, 3, 4, (3, 3), dtype=BF16)),
        (6, 5, 3),
        axes=CONV_2D,
        exact=False,
        rows=False,
    ),
    "ConvTranspose": Case(
        chain(
            partial(nnx.ConvTranspose, 3, 4, (3, 2), strides=(2, 1)),
            partial(nnx.ConvTranspose, 4, 3, (4, 4), strides=(2, 2), padding="CIRCULAR"),
            partial(nnx.ConvTranspose, 3, 2, (2, 2), padding="VALID", use_bias=False),
        ),
        (2, 2, 4, 5, 3),
        axes=CONV_2D,
    ),
    "ConvTranspose, kernel transposed": Case(
        of(nnx.ConvTranspose, 3, 4, (3,), strides=(2,), transpose_kernel=True, padding="CIRCULAR"),
        (2, 4, 3),
        axes={"": ((0, 2), (1,), ())},
    ),
    "Embed": Case(of(nnx.Embed, 11, WIDTH), (2, 5), x_dtype=jnp.int32),
    "Embed, tied": Case(Tied, (2, 5), x_dtype=jnp.int32),
    "Embed, tied, in bfloat16": Case(
        partial(Tied, dtype=BF16), (2, 5), x_dtype=jnp.uint8, exact=False
    ),
    "Embed, tied by hand, materialize": Case(
        TiedByHand, (2, 5), x_dtype=jnp.int32, rule={"tied": "materialize"}
    ),
    "LSTM": Case(partial(Recurrent, nnx.LSTMCell), (2, 3, WIDTH)),
    "GRU": Case(partial(Recurrent, nnx.GRUCell), (2, 3, WIDTH)),
    "own layer": Case(
        Experts,
        axes={"": ((1,), (0, 2), ())},
        handlers=Handlers().with_handler(Experts, "w", handler=experts),
    ),
    "materialized": Case(Own, rule={"materialize": True}),
    "statistics": Case(Normed, rows=False),
    "jit": Case(behind(nnx.jit)),
    "jit of a subclass": Case(behind(nnx.jit, partial(Mlp, layer=Activated))),
    "remat": Case(behind(nnx.remat)),
    "jit of remat": Case(behind(lambda f: nnx.jit(nnx.remat(f)), Tied), (2, 5), x_dtype=jnp.int32),
    "vmap, axis 0": Case(partial(Vmap, axis=0), (3, 4, WIDTH), (0,), rows=False),
    "vmap, axis 1": Case(partial(Vmap, axis=1), (3, 4, WIDTH), (1,), rows=False),
    "vmap, shared": Case(partial(Vmap, axis=None), (3, 4, WIDTH), rows=False),
    "scan, axis 0": Case(partial(Scan, axis=0), batch=(0,)),
    "scan, axis 1": Case(partial(Scan, axis=1), batch=(1,)),
    "scan, axis 0, as many as the width": Case(partial(Scan, axis=0, length=WIDTH), batch=(0,)),
    "scan, axis 1, as many as the width": Case(partial(Scan, axis=1, length=WIDTH), batch=(1,)),
    "scan by the types of variables": Case(partial(Scan, axis=FROZEN_REST), batch=(0,)),
    "scan with partition names": Case(
        partial(Scan, axis=1, block=partial(Mlp, **PARTITIONED), names=("layers",)), batch=(1,)
    ),
    "scan of remat": Case(partial(Scan, axis=0, remat=True), batch=(0,)),
    "scan of scan": Case(partial(ScanOfScan, outer=0, inner=1), batch=(0, 2)),
    "lax.scan of a split state": Case(SplitScan, batch=(0,)),
    "cond": Case(Cond),
    "transforms of JAX": Case(OfJax),
    "every layer, scan, axis 1, remat": Case(
        partial(Scan, axis=1, remat=True, block=EveryLayer),
        (2, 5, WIDTH),
        axes={
            "einsum/kernel": ((0,), (2, 3), (1,)),
            "embedding": ((0,), (2,), (1,)),
            "kernel": ((0, 2), (3,), (1,)),
        },
        rows=False,
    ),
}

if hasattr(nnx, "set_graph_mode"):  # newer Flax takes modules as trees too
    CASES["jit of a tree"] = Case(behind(partial(nnx.jit, graph=False)))

# Every kernel of them.
KERNELS = r"(.*/)?(kernel|embedding|w)"
