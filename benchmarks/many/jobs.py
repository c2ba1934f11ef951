"""What is timed in JAX, by name, and the bytes of what is held in memory."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax
from benchmarks.contenders import ours
from benchmarks.contenders.mixed_products import PRODUCTS
from benchmarks.contenders.training import cross_entropy
from benchmarks.models import arrays, data, linen
from benchmarks.models.cases import Case

ROWS = 32
Jobs = dict[str, Callable[[], float]]


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
    params = arrays.params(case)
    _, one = lora_jax.lora_init(jax.random.key(0), params, ours.config(case, variant=variant))
    rng = np.random.default_rng(case.seed)

    def noisy(x: jax.Array) -> jax.Array:
        return x + jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32))

    return [jax.tree.map(noisy, one) for _ in range(count)]


def ids_of(count: int) -> np.ndarray:
    """The adapter of each row, in turn."""
    return np.arange(ROWS, dtype=np.int32) % count


def mixed(case: Case, counts: tuple[int, ...]) -> Jobs:
    """A batch of 32 rows over several adapters, and over none."""
    model, params = linen.make(case), arrays.params(case)
    tokens, _ = data.batch(case)
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


def products(case: Case, count: int) -> Jobs:
    """What the adapters of one kernel add, by each product, and the product with the kernel."""
    d, k, r = case.width, case.ff, case.rank
    rng = np.random.default_rng(case.seed)

    def noise(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    x, W = noise(ROWS, case.length, d), noise(d, k)
    U, V, ids = noise(count, d, r), noise(count, r, k), jnp.asarray(ids_of(count))

    product = jax.jit(jnp.matmul)
    jobs = {"x W": timed(lambda: product(x, W))}
    for name, add in PRODUCTS.items():
        jobs[f"{name}, {count}"] = timed(functools.partial(jax.jit(add), x, U, V, ids))
    return jobs


def switches(case: Case) -> Jobs:
    """From one adapter to another, and the next answer: by id, by merging, by a new trace."""
    model, params = linen.make(case), arrays.params(case)
    many = adapters(case, 8)
    stacked = lora_jax.stack(many)
    tokens, _ = data.batch(case)
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
    model, params = linen.make(case), arrays.params(case)
    stacked = lora_jax.stack(adapters(case, count))
    optimizer = optax.adamw(1e-4)
    batch = data.batch(dataclasses.replace(case, batch=count * case.batch))
    batches = [jnp.reshape(x, (count, case.batch, *x.shape[1:])) for x in map(jnp.asarray, batch)]

    def step(adapters: Any, state: Any, params: Any, batch: Any) -> Any:
        def loss(adapters: Any) -> jax.Array:
            tokens, labels = batch
            y = lora_jax.lora_apply(model, {"params": params}, adapters, tokens)
            return cross_entropy(y, labels)

        updates, state = optimizer.update(jax.grad(loss)(adapters), state, adapters)
        return optax.apply_updates(adapters, updates), state

    one, many = jax.jit(step), jax.jit(jax.vmap(step, in_axes=(0, 0, None, 0)))
    state = jax.vmap(optimizer.init)(stacked)
    each = [jax.tree.map(lambda a, i=i: a[i], (stacked, state, batches)) for i in range(count)]

    def in_turn() -> list[Any]:
        return [one(tree, state, params, batch) for tree, state, batch in each]

    return {
        f"{count} steps": timed(in_turn),
        f"one step of {count}": timed(lambda: many(stacked, state, params, batches)),
    }


def memory(case: Case, count: int = 32) -> dict[str, int]:
    """Bytes of one base with adapters, and of merged models."""
    base = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays.params(case)))
    one = sum(leaf.nbytes for leaf in jax.tree.leaves(adapters(case, 1)))
    return {
        "adapters": count,
        "base": base,
        "adapter": one,
        "base and adapters": base + count * one,
        "merged models": count * base,
    }
