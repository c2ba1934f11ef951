"""Models that hold `nn.Dense` in every way that Flax users write it."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from helpers import random_like, random_variables

WIDTH = 6


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

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x, _ = self.transform(Block)(name=f"block_{i}")(x)
        return x


class Scan(nn.Module):
    axis: int
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        scan = nn.scan(block, {"params": self.axis}, split_rngs={"params": True}, length=3)
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


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, the shape of its input, and where its kernels are stacked."""

    model: nn.Module
    shape: tuple[int, ...] = (4, WIDTH)
    stack_axes: tuple[int, ...] = ()
    freeze: bool = False
    x_dtype: Any = jnp.float32
    exact: bool = True  # computes and stores in float32
    bitwise: bool = True  # XLA compiles the product alike with and without a term added to it

    def init(self):
        """The variables and an input."""
        x = random_like(jnp.zeros(self.shape, self.x_dtype), seed=7, scale=1.0)
        return random_variables(self.model, x), x


BF16 = jnp.bfloat16
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
    "scan, axis 0": Case(Scan(0), stack_axes=(0,)),
    "scan, axis 1": Case(Scan(1), stack_axes=(1,)),
    "scan, axis -1": Case(Scan(-1), stack_axes=(-1,)),
    "scan of remat": Case(Scan(0, remat=True), stack_axes=(0,)),
    "scan of scan, axes 1, 1": Case(ScanOfScan(1, 1), stack_axes=(1, 2)),
    "scan of scan, axes 0, 1": Case(ScanOfScan(0, 1), stack_axes=(0, 2)),
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
}
