"""A pool serves every adapter as if it were alone, with few in memory and one program."""

import functools
import gc
import itertools
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_like, relative_error

import lora_jax
from examples import assets, minilm

MODEL = nn.Sequential([nn.Dense(6), nn.tanh, nn.Dense(4)])
X = random_like(jnp.zeros((4, 5)), seed=1, scale=1.0)
PARAMS = random_like(MODEL.init(jax.random.key(0), X)["params"], seed=2)


def one(seed=0, pattern=".*kernel", rank=2, trainable=(), **rule):
    rules = [lora_jax.Rule(pattern, rank, **rule)]
    config = lora_jax.LoraConfig(rules, trainable=trainable)
    return random_like(lora_jax.lora_init(jax.random.key(0), PARAMS, config)[1], seed=seed)


def numbered(name):
    return one(seed=int(name))


def pool_of(slots=2, load=numbered, like=None, **kwargs):
    return lora_jax.AdapterPool(PARAMS, like or one(), slots=slots, load=load, **kwargs)


def touch(pool, *names):
    for name in names:
        with pool.use([name]):
            pass


@jax.jit
def serve(params, stacked, ids, x):
    return lora_jax.lora_apply(MODEL, {"params": params}, stacked, x, adapter_ids=ids)


def expected(adapters, x):
    if adapters is None:
        return MODEL.apply({"params": PARAMS}, x)
    flat, nodes = (lora_jax.trees._paths.flatten(tree, "") for tree in (PARAMS, adapters))
    for key, node in nodes.items():
        if not isinstance(node, lora_jax.Adapter):
            del flat[key]
    frozen = lora_jax.trees._paths.unflatten(flat, PARAMS)
    return MODEL.apply({"params": lora_jax.lora_merge(frozen, adapters)}, x)


def u_of(name):
    return numbered(name)["layers_0"]["kernel"].U


def in_slot(stacked, slot):
    return stacked["layers_0"]["kernel"].U[slot]


def test_the_one_used_longest_ago_makes_room():
    pool = pool_of(slots=2)
    touch(pool, "1", "2", "1", "3")
    assert pool.resident == ("1", "3")
    assert pool.stats == (1, 3, 1)
    touch(pool, "2")
    assert pool.resident == ("3", "2")
    assert pool.stats == (1, 4, 2)


def test_ids_are_those_of_the_names_and_snapshots_stay():
    pool = pool_of(slots=2)
    with pool.use(["1", None, "2", "1"]) as (stacked, ids):
        assert ids.dtype == np.int32
        assert ids[1] == -1
        assert ids[0] == ids[3] != ids[2]
    touch(pool, "3", "4")
    assert (in_slot(stacked, ids[0]) == u_of("1")).all()
    assert pool.resident == ("3", "4")
    with pool.use([]) as (_, ids):
        assert ids.shape == (0,)


def test_what_is_in_use_stays():
    pool = pool_of(slots=2)
    lease = pool.acquire("1")
    touch(pool, "2", "3", "4")
    assert pool.resident == ("1", "4")
    assert (in_slot(pool.stacked, lease.id) == u_of("1")).all()
    with (
        pool.use(["4"]),
        pytest.raises(TimeoutError, match=r"took too long to use 1 adapters: 2 of 2 slots are in"),
        pool.use(["5"], timeout=0),
    ):
        pass
    assert pool.stats.loads == 4  # what has no room is not loaded
    lease.release()
    lease.release()
    touch(pool, "5", "6")
    assert pool.resident == ("5", "6")
    with pool.acquire(None) as base:
        assert (base.id, base.name) == (-1, None)


def test_one_waits_until_there_is_room():
    pool = pool_of(slots=2)
    leases = [pool.acquire("1"), pool.acquire("2")]
    with ThreadPoolExecutor(1) as threads:
        waits = threads.submit(touch, pool, "3")
        time.sleep(0.05)
        assert not waits.done()
        leases[1].release()
        waits.result(10)
    assert pool.resident == ("1", "3")


