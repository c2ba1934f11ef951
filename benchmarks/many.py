"""Many adapters of one base: mixed batches, switches, training side by side, memory.

    python -m benchmarks.many

JAX is measured in this process and PEFT in another, in turn; the one waits while the other works.
"""

import dataclasses
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import lora_jax
from benchmarks import cases, models, stats
from benchmarks.cases import CASES, Case
from benchmarks.overheads import alternate
from benchmarks.serving import WAYS

ROWS = 32
Jobs = dict[str, Callable[[], float]]


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures what many adapters of one base cost."""

    case: str = "minilm"
    """The model, of `benchmarks.cases`."""
    lengths: tuple[int, ...] = (128, 8)
    """Tokens of each of the 32 rows of a mixed batch."""
    counts: tuple[int, ...] = (1, 4, 32)
    """Numbers of adapters in it."""
    train_tokens: tuple[int, ...] = (32, 128, 1024)
    """Tokens of each of 8 adapters that are trained in one step."""
    rounds: int = 15
    """Rounds of all measurements."""
    seed: int = 0
    """Of the order."""
    torch: bool = True
    """Measure PEFT as well."""
    out: Path = Path("benchmarks/results/many.json")
    """Where results go."""


def timed(function: Callable[[], Any]) -> Callable[[], float]:
    """Seconds of a call, to the end of the computation."""

    def job() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(function())
        return time.perf_counter() - begin

    job()
    return job


def adapters(case: Case, count: int, variant: str = "lora") -> list[Any]:
    """Adapters of all kernels with noise in every factor."""
    params = models.params(case)
    rule = lora_jax.Rule(
        "layers_.*/kernel", case.rank, alpha=case.scale * case.rank, variant=variant
    )
    config = lora_jax.LoraConfig([rule])
    one = lora_jax.lora_init(jax.random.key(0), params, config)[1]
    rng = np.random.default_rng(case.seed)

    def noisy(x: jax.Array) -> jax.Array:
        return x + jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32))

    return [jax.tree.map(noisy, one) for _ in range(count)]


def ids_of(count: int) -> np.ndarray:
    """The adapter of each row, in turn."""
    return np.arange(ROWS, dtype=np.int32) % count


def mixed(case: Case, counts: tuple[int, ...]) -> Jobs:
    """A batch of 32 rows over several adapters, and over none."""
    model, params = models.make(case), models.params(case)
    tokens, _ = cases.batch(case)
    base = jax.jit(lambda params, x: model.apply({"params": params}, x))
    jobs = {"base": timed(lambda: base(params, tokens))}

    @jax.jit
    def serve(params: Any, stacked: Any, x: Any, ids: Any) -> jax.Array:
        y: jax.Array = lora_jax.lora_apply(model, {"params": params}, stacked, x, adapter_ids=ids)
        return y

    for variant in ("lora", "dora"):
        for count in counts:
            stacked = lora_jax.stack(adapters(case, count, variant))
            stacked = lora_jax.cache_norm(params, stacked)
            call = functools.partial(serve, params, stacked, tokens, ids_of(count))
            jobs[f"lora_jax, {variant}, {count}"] = timed(call)
    return jobs


def ways(case: Case, count: int) -> Jobs:
    """What the adapters of one kernel add, in the ways that there are, and the product with it."""
    d, k, r = case.width, case.ff, case.rank
    rng = np.random.default_rng(case.seed)

    def noise(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    x, W = noise(ROWS, case.length, d), noise(d, k)
    U, V, ids = noise(count, d, r), noise(count, r, k), jnp.asarray(ids_of(count))

    product = jax.jit(jnp.matmul)
    jobs = {"x W": timed(lambda: product(x, W))}
    for name, add in WAYS.items():
        jobs[f"{name}, {count}"] = timed(functools.partial(jax.jit(add), x, U, V, ids))
    return jobs


def switches(case: Case) -> Jobs:
    """From one adapter to another, and the next answer: by id, by merging, by a new trace."""
    model, params = models.make(case), models.params(case)
    many = adapters(case, 8)
    stacked = lora_jax.stack(many)
    tokens, _ = cases.batch(case)
    base = jax.jit(lambda params, x: model.apply({"params": params}, x))

    def apply(params: Any, adapters: Any, x: Any) -> jax.Array:
        y: jax.Array = lora_jax.lora_apply(model, {"params": params}, adapters, x)
        return y

    @jax.jit
    def by_id(params: Any, stacked: Any, x: Any, i: Any) -> jax.Array:
        y: jax.Array = lora_jax.lora_apply(model, {"params": params}, stacked, x, adapter_ids=i)
        return y

    serve, merge = jax.jit(apply), jax.jit(lora_jax.lora_merge)
    turn = iter(range(10**9))

    def other() -> int:
        return next(turn) % len(many)

    def retraced() -> jax.Array:
        return jax.jit(lambda *args: apply(*args))(params, many[other()], tokens)

    return {
        "no switch": timed(lambda: base(params, tokens)),
        "another tree": timed(lambda: serve(params, many[other()], tokens)),
        "another id": timed(lambda: by_id(params, stacked, tokens, np.int32(other()))),
        "merging": timed(lambda: base(merge(params, many[other()]), tokens)),
        "a new trace": timed(retraced),
    }


def training(case: Case, count: int = 8) -> Jobs:
    """One step of several adapters, each with data of its own, and as many steps."""
    model, params = models.make(case), models.params(case)
    stacked = lora_jax.stack(adapters(case, count))
    optimizer = optax.adamw(1e-4)
    batch = cases.batch(dataclasses.replace(case, batch=count * case.batch))
    data = [jnp.reshape(x, (count, case.batch, *x.shape[1:])) for x in map(jnp.asarray, batch)]

    def step(adapters: Any, state: Any, params: Any, data: Any) -> Any:
        def loss(adapters: Any) -> jax.Array:
            tokens, labels = data
            y = lora_jax.lora_apply(model, {"params": params}, adapters, tokens)
            return models.loss(y, labels)

        updates, state = optimizer.update(jax.grad(loss)(adapters), state, adapters)
        return optax.apply_updates(adapters, updates), state

    one, many = jax.jit(step), jax.jit(jax.vmap(step, in_axes=(0, 0, None, 0)))
    state = jax.vmap(optimizer.init)(stacked)
    each = [jax.tree.map(lambda a, i=i: a[i], (stacked, state, data)) for i in range(count)]

    def in_turn() -> list[Any]:
        return [one(tree, state, params, data) for tree, state, data in each]

    return {
        f"{count} steps": timed(in_turn),
        f"one step of {count}": timed(lambda: many(stacked, state, params, data)),
    }


def memory(case: Case, count: int = 32) -> dict[str, int]:
    """Bytes of one base with adapters, and of merged models."""
    base = sum(leaf.nbytes for leaf in jax.tree.leaves(models.params(case)))
    one = sum(leaf.nbytes for leaf in jax.tree.leaves(adapters(case, 1)))
    return {
        "adapters": count,
        "base": base,
        "adapter": one,
        "base and adapters": base + count * one,
        "merged models": count * base,
    }


class Torch:
    """PEFT, in a process of its own."""

    def __init__(self, case: Case, counts: tuple[int, ...]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.many_torch", case.dumps(), json.dumps(counts)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.names: list[str] = self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def _ask(self, name: str) -> float:
        assert self._process.stdin is not None
        print(name, file=self._process.stdin, flush=True)
        return float(self._answer())

    def jobs(self, prefix: str) -> Jobs:
        """Those whose names begin so."""
        return {n: functools.partial(self._ask, n) for n in self.names if n.startswith(prefix)}

    def quit(self) -> None:
        """Ends the process."""
        self._process.communicate("quit\n")


def entry(what: str, bases: dict[str, str], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Results of one kind; ``bases`` says with what a name is compared, by how it begins."""
    times = {}
    for name, values in seconds.items():
        base = next(base for start, base in bases.items() if name.startswith(start))
        ratio = stats.ratio(values, seconds[base])
        times[name] = {**stats.quartiles(values), "base": base, "to_base": ratio}
        print(f"  {name:24} {1e3 * times[name]['median']:9.2f} ms, {ratio['median']:.3f} {base}")
    return {"what": what, "times": times, "environment": stats.environment()}


