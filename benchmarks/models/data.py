"""The numbers that every framework starts from: weights, factors and a batch. Needs NumPy only."""

import zlib
from typing import Any, NamedTuple

import numpy as np

from benchmarks.models.cases import Case, kernels, shapes


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