def test_replaced_while_in_use():
    pool = pool_of(slots=3)
    with pool.acquire("1") as old:
        pool.put("1", numbered("7"))
        with pool.acquire("1") as new:
            assert new.id != old.id
            assert (in_slot(pool.stacked, old.id) == u_of("1")).all()
            assert (in_slot(pool.stacked, new.id) == u_of("7")).all()
        touch(pool, "2", "3")  # never into the slot of the old one
        assert (in_slot(pool.stacked, old.id) == u_of("1")).all()
        assert pool.resident == ("2", "3")
        lease = pool.acquire("2"), pool.acquire("3")
        with pytest.raises(TimeoutError, match=r"took too long to put '2': 3 of 3 slots"):
            pool.put("2", numbered("8"), timeout=0.01)
    pool.put("4", numbered("4"), timeout=0)  # the slot is free now
    assert set(pool.resident) == {"2", "3", "4"}
    pool.put("4", numbered("5"), timeout=0)  # not in use: in its own slot
    for one_ in lease:
        one_.release()
    assert (in_slot(pool.stacked, pool.acquire("4").id) == u_of("5")).all()
    assert pool.stats.evictions == 1


def test_removed_is_loaded_again():
    versions = {"1": numbered("1")}
    pool = pool_of(slots=2, load=versions.__getitem__)
    with pool.acquire("1") as old:
        versions["1"] = numbered("2")
        assert pool.remove("1")
        assert not pool.remove("1")
        with pool.acquire("1") as new:
            assert (in_slot(pool.stacked, new.id) == u_of("2")).all()
            assert (in_slot(pool.stacked, old.id) == u_of("1")).all()
    assert pool.remove("1")
    touch(pool, "1")
    assert pool.stats == (0, 3, 0)


class Slow:
    """Loads when it is told to."""

    def __init__(self, load=numbered):
        self.load, self.calls = load, []
        self.entered, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, name):
        self.calls.append(name)
        self.entered.release()
        assert self.go.acquire(timeout=10)
        return self.load(name)


def test_loaded_once_for_all_who_wait():
    load = Slow()
    pool = pool_of(slots=2, load=load)
    with ThreadPoolExecutor(4) as threads:
        waits = [threads.submit(touch, pool, "1") for _ in range(4)]
        assert load.entered.acquire(timeout=10)
        pool.put("2", numbered("2"))  # loading blocks nobody else
        touch(pool, "2")
        with pytest.raises(TimeoutError, match="use '1', which another thread is loading"):
            pool.acquire("1", timeout=0.01)
        time.sleep(0.05)
        load.go.release()
        for wait in waits:
            wait.result(10)
    assert load.calls == ["1"]
    assert pool.stats.loads == 1


def test_failures_go_to_all_who_wait_and_are_not_remembered():
    def fail(name):
        raise OSError(f"no disk for {name}")

    load = Slow(fail)
    pool = pool_of(slots=2, load=load)
    pool.put("2", numbered("2"))
    pool.put("3", numbered("3"))
    with ThreadPoolExecutor(2) as threads:
        waits = [threads.submit(touch, pool, "1") for _ in range(2)]
        assert load.entered.acquire(timeout=10)
        time.sleep(0.05)
        load.go.release()
        for wait in waits:
            with pytest.raises(OSError, match="no disk for 1"):
                wait.result(10)
    assert pool.resident == ("2", "3")  # nothing made room for what could not be loaded
    load.load = numbered
    load.go.release()
    touch(pool, "1")
    assert load.calls == ["1", "1"]


@pytest.mark.parametrize("change", ["put", "remove"])
def test_what_was_read_before_a_change_is_not_used(change):
    load = Slow()
    pool = pool_of(slots=1, load=load)
    with ThreadPoolExecutor(1) as threads:
        lease = threads.submit(pool.acquire, "1")
        assert load.entered.acquire(timeout=10)
        if change == "put":
            pool.put("1", numbered("7"))
        else:
            pool.remove("1")
            load.load = lambda name: numbered("7")
            load.go.release()
        load.go.release()
        lease = lease.result(10)
    assert (in_slot(pool.stacked, lease.id) == u_of("7")).all()


