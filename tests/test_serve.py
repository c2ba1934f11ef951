"""Rows of a batch that come and go answer what each request gets alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_like, random_variables
from test_smollm2 import MODEL, TINY

import lora_jax
from examples import generate, serve

END = 3


@pytest.mark.slow
def test_rows_that_come_and_go_answer_as_alone():
    params = random_variables(MODEL, jnp.zeros((1, 4), jnp.int32))["params"]
    adapters = {}
    for name, rank, variant in (("a", 1, "lora"), ("b", 2, "dora"), ("c", 3, "lora")):
        rule = lora_jax.Rule(r".*_proj/kernel", rank=rank, variant=variant)
        config = lora_jax.LoraConfig([rule])
        one = lora_jax.lora_init(jax.random.key(rank), params, config)[1]
        adapters[name] = random_like(one, seed=rank, scale=0.5)
    rng = np.random.default_rng(0)
    requests = [
        serve.Request(name, rng.integers(4, TINY.vocabulary, rng.integers(2, 7)).tolist())
        for name in ("a", None, "b", "c", "b", "a", None, "c")
    ]
    pool = lora_jax.AdapterPool(params, list(adapters.values()), slots=2, load=adapters.get)
    apply = serve.cached_apply(MODEL)
    before = generate.step._cache_size()
    answered = list(serve.serve(MODEL, apply, params, pool, requests, rows=3, most=6, end=END))
    # One program for all rows, and one for a prompt, whichever adapters are in them.
    assert generate.step._cache_size() - before == 2
    assert sorted(map(id, answered)) == sorted(map(id, requests))
    assert {request.row for request in answered} == {0, 1, 2}
    assert pool.stats.evictions > 0

    def alone(variables, cache, tokens, lengths):
        params, adapters = variables
        collections = {"params": params, "cache": cache}
        if adapters is None:
            return MODEL.apply(collections, tokens, lengths, cached=True, mutable="cache")
        return lora_jax.lora_apply(
            MODEL, collections, adapters, tokens, lengths, cached=True, mutable="cache"
        )

    for request in requests:
        variables = params, adapters.get(request.name)
        (answer,) = generate.greedy(MODEL, alone, variables, [request.prompt], END, most=6)
        assert request.answer == answer
    assert len({tuple(request.answer) for request in requests}) > 3  # the adapters matter
