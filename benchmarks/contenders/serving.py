"""One base that serves many adapters: a prefill, and a step that decodes one token for each row.

Every contender has the same base, the same prompts and the same adapters. Row ``b`` has adapter
``b % N``, for each number ``N`` of adapters. Besides the library there is what one writes by hand
for LoRA: an interceptor that adds ``s (x U_i) V_i``, by each product of
`benchmarks.contenders.mixed_products`. A merged model is the base's own program with other numbers.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

import lora_jax
from benchmarks.contenders.by_hand import by_hand
from benchmarks.contenders.mixed_products import PRODUCTS
from benchmarks.contenders.ours import adapters, config
from benchmarks.contenders.program import Program, device_facts, device_memory
from benchmarks.contenders.step import Step
from benchmarks.models import arrays, data, linen
from benchmarks.models.attention import Cache
from benchmarks.models.cases import Case
from benchmarks.models.data import Noise

COUNTS = (1, 8, 32)
# Tokens that are decoded one after the other in one measurement; their mean counts.
DECODED = 8

# Of the base, adapters, their ids and what the model is called with, to what it returns.
Apply = Callable[[Any, Any, Any, tuple[Any, ...]], Any]


def step(case: Case, counts: tuple[int, ...], apply: Apply, params: Any, make: Any) -> Step:
    """A prefill and a step of decoding for each number of adapters; 0 is none.

    Args:
      case: its batch is the number of rows, its length that of the prompts.
      counts: numbers of adapters.
      apply: the adapted model.
      params: of the base.
      make: function of a number, to so many adapters.
    """
    prompts = jnp.asarray(data.batch(case)[0])
    facts: dict[str, Any] = {"trained": 0, "device": device_facts(), "programs": {}}
    jobs: dict[str, Callable[[], float]] = {}
    programs: list[Program] = []
    for count in counts:
        ids = jnp.arange(case.batch, dtype=jnp.int32) % max(count, 1)
        many = make(count)
        for kind, function, state in (
            ("prefill", prefill, (caches(case), jnp.array(prompts))),
            ("decode", decode, (caches(case), prompts[:, -1:], jnp.int32(case.length), ids)),
        ):
            name = f"{kind}, {count}" if count else kind
            jitted = jax.jit(functools.partial(function, case, apply), donate_argnums=0)
            facts["programs"][name] = one = {}
            program = Program(jitted, (state, params, many, ids), one)
            programs.append(program)
            calls = DECODED if kind == "decode" else 1
            jobs[name] = functools.partial(run, program, calls, [state], params, many, ids)

    def compile_() -> None:
        for program in programs:
            program.compile()

    repeats = {name: DECODED for name in jobs if name.startswith("decode")}
    return Step(jobs, facts, compile_, device_memory, repeats)


def run(program: Program, calls: int, states: list[Any], *arguments: Any) -> float:
    """Calls one after the other, each from the state that the last one left."""
    for _ in range(calls):
        states[0], value = program(states[0], *arguments)
    jax.block_until_ready(states[0])
    return float(value)


def caches(case: Case) -> tuple[Cache, ...]:
    """Room for a prompt, and for as many tokens again."""
    heads = case.kv_heads or case.heads
    shape = (case.batch, 2 * case.length, heads, case.head_features)
    zeros = functools.partial(jnp.zeros, shape, jnp.dtype(case.dtype))
    return tuple((zeros(), zeros()) for _ in range(case.layers))


def prefill(case: Case, apply: Apply, state: Any, params: Any, adapters: Any, ids: Any) -> Any:
    """The prompts, from an empty cache."""
    caches, prompts = state
    logits, caches = apply(params, adapters, ids, (prompts, caches, 0))
    return (caches, prompts), digest(logits)


def decode(case: Case, apply: Apply, state: Any, params: Any, adapters: Any, ids: Any) -> Any:
    """One token more for each row, from the end of the cache back to its middle.

    The likeliest token is found, but another one comes next: else rounding would soon decide what
    contenders compute.
    """
    caches, tokens, position, _ = state
    logits, caches = apply(params, adapters, ids, (tokens, caches, position))
    likeliest = jnp.argmax(logits, -1)
    tokens = (7 * tokens + 1) % case.vocab
    position = case.length + (position + 1) % case.length
    return (caches, tokens, position, likeliest), digest(logits)


def digest(logits: jax.Array) -> jax.Array:
    """A number that depends on the direction of all logits: rounding changes its third digit."""
    weights = arrays.array_of(Noise(logits.shape, 1.0, 0.0, 1), jnp.float32)
    logits = logits.astype(jnp.float32)
    return 50 + jnp.sum(weights * logits) / jnp.sqrt(jnp.sum(logits**2))


def plain(model: nn.Module) -> Apply:
    """The model as it is."""
    return lambda params, adapters, ids, inputs: model.apply({"params": params}, *inputs)


def adapted(model: nn.Module) -> Apply:
    """The model with this library's adapters."""
    return lambda params, adapters, ids, inputs: lora_jax.lora_apply(
        model, {"params": params}, adapters, *inputs, adapter_ids=ids, in_axes=0
    )


def of_base(case: Case, params: Any = None) -> Step:
    """The base alone, or other parameters."""
    apply = plain(linen.make(case))
    return step(case, (0,), apply, params or arrays.params(case), lambda count: ())


def of_merged(case: Case) -> Step:
    """The base with adapter 0 merged into it."""
    params, scale = arrays.params(case), case.scale
    flat = flatten_dict(params, sep="/")
    merge = jax.jit(lambda W, U, V: (W + scale * U[0] @ V[0]).astype(W.dtype))
    for path, factors in arrays.factors(case, stack=(1,)).items():
        flat[f"{path}/kernel"] = merge(flat[f"{path}/kernel"], *factors)
    return of_base(case, unflatten_dict(flat, sep="/"))


def of_library(case: Case, *, variant: str) -> Step:
    """This library: `stack`, `cache_norm`, `adapter_ids`."""
    params, rules = arrays.params(case), config(case, variant=variant)

    def many(count: int) -> Any:
        return jax.jit(lora_jax.cache_norm)(params, adapters(case, rules, params, count))

    return step(case, counts_of(case), adapted(linen.make(case)), params, many)


def of_hand(case: Case, *, add: Callable[..., jax.Array]) -> Step:
    """LoRA by an interceptor; ``add(x, U, V, ids)`` is one layer's ``(x U_i) V_i``.

    Its factors are in the base's dtype already, as one would keep them for this.
    """
    model = linen.make(case)

    def apply(params: Any, adapters: Any, ids: Any, inputs: Any) -> Any:
        return by_hand(
            lambda: model.apply({"params": params}, *inputs),
            adapters,
            lambda x, U, V: case.scale * add(x, U, V, ids),
        )

    def many(count: int) -> Any:
        return arrays.factors(case, jnp.dtype(case.dtype), stack=(count,))

    return step(case, counts_of(case), apply, arrays.params(case), many)


def counts_of(case: Case) -> tuple[int, ...]:
    """Numbers of adapters that are not more than the rows, so that each has a row."""
    return tuple(count for count in COUNTS if count <= case.batch)


CONTENDERS: dict[str, Callable[[Case], Step]] = {
    "serve-base": of_base,
    "serve-merged": of_merged,
    "serve-lora": functools.partial(of_library, variant="lora"),
    "serve-dora": functools.partial(of_library, variant="dora"),
    **{f"serve-{name}": functools.partial(of_hand, add=add) for name, add in PRODUCTS.items()},
}