def test_an_interrupted_load_is_begun_again_by_another_thread():
    def interrupted(name):
        load.load = numbered
        raise KeyboardInterrupt

    load = Slow(interrupted)
    pool = pool_of(load=load)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(touch, pool, "1")
        assert load.entered.acquire(timeout=10)
        second = threads.submit(touch, pool, "1")
        time.sleep(0.05)
        load.go.release(2)
        with pytest.raises(KeyboardInterrupt):
            first.result(10)
        second.result(10)
    assert pool.resident == ("1",)


def test_requests_for_several_do_not_wait_for_each_other():
    pool = pool_of(slots=3)

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(30):
            names = [str(n) for n in rng.choice(6, size=3, replace=False)]
            with pool.use(names) as (stacked, ids):
                for name, slot in zip(names, ids, strict=True):
                    assert (in_slot(stacked, slot) == u[name]).all()

    u = {str(n): np.asarray(u_of(str(n))) for n in range(6)}
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert len(pool.resident) == 3


@functools.cache
def kind(k):
    rules = [
        {"rank": 1 + k % 3},
        {"rank": 1 + k % 4, "variant": "dora", "detach_norm": k % 8 == 1},
        {"rank": 1 + k % 2, "rslora": True, "dropout": 0.1 * (k % 3)},
        {"pattern": "layers_0/kernel", "trainable": ["layers_2/bias"], "variant": "dora"},
    ]
    return one(**rules[k % 4])


def varied(i):
    """The adapters of a hundred alphas."""
    return jax.tree.map(
        lambda node: node.replace(alpha=0.5 + i) if isinstance(node, lora_jax.Adapter) else node,
        random_like(kind(i % 12), seed=i),
        is_leaf=lambda node: isinstance(node, lora_jax.Adapter),
    )


def test_one_program_for_a_hundred_adapters():
    chex.clear_trace_counter()
    traced = jax.jit(chex.assert_max_traces(serve.__wrapped__, n=1))
    like = [one(rank=4), one(variant="dora", trainable=["layers_2/bias"])]
    pool = pool_of(slots=3, like=like, load=lambda name: varied(int(name)))
    for i in range(100):
        names = [str(i), None, str(max(i - 1, 0)), str(i)]
        with pool.use(names) as (stacked, ids):
            y = traced(PARAMS, stacked, ids, X)
        if i % 25 == 0:
            for row, name in enumerate(names):
                alone = None if name is None else varied(int(name))
                y_alone = expected(alone, X[row : row + 1])[0]
                assert relative_error(y[row], y_alone) < 1e-5, (i, row)
    assert traced._cache_size() == 1
    assert pool.stats.loads == 100


def test_fused_and_lacking_parts():
    rule = {"pattern": "layers_0/kernel", "fused": 3}
    like = one(rank=2, parts=(0, 2), variant="dora", **rule)
    pool = pool_of(load=None, like=like)
    for seed, own in enumerate([{"parts": (2,)}, {"parts": (0,), "variant": "dora"}]):
        adapters = one(seed=seed, rank=1, **rule, **own)
        pool.put("a", adapters)
        with pool.use(["a"] * 4) as (stacked, ids):
            assert relative_error(serve(PARAMS, stacked, ids, X), expected(adapters, X)) < 1e-5
    with pytest.raises(ValueError, match=r"'b' does .*'layers_0/kernel' it adapts the parts \(1,"):
        pool.put("b", one(rank=1, parts=(1,), **rule))


