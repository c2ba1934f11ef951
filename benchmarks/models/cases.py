"""What is measured: the sizes of a model, of a batch and of its adapters. Needs no framework."""

import dataclasses
import json

EPSILON = 1e-6  # of the norms, in every framework


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, a batch and a rank.

    Attributes:
      name: what it is called in results.
      model: ``"encoder"`` (BERT's layers) or ``"decoder"`` (Llama's).
      width: features of a token.
      ff: features of the feed-forward layer.
      heads: attention heads.
      kv_heads: heads of keys and values, if they are fewer.
      layers: transformer layers.
      batch: sequences in a batch.
      length: tokens of a sequence.
      rank: ``r`` of the adapters.
      dtype: of the base and of the computation.
      vocab: tokens that there are.
      scale: ``s`` of the adapters, that is ``alpha / r``.
      together: how many contenders are in memory at a time.
      seed: of weights and of data.
      adapted: names of the kernels that get an adapter; all of a layer's by default.
      tied: the head of a decoder is its embedding.
      remat: layers are rematerialised.
      save_xU: they keep ``x U`` of their adapters then.
      attention: ``"einsum"``, or an implementation of `jax.nn.dot_product_attention`.
    """

    name: str
    model: str
    width: int
    ff: int
    heads: int
    layers: int
    batch: int
    length: int
    rank: int
    dtype: str = "float32"
    vocab: int = 8192
    scale: float = 2.0
    together: int = 16
    seed: int = 0
    kv_heads: int | None = None
    adapted: tuple[str, ...] = ()
    tied: bool = False
    remat: bool = False
    save_xU: bool = False
    attention: str = "einsum"

    @property
    def head_features(self) -> int:
        """Features of a head."""
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        """Features of all keys, or values, of a token."""
        return (self.kv_heads or self.heads) * self.head_features

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.length

    def dumps(self) -> str:
        """The case as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def loads(cls, text: str) -> "Case":
        """What `dumps` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "adapted": tuple(fields["adapted"])})


CASES = {
    case.name: case
    for case in (
        Case("tiny", "encoder", 32, 64, 4, 2, 2, 16, 4, vocab=64),
        Case("tiny-decoder", "decoder", 32, 48, 4, 2, 2, 16, 4, vocab=64),
        Case("minilm", "encoder", 384, 1536, 12, 6, 16, 128, 8),
        Case("minilm-in-nnx", "encoder", 384, 1536, 12, 6, 16, 128, 8),
        Case("base", "encoder", 768, 3072, 12, 6, 8, 128, 8),
        Case("decoder", "decoder", 1024, 2816, 16, 6, 4, 256, 16),
        Case("large", "decoder", 2048, 5632, 16, 12, 1, 512, 16, together=2),
    )
}


def layer_kernels(case: Case) -> dict[str, tuple[int, int]]:
    """The name and the shape ``(d, k)`` of every kernel of a layer."""
    d, ff, kv = case.width, case.ff, case.kv_width
    layer = {"q": (d, d), "k": (d, kv), "v": (d, kv), "o": (d, d), "up": (d, ff), "down": (ff, d)}
    return layer | ({"gate": (d, ff)} if case.model == "decoder" else {})


def kernels(case: Case) -> dict[str, tuple[int, int]]:
    """The path and the shape ``(d, k)`` of every kernel that gets an adapter."""
    layer = layer_kernels(case)
    return {
        f"layers_{i}/{name}": layer[name]
        for i in range(case.layers)
        for name in case.adapted or layer
    }


def kernel_names(case: Case) -> list[str]:
    """The names of the kernels of a layer that get an adapter."""
    return sorted(case.adapted or layer_kernels(case))


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """The path and the shape of every parameter of the base."""
    d = case.width
    dense = {
        f"layers_{i}/{name}": shape
        for i in range(case.layers)
        for name, shape in layer_kernels(case).items()
    }
    out: dict[str, tuple[int, ...]] = {"embed/embedding": (case.vocab, d)}
    norms = ["norm"]
    if case.model == "encoder":
        out["positions/embedding"] = (case.length, d)
        dense |= {"head": (d, 2)}
    elif not case.tied:
        dense |= {"head": (d, case.vocab)}
    norms += [f"layers_{i}/norm_{n}" for i in range(case.layers) for n in (1, 2)]
    for path, (rows, columns) in dense.items():
        out[f"{path}/kernel"] = (rows, columns)
        if case.model == "encoder":
            out[f"{path}/bias"] = (columns,)
    for path in norms:
        out[f"{path}/scale"] = (d,)
        if case.model == "encoder":
            out[f"{path}/bias"] = (d,)
    return out
