"""Where the time of a step goes: its operations one at a time, in XLA and in PyTorch.

    python -m benchmarks.operations

Forward with gradient, as in a step with a frozen base: the gradient of the inputs, and none of the
weights. The times of all operations of a model add up to about its step. Then what an adapter adds.
"""

import dataclasses
import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.models.attention import attend
from benchmarks.models.cases import CASES, EPSILON, Case, kernels
from benchmarks.running import files, stats
from benchmarks.running.environment import environment
from benchmarks.running.race import alternate
from lora_jax.core._adapter import Adapter
from lora_jax.core.products._einsum_equation import Equation
from lora_jax.core.products._layer_factors import layer_factors
from lora_jax.core.products._normal_form import normalized
from lora_jax.core.products._product import adapted_einsum

Shapes = Sequence[tuple[int, ...]]
PYTORCH = ", PyTorch"


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures operations."""

    cases: tuple[str, ...] = ("minilm", "decoder")
    """Cases of benchmarks/models/cases.py."""
    rounds: int = 15
    """Rounds."""
    seed: int = 0
    """Of the order."""
    out: Path = Path("benchmarks/results/operations.json")
    """Where results go; other cases that are there already stay."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a step.

    Attributes:
      count: how often a step has it.
      run: the function, in JAX.
      inputs: shapes of what the gradient is taken for.
      frozen: shapes of what is only used.
      torch: the same in PyTorch, where there is such a thing.
    """

    count: int
    run: Callable[..., Any]
    inputs: Shapes
    frozen: Shapes = ()
    torch: Callable[..., Any] | None = None


def of_model(case: Case) -> dict[str, Operation]:
    """What the base does."""
    rows, wide = (case.batch, case.length, case.width), (case.batch, case.length, case.ff)
    try:
        from benchmarks.models import pytorch as theirs
    except ImportError:
        theirs = None
    causal = case.model == "decoder"
    out = {}
    for (d, k), count in Counter(kernels(case).values()).items():
        out[f"product, {d} to {k}"] = Operation(
            count,
            jnp.matmul,
            [(case.batch, case.length, d)],
            [(d, k)],
            theirs and theirs.F.linear,
        )
    out["attention"] = Operation(
        case.layers,
        functools.partial(attend, case),
        [rows] * 3,
        torch=theirs and functools.partial(theirs.attend, case),
    )
    out["silu(gate) * up" if causal else "gelu"] = Operation(
        case.layers,
        (lambda gate, up: nn.silu(gate) * up)
        if causal
        else functools.partial(nn.gelu, approximate=False),
        [wide] * (2 if causal else 1),
        torch=theirs and (theirs.gated if causal else theirs.F.gelu),
    )
    norm = (nn.RMSNorm if causal else nn.LayerNorm)(epsilon=EPSILON)
    params = norm.init(jax.random.key(0), jnp.zeros(rows))
    out["sum and norm"] = Operation(
        2 * case.layers,
        lambda x, y: norm.apply(params, x + y),
        [rows] * 2,
        torch=theirs and functools.partial(theirs.sum_and_norm, causal=causal),
    )
    return out


def of_adapters(case: Case) -> dict[str, Operation]:
    """What adapters add, or put in the place of a product."""
    r, out = case.rank, {}
    rows = case.batch * case.length
    for (d, k), count in Counter(kernels(case).values()).items():
        x, W, U, V, m = (case.batch, case.length, d), (d, k), (d, r), (r, k), (k,)
        out[f"LoRA, {d} to {k}"] = Operation(count, adapted, [x, U, V], [W])
        out[f"DoRA but its norm, {d} to {k}"] = Operation(count, adapted, [x, U, V, m], [W])
        out[f"norm, {d} to {k}"] = Operation(count, ratio, [U, V, m], [W])
        out[f"sum over rows for dm, {d} to {k}"] = Operation(
            count, lambda g, y: jnp.sum(g * y, 0), [], [(rows, k)] * 2
        )
    return out


def adapted(x: Any, U: Any, V: Any, *m_and_W: Any) -> Any:
    """The product of a layer, with DoRA's ratio given."""
    *m, W = m_and_W
    equation = Equation.parse("bnd,dk->bnk", x.shape, W.shape)
    variant = "scaled" if m else "lora"
    return adapted_einsum(equation, x, W, layer_factors(W, adapter(variant, U, V, *m)))


