"""Which implementation of `jax.nn.dot_product_attention` is the fastest for a case."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.contenders.program import device_facts, device_memory
from benchmarks.contenders.step import Step
from benchmarks.models import arrays, data
from benchmarks.models.attention import attend
from benchmarks.models.cases import Case

IMPLEMENTATIONS = ("cudnn", "xla")


def make(case: Case) -> Step:
    """The attention of a layer with its gradient, in each implementation that works here."""
    jobs: dict[str, Callable[[], float]] = {}
    errors: dict[str, str] = {}
    facts: dict[str, Any] = {"trained": 0, "device": device_facts(), "errors": errors}
    widths = (case.width, case.kv_width, case.kv_width)
    noise = [
        data.noise(case, name, (case.batch, case.length, width), 1.0)
        for name, width in zip("qkv", widths, strict=True)
    ]
    inputs = arrays.array_of(noise, case.dtype)
    for name in IMPLEMENTATIONS:
        here = dataclasses.replace(case, attention=name)

        @jax.jit
        @functools.partial(jax.grad, argnums=(0, 1, 2))
        def gradient(q: Any, k: Any, v: Any, here: Case = here) -> jax.Array:
            return jnp.sum(attend(here, q, k, v).astype(jnp.float32))

        def job(gradient: Any = gradient) -> float:
            return float(jax.block_until_ready(gradient(*inputs))[0].ravel()[0])

        try:
            job()
        except Exception as error:  # it is not for this device, this shape or this version
            errors[name] = str(error).splitlines()[0][:200]
        else:
            jobs[name] = job
    return Step(jobs, facts, memory=device_memory)