def test_16_bits_and_memory_of_the_caller():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    config = lora_jax.LoraConfig([lora_jax.Rule(".*kernel", 2)], trainable=["layers_2/bias"])
    like = lora_jax.lora_init(jax.random.key(0), params, config)[1]
    pool = lora_jax.AdapterPool(params, like, slots=2)
    mine = jax.tree.map(np.array, random_like(like, seed=3))
    pool.put("a", mine)
    before = jax.tree.map(np.array, pool.stacked)
    jax.tree.map(lambda x: x.fill(0), mine)
    chex.assert_trees_all_equal(before, pool.stacked)
    with pytest.raises(ValueError, match="it has float64, which the pool's float32 cannot hold"):
        pool.put("a", jax.tree.map(lambda x: x.astype(np.float64), mine))


def test_bytes():
    one_bytes = sum(x.nbytes for x in jax.tree.leaves(one()))
    pool = lora_jax.AdapterPool(PARAMS, one(), max_bytes=3 * one_bytes + 1)
    assert (pool.slots, pool.nbytes) == (3, 3 * one_bytes)
    assert sum(x.nbytes for x in jax.tree.leaves(pool.stacked)) == pool.nbytes


def test_folders(tmp_path):
    names = [("{layer}/kernel", "{layer}.weight"), ("{layer}/bias", "{layer}.bias", "plain")]
    trees = {"ours": one(seed=1), "peft": one(seed=2, variant="dora", detach_norm=True)}
    lora_jax.save(tmp_path / "ours", trees["ours"])
    lora_jax.peft.save(tmp_path / "peft", PARAMS, trees["peft"], names=names)
    like = [one(rank=3), one(variant="dora")]
    pool = lora_jax.AdapterPool(PARAMS, like, slots=2, root=tmp_path / ".", names=names)
    with pool.use(["peft", "ours", "peft", None]) as (stacked, ids):
        y = serve(PARAMS, stacked, ids, X)
    for row, tree in enumerate([trees["peft"], trees["ours"], trees["peft"], None]):
        assert relative_error(y[row], expected(tree, X[row : row + 1])[0]) < 1e-5
    inside = lora_jax.AdapterPool(PARAMS, like, slots=2, root=tmp_path / "ours")
    for name in ["", ".", "..", "../ours", "a/b", "/etc", "a\\b", "..\\ours", "C:", "a\0", "a/"]:
        with pytest.raises(
            ValueError, match=r"is not a name of adapters: it must be that of one fol"
        ):
            inside.acquire(name)
    with pytest.raises(FileNotFoundError, match=r"no adapters 'x': .*neither adapter.json.* nor"):
        pool.acquire("x")
    assert set(pool.resident) == {"peft", "ours"}


def test_order_of_like_and_frozen_norms_do_not_matter():
    scaled = lora_jax.cache_norm(PARAMS, one(seed=4, variant="dora"))
    pools = [pool_of(like=like, load=None) for like in ([scaled, one()], [one(), scaled])]
    structures = {jax.tree.structure(pool.stacked) for pool in pools}
    assert len(structures) == 1
    pools[0].put("a", scaled)
    with pools[0].use(["a"] * 4) as (stacked, ids):
        y = serve(PARAMS, stacked, ids, X)
    assert relative_error(y, expected(one(seed=4, variant="dora"), X)) < 1e-5


def spoiled():
    return jax.tree.map(lambda x: x.at[0, 0].set(jnp.nan), one())