def ratio(U: Any, V: Any, m: Any, W: Any) -> Any:
    """``m / ||W + s U V||_c``."""
    return normalized(W, adapter("dora", U, V, m)).m


def adapter(variant: str, U: Any, V: Any, m: Any = None) -> Adapter:
    """An adapter of such factors."""
    rank = U.shape[-1]
    return Adapter(U, V, m, variant=variant, rank=rank, alpha=2.0 * rank)


def array(shape: tuple[int, ...], i: int) -> np.ndarray:
    """Noise of about the size that it has in a model."""
    noise = np.random.default_rng(i).standard_normal(shape, np.float32)
    return noise / np.float32(math.sqrt(shape[0])) if len(shape) == 2 else noise


def in_jax(operation: Operation, inputs: Sequence[Any], frozen: Sequence[Any]) -> Any:
    """Runs it, forward and gradient, compiled."""

    @jax.jit
    def both(inputs: Any, frozen: Any, g: Any) -> Any:
        y, pull = jax.vjp(lambda *inputs: operation.run(*inputs, *frozen), *inputs)
        return y, pull(g) if inputs else ()

    inputs, frozen = (tuple(map(jnp.asarray, arrays)) for arrays in (inputs, frozen))
    g = jnp.ones_like(operation.run(*inputs, *frozen))
    return lambda: jax.block_until_ready(both(inputs, frozen, g))


def in_torch(operation: Operation, inputs: Sequence[Any], frozen: Sequence[Any]) -> Any:
    """The same in PyTorch; what is frozen is transposed, as weights are there."""
    import torch

    from benchmarks.contenders.pytorch import THREADS

    torch.set_num_threads(THREADS)
    inputs = [torch.from_numpy(x).requires_grad_() for x in inputs]
    frozen = [torch.from_numpy(np.ascontiguousarray(x.T)) for x in frozen]
    with torch.no_grad():
        g = torch.ones_like(operation.torch(*inputs, *frozen))

    def run() -> None:
        for x in inputs:
            x.grad = None
        operation.torch(*inputs, *frozen).backward(g)

    return run


def measure(operations: dict[str, Operation], options: Options) -> dict[str, list[float]]:
    """Seconds of each in each round, in a shuffled order; the round before the first is void."""
    jobs: dict[str, Callable[[], float]] = {}
    for name, operation in operations.items():
        inputs, frozen = (
            [array(shape, i) for i, shape in enumerate(shapes)]
            for shapes in (operation.inputs, operation.frozen)
        )
        jobs[name] = timed(in_jax(operation, inputs, frozen))
        if operation.torch:
            jobs[name + PYTORCH] = timed(in_torch(operation, inputs, frozen))
    return alternate(jobs, options.rounds, options.seed)


def timed(run: Callable[[], Any]) -> Callable[[], float]:
    """Seconds of the second of two calls."""

    def job() -> float:
        time.sleep(0.01)  # threads of the last one may still wait for more work
        run()
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    return job


def main(options: Options) -> None:
    """Measures, and writes each case as soon as it is done."""
    for name in options.cases:
        case, results = CASES[name], files.read(options.out)
        result: dict[str, Any] = {
            "case": dataclasses.asdict(case),
            "environment": environment(),
            "rounds": options.rounds,
        }
        for part, operations in (("model", of_model(case)), ("adapters", of_adapters(case))):
            seconds = measure(operations, options)
            result[part] = {}
            for title, operation in operations.items():
                one: dict[str, Any] = {"count": operation.count, **stats.quartiles(seconds[title])}
                if title + PYTORCH in seconds:
                    one["torch"] = stats.quartiles(seconds[title + PYTORCH])
                result[part][title] = one
                print(f"  {title:40} {operation.count:3} x {1e3 * one['median']:8.2f} ms")
        results[name] = result
        files.write(options.out, results)


if __name__ == "__main__":
    main(tyro.cli(Options))
