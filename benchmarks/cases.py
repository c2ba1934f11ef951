"""What is measured: sizes, and weights that every framework starts from. Needs numpy only."""

import dataclasses
import json
import zlib
from typing import Any, NamedTuple

import numpy as np


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


class Noise(NamedTuple):
    """An array that every framework makes for itself, with the same numbers, where it computes.

    Attributes:
      shape: of the array.
      std: deviation of its numbers, which are uniform.
      mean: of its numbers.
      seed: another one for each array.
    """

    shape: tuple[int, ...]
    std: float
    mean: float
    seed: int

    def integers(self, index: Any) -> Any:
        """24 random bits for each place in the array, from -2^23 to 2^23 - 1.

        Args:
          index: ``int32``, the places. An array of numpy, of jax or of torch: all that is done to
            it are operators, and products that wrap around.
        """
        x = index * 0x2C1B3C6D
        x = (x ^ ((x >> 12) & 0xFFFFF) ^ self.seed) * 0x297A2D39
        x = (x ^ ((x >> 15) & 0x1FFFF)) * 0x5F356495
        return (x ^ ((x >> 15) & 0x1FFFF)) >> 8

    @property
    def step(self) -> float:
        """What the numbers are to be multiplied with, before the mean is added."""
        return self.std * 3**0.5 / 2**23


def noise(case: Case, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> Noise:
    """Noise that depends on the name and on the seed only."""
    seed = zlib.crc32(f"{case.seed} {name}".encode())
    return Noise(shape, std, mean, seed - 2**31)


def weights(case: Case) -> dict[str, Noise]:
    """The path and the numbers of every parameter of the base."""
    out = {}
    for path, shape in shapes(case).items():
        std = shape[0] ** -0.5 if path.endswith("kernel") else 0.02
        out[path] = noise(case, path, shape, std, float(path.endswith("scale")))
    return out


def factors(case: Case, stack: tuple[int, ...] = ()) -> dict[str, tuple[Noise, Noise]]:
    """``U`` and ``V`` of every adapter; neither is zero, so that the first loss depends on both.

    Args:
      case: with the rank.
      stack: sizes of the axes in front, such as the number of stacked adapters.
    """
    r = case.rank
    return {
        path: (
            noise(case, f"{path}/U", (*stack, d, r), d**-0.5),
            noise(case, f"{path}/V", (*stack, r, k), 0.5 * r**-0.5),
        )
        for path, (d, k) in kernels(case).items()
    }


def batch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Tokens ``(batch, length)``, and labels: ``(batch,)`` of an encoder, else the next tokens."""
    rng = np.random.default_rng(case.seed)
    ids = rng.integers(0, case.vocab, (case.batch, case.length + 1), np.int32)
    if case.model == "encoder":
        return ids[:, :-1], rng.integers(0, 2, case.batch, np.int32)
    return ids[:, :-1], ids[:, 1:]


def trained(case: Case, kind: str) -> int:
    """How many numbers are trained: ``kind`` is a family of `benchmarks.step.FAMILIES`."""
    if kind == "attention" or kind.startswith("serve"):
        return 0
    if kind == "floor":
        return case.width
    if kind == "full":
        return sum(int(np.prod(shape)) for shape in shapes(case).values())
    magnitudes = kind == "dora"
    return sum(case.rank * (d + k) + magnitudes * k for d, k in kernels(case).values())
