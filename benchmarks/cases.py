"""What is measured: sizes, and weights that every framework starts from. Needs numpy only."""

import dataclasses
import json
import zlib
from collections.abc import Iterator

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
      layers: transformer layers.
      batch: sequences in a batch.
      length: tokens of a sequence.
      rank: ``r`` of the adapters.
      dtype: of the base and of the computation.
      vocab: tokens that there are.
      scale: ``s`` of the adapters, that is ``alpha / r``.
      together: how many contenders are in memory at a time.
      seed: of weights and of data.
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

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.length

    def dumps(self) -> str:
        """The case as JSON."""
        return json.dumps(dataclasses.asdict(self))


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


def kernels(case: Case) -> dict[str, tuple[int, int]]:
    """The path and the shape ``(d, k)`` of every kernel that gets an adapter."""
    d, ff = case.width, case.ff
    layer = dict.fromkeys("qkvo", (d, d)) | {"up": (d, ff), "down": (ff, d)}
    if case.model == "decoder":
        layer["gate"] = (d, ff)
    return {
        f"layers_{i}/{name}": shape for i in range(case.layers) for name, shape in layer.items()
    }


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """The path and the shape of every parameter of the base."""
    d, dense = case.width, kernels(case)
    out: dict[str, tuple[int, ...]] = {"embed/embedding": (case.vocab, d)}
    if case.model == "encoder":
        norms = ["norm"]
        out["positions/embedding"] = (case.length, d)
        dense |= {"head": (d, 2)}
    else:
        norms = ["norm"]
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


def normal(case: Case, name: str, shape: tuple[int, ...], std: float) -> np.ndarray:
    """Noise that depends on the name and on the seed only."""
    rng = np.random.default_rng([case.seed, zlib.crc32(name.encode())])
    out = rng.standard_normal(shape, np.float32)
    out *= np.float32(std)
    return out


def weights(case: Case) -> Iterator[tuple[str, np.ndarray]]:
    """The base in float32, one parameter after the other, for it may be large."""
    for path, shape in shapes(case).items():
        std = shape[0] ** -0.5 if path.endswith("kernel") else 0.02
        value = normal(case, path, shape, std)
        yield path, value + 1 if path.endswith("scale") else value


def factors(case: Case) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """``U`` and ``V`` of every adapter; neither is zero, so that the first loss depends on both."""
    r = case.rank
    return {
        path: (
            normal(case, f"{path}/U", (d, r), d**-0.5),
            normal(case, f"{path}/V", (r, k), 0.1 * r**-0.5),
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
    if kind == "floor":
        return case.width
    if kind == "full":
        return sum(int(np.prod(shape)) for shape in shapes(case).values())
    magnitudes = kind == "dora"
    return sum(case.rank * (d + k) + magnitudes * k for d, k in kernels(case).values())