def main(options: Options) -> None:
    """Measures all, and writes each as soon as it is done."""
    case = dataclasses.replace(CASES[options.case], batch=ROWS)
    results = stats.read(options.out)

    def done(
        name: str, case: Case, what: str, bases: dict[str, str], jobs: Jobs, **facts: Any
    ) -> None:
        print(name)
        seconds = alternate(jobs, options.rounds, options.seed)
        results[name] = entry(what, bases, seconds) | {"case": dataclasses.asdict(case)} | facts
        stats.write(options.out, results)

    for length in options.lengths:
        here = dataclasses.replace(case, length=length)
        torch = Torch(here, options.counts) if options.torch else None
        done(
            f"mixed, {length} tokens",
            here,
            f"A forward pass of {ROWS} rows of {length} tokens over so many adapters.",
            {"PEFT": "PyTorch, base", "PyTorch": "PyTorch, base", "": "base"},
            mixed(here, options.counts) | (torch.jobs("P") if torch else {}),
        )
        if torch:
            torch.quit()
    for length in (1, *options.lengths):
        here = dataclasses.replace(case, length=length)
        done(
            f"ways, {length} tokens",
            here,
            f"What the adapters of one kernel {case.width} x {case.ff} of rank {case.rank} add, "
            f"for {ROWS} rows of {length} tokens.",
            {"": "x W"},
            {name: job for n in options.counts for name, job in ways(here, n).items()},
        )
    here = dataclasses.replace(case, batch=1, length=16)
    torch = Torch(here, options.counts) if options.torch else None
    done(
        "switch",
        here,
        "Another adapter, and a forward pass of 1 row of 16 tokens with it.",
        {"switch": "switch, PyTorch, none", "": "no switch"},
        switches(here) | (torch.jobs("switch") if torch else {}),
        memory=memory(here),
    )
    if torch:
        torch.quit()
    for tokens in options.train_tokens:
        here = dataclasses.replace(case, batch=max(tokens // 128, 1), length=min(tokens, 128))
        done(
            f"training, {tokens} tokens",
            here,
            f"A step of AdamW of 8 adapters, each with {tokens} tokens of its own.",
            {"": "8 steps"},
            training(here),
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