OTHER = {"layers_0": {"kernel": jnp.ones((5, 7))}}
OTHER_MODEL = lora_jax.lora_init(
    jax.random.key(0), OTHER, lora_jax.LoraConfig([lora_jax.Rule(".*", 1)])
)[1]
BIASED = {"layers_0": {"bias": lora_jax.LoraBias(jnp.ones(6))}}
MISFITS = {
    "lora_bias": (
        lambda: BIASED,
        ValueError,
        r"it adds something to 'layers_0/bias' \(PEFT's lora_b",
    ),
    "rank": (lambda: one(rank=3), ValueError, "at 'layers_0/kernel' it has rank 3, .*room for 2"),
    "DoRA": (lambda: one(variant="dora"), ValueError, "'layers_0/kernel' it is DoRA, and there is"),
    "fully trained": (
        lambda: one(trainable=["layers_2/bias"]),
        ValueError,
        "it has 'layers_2/bias', which nothing in the pool has: make the pool with .* in `like`",
    ),
    "fully trained, adapted": (
        lambda: one(pattern="layers_0/kernel", trainable=["layers_2/kernel"]),
        ValueError,
        "'layers_2/kernel' is adapted in one of the adapters and fully trained in another",
    ),
    "materialize": (lambda: one(materialize=True), ValueError, "'layers_0/kernel' differ in mater"),
    "model": (lambda: OTHER_MODEL, ValueError, r"'layers_0/kernel' does not fit the kernel \(5, 6"),
    "a stack": (lambda: lora_jax.stack([one()]), ValueError, "is a stack of 1 .*'layers_0/kernel'"),
    "NaN": (spoiled, ValueError, "at 'layers_0/kernel' it has NaN or infinite values"),
    "split": (
        lambda: (PARAMS, one()),
        TypeError,
        r"it must be a nested dict of arrays, .*got tuple",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits(name):
    adapters, error, message = MISFITS[name]
    pool = pool_of(load=lambda _: adapters())
    with pytest.raises(error, match=f"^Adapter 'mine' does not fit the pool: .*{message}"):
        pool.acquire("mine")
    with pytest.raises(error, match=f"^Adapter 'mine' does not fit the pool: .*{message}"):
        pool.put("mine", adapters())
    assert pool.resident == ()


def make(*args, **kwargs):
    return lambda: lora_jax.AdapterPool(*args, **kwargs)


ERRORS = {
    "neither": (make(PARAMS, one()), ValueError, "either by slots= or by max_bytes="),
    "both": (make(PARAMS, one(), slots=1, max_bytes=1), ValueError, "either by slots= or by max_b"),
    "no room": (make(PARAMS, one(), max_bytes=9), ValueError, "Not one adapter fits the pool: one"),
    "no slots": (make(PARAMS, one(), slots=0), ValueError, "Not one adapter fits the pool: one"),
    "two sources": (make(PARAMS, one(), slots=1, root=".", load=numbered), ValueError, "by root= "),
    "no root": (make(PARAMS, one(), slots=1, names=[]), ValueError, "names= and axes= are for the"),
    "no like": (make(PARAMS, [], slots=1), TypeError, "like must be adapters, or a list of them"),
    "empty like": (make(PARAMS, {}, slots=1), TypeError, "like must be adapters, or a list of"),
    "empty node": (make(PARAMS, {"a": {}}, slots=1), ValueError, "like has no adapters in it"),
    "like of another model": (make(PARAMS, OTHER_MODEL, slots=1), ValueError, "does not fit the k"),
    "frozen base": (
        make({"layers_0": PARAMS["layers_0"]}, one(), slots=1),
        ValueError,
        "'layers_2/kernel', which the model's parameters lack.*Nearest paths: layers_0/kernel",
    ),
    "NaN in like": (make(PARAMS, spoiled(), slots=1), ValueError, r"'like\[0\]' does not fit"),
    "unknown": (lambda: pool_of(load=None).acquire("x"), LookupError, r"pool.put\('x', adapters"),
    "a string": (lambda: touch_string("abc"), TypeError, "use takes a list of names.* not 'abc'"),
    "a number": (lambda: pool_of().acquire(3), TypeError, "must be a string, got 3"),
    "put a number": (lambda: pool_of().put(3, one()), TypeError, "must be a string, got 3"),
    "too many": (
        lambda: touch_string(["1", "2", "3"]),
        ValueError,
        "3 adapters are asked for at once, and the pool has 2 slots",
    ),
}


def touch_string(names):
    with pool_of().use(names):
        pass


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()


MEGABYTE = 2**20


def resident_bytes():
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def live_bytes():
    """Of all arrays of JAX."""
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.slow
def test_a_thousand_adapters_of_a_real_model_in_32_slots_from_8_threads():
    """No error, no answer that is not the adapter's own within 1e-5, and no memory that grows."""
    try:
        config, params = minilm.load_pretrained()
    except assets.MissingAsset as error:
        if "Get it with" not in str(error):  # it is there, but another one
            raise
        pytest.skip(str(error))
    encoder, count, threads, rows = minilm.Encoder(config), 1000, 8, 8
    mask = jnp.ones((rows, 16), jnp.int32)
    rules = {v: lora_jax.Rule(".*/(query|value)/kernel", 2, variant=v) for v in ("lora", "dora")}
    start = {
        variant: lora_jax.lora_init(jax.random.key(0), params, lora_jax.LoraConfig([rule]))[1]
        for variant, rule in rules.items()
    }

    def adapters(i):
        return random_like(start["dora" if i % 3 == 0 else "lora"], seed=i, scale=0.05)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def mixed(params, stacked, ids, tokens):
        variables = {"params": params}
        y = lora_jax.lora_apply(
            encoder, variables, stacked, tokens, mask, adapter_ids=ids, in_axes=0
        )
        return minilm.mean_pool(y, mask)

    @jax.jit
    @chex.assert_max_traces(n=2)  # LoRA and DoRA
    def alone(params, one, tokens):
        y = lora_jax.lora_apply(encoder, {"params": params}, one, tokens, mask[:1])
        return minilm.mean_pool(y, mask[:1])

    texts = np.random.default_rng(0).integers(1000, config.vocabulary, (count, 16))
    own_answer = functools.cache(lambda i: np.array(alone(params, adapters(i), texts[i : i + 1])))
    pool = lora_jax.AdapterPool(
        params, list(start.values()), slots=32, load=lambda name: adapters(int(name))
    )
    sizes, worst, turns = [], [0.0] * threads, [0] * threads
    begin, seconds = time.monotonic(), 20
    gate = threading.Barrier(threads, lambda: sizes.append((live_bytes(), resident_bytes())))

    def work(thread):
        rng = np.random.default_rng(thread)
        for first in itertools.cycle(range(4 * thread, count, 4 * threads)):
            # Half of the rows go through all adapters, the others ask for the same few.
            ids = np.array([*range(first, min(first + 4, count)), *rng.integers(0, 24, 4)])
            ids = np.resize(ids, rows)
            names = [str(i) for i in ids]
            if turns[thread] % 16 == 0:
                pool.put(names[-1], adapters(ids[-1]))
            if turns[thread] % 16 == 8:
                pool.remove(names[-2])
            with pool.use(names) as (stacked, slots):
                y = mixed(params, stacked, slots, texts[ids])
            for b, i in enumerate(ids):
                worst[thread] = max(worst[thread], relative_error(y[b], own_answer(i)[0]))
            del stacked, y
            turns[thread] += 1
            if time.monotonic() - begin > seconds * (0.25 + 0.25 * len(sizes)):
                gate.wait(60)  # for nobody to have a batch under way
            if len(sizes) == 4:
                return

    with ThreadPoolExecutor(threads) as executor:
        list(executor.map(work, range(threads)))
    print(sum(turns), pool.stats, max(worst), own_answer.cache_info(), np.array(sizes) / MEGABYTE)
    assert max(worst) < 1e-5
    assert len(pool.resident) == 32
    assert pool.stats.evictions > 32
    assert sum(x.nbytes for x in jax.tree.leaves(pool.stacked)) == pool.nbytes < 3 * MEGABYTE
    # What is in memory after a quarter of the time, and later.
    for live, resident in sizes[1:]:
        assert live <= sizes[0][0] + MEGABYTE
        assert resident <= sizes[0][1] + 64 * MEGABYTE
    others = [alone(params, adapters(i), texts[:1]) for i in range(6)]
    assert min(relative_error(a, b) for a, b in itertools.combinations(others, 2)) > 1e-3
