"""Full models, written as such models are: a scanned decoder, and a ResNet with BatchNorm."""

import functools

import flax.linen as nn


def boxed(*names):
    return nn.with_logical_partitioning(nn.initializers.normal(0.02), names)


class Block(nn.Module):
    """Grouped attention and a gated MLP, of boxed DenseGenerals and Einsums."""

    width: int
    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x, _):
        y = nn.RMSNorm(name="attention_norm")(x)
        dense = functools.partial(nn.DenseGeneral, use_bias=False, dtype=x.dtype)
        of_heads = {"kernel_init": boxed("embed", "heads", "head_dim")}
        features = (self.heads, self.width // self.heads)
        query, key, value = (
            dense(features, name=name, **of_heads)(y) for name in ("query", "key", "value")
        )
        y = nn.dot_product_attention(query, key, value)
        out = {"kernel_init": boxed("heads", "head_dim", "embed")}
        x = x + dense(self.width, axis=(-2, -1), name="out", **out)(y)
        y = nn.RMSNorm(name="mlp_norm")(x)
        gate, up = nn.Einsum(
            (2, self.width, self.hidden),
            "btd,cdk->cbtk",
            use_bias=False,
            kernel_init=boxed("gates", "embed", "mlp"),
            name="gate_up",
        )(y)
        down = dense(self.width, kernel_init=boxed("mlp", "embed"), name="down")
        return x + down(nn.silu(gate) * up), None


class Decoder(nn.Module):
    """Its blocks lie on axis 1 of every kernel, and are rematerialised."""

    vocabulary: int = 17
    width: int = 12
    heads: int = 3
    hidden: int = 20
    layers: int = 4

    @nn.compact
    def __call__(self, tokens):
        init = boxed("vocab", "embed")
        embed = nn.Embed(self.vocabulary, self.width, embedding_init=init, name="embed")
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 1},
            split_rngs={"params": True},
            length=self.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.width, self.heads, self.hidden, name="blocks")
        x, _ = blocks(embed(tokens), None)
        return embed.attend(nn.RMSNorm(name="norm")(x))


class ResNet(nn.Module):
    """Residual blocks of convolutions and batch statistics."""

    widths: tuple[int, ...] = (6, 8)

    @nn.compact
    def __call__(self, x, train=False):
        def norm(x, name):
            return nn.BatchNorm(use_running_average=not train, name=name)(x)

        x = norm(nn.Conv(self.widths[0], (3, 3), use_bias=False, name="stem")(x), "norm")
        for i, width in enumerate(self.widths):
            y = nn.Conv(width, (3, 3), strides=1 + i, use_bias=False, name=f"conv_{i}_0")(x)
            y = nn.relu(norm(y, f"norm_{i}_0"))
            y = norm(nn.Conv(width, (3, 3), use_bias=False, name=f"conv_{i}_1")(y), f"norm_{i}_1")
            x = nn.relu(y + nn.Conv(width, (1, 1), strides=1 + i, name=f"skip_{i}")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))
