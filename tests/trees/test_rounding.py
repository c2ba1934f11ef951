"""What merging into 16 bits loses is said; rounded stochastically it is right in the mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_like

import lora_jax
from lora_jax.trees._rounding import round_to

KEY = jax.random.key(0)


def split(dtype, scale, trainable=()):
    params = {
        "a": {"kernel": 1 + jax.random.normal(KEY, (64, 32)).astype(dtype)},
        "b": jnp.ones(8, dtype),
    }
    rule = lora_jax.Rule("a/kernel", rank=2, variant="dora")
    frozen, adapters = lora_jax.lora_init(KEY, params, lora_jax.LoraConfig([rule], trainable))
    kernel = adapters["a"]["kernel"]
    U = scale * random_like(kernel.U, scale=1.0)
    return frozen, adapters | {"a": {"kernel": kernel.replace(U=U)}}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_neighbours_and_mean(dtype):
    x = jnp.linspace(-3.0, 3.0, 4_001)
    keys = jax.random.split(KEY, 400)
    rounded = jax.vmap(lambda key: round_to(x, dtype, key).astype(jnp.float32))(keys)
    unit = jnp.finfo(dtype).eps * jnp.maximum(jnp.abs(x), 2e-4)
    assert (jnp.abs(rounded - x) <= unit).all()
    assert (jnp.abs(rounded.mean(0) - x) <= 0.15 * unit).all()  # 6 deviations
    assert float(jnp.abs((rounded - x).mean())) < 0.01 * float(unit.mean())
    exact = x.astype(dtype)
    assert jnp.array_equal(round_to(exact.astype(jnp.float32), dtype, KEY), exact)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_eight_bits_with_and_without_infinity(dtype):
    rounded = round_to(jnp.full(20_000, 1.05), dtype, KEY).astype(jnp.float32)
    assert abs(float(rounded.mean()) - 1.05) < 6e-3
    assert set(np.unique(rounded).tolist()) == {1.0, 1.0 + float(jnp.finfo(dtype).eps)}


def test_what_is_not_finite_has_no_error_of_zero():
    frozen, adapters = split(jnp.float32, 1.0)
    kernel = adapters["a"]["kernel"]
    adapters["a"]["kernel"] = kernel.replace(V=kernel.V.at[0, 0].set(jnp.nan))
    assert np.isnan(lora_jax.rounding(frozen, adapters)["a/kernel"].largest)


def test_what_is_not_rounded():
    x = jnp.array([1.5, jnp.inf, 1e6])
    assert jnp.array_equal(round_to(x, jnp.float32, KEY), x)
    assert jnp.array_equal(round_to(x, jnp.float16, KEY), x.astype(jnp.float16))


def test_float32_loses_nothing():
    report = lora_jax.rounding(*split(jnp.float32, 1e-4))
    (row,) = report.values()
    assert (row.largest, row.mean, row.vanished) == (0.0, 0.0, 0.0)
    assert not report.lost


@pytest.mark.parametrize(("scale", "lost"), [(1e-4, True), (1.0, False)])
def test_small_updates_vanish_in_bfloat16(scale, lost):
    frozen, adapters = split(jnp.bfloat16, scale, ["b"])
    report = lora_jax.rounding(frozen, adapters)
    merged = lora_jax.lora_merge(frozen, adapters)["a"]["kernel"]
    W = frozen["a"]["kernel"]
    exact = adapters["a"]["kernel"].merge(W)
    error = np.abs(np.float32(merged) - np.float32(exact))
    row = report["a/kernel"]
    assert row.dtype == "bfloat16"
    assert row.largest == pytest.approx(error.max())
    assert row.mean == pytest.approx(error.mean(), rel=1e-5)
    changed = np.float32(exact) != np.float32(W)
    assert row.vanished == pytest.approx((changed & np.array(merged == W)).sum() / changed.sum())
    assert report.lost == (("a/kernel",) if lost else ())
    assert ("Most of the update vanishes in 1 of 2" in str(report)) == lost
    assert report["b"].vanished is None


def test_by_chance_the_update_is_not_lost():
    frozen, adapters = split(jnp.bfloat16, 1e-2)
    W = np.float32(frozen["a"]["kernel"])
    exact = np.float32(adapters["a"]["kernel"].merge(frozen["a"]["kernel"]))
    merge = jax.jit(lora_jax.lora_merge)
    near = np.float32(merge(frozen, adapters)["a"]["kernel"])
    chance = np.mean(
        [merge(frozen, adapters, key=k)["a"]["kernel"] for k in jax.random.split(KEY, 64)],
        axis=0,
        dtype=np.float32,
    )
    norm = np.linalg.norm
    assert norm(chance - exact) < 0.3 * norm(near - exact)
    assert norm(chance - exact) < norm(exact - W)
    again = lora_jax.lora_merge(frozen, adapters, key=KEY)["a"]["kernel"]
    assert jnp.array_equal(again, lora_jax.lora_merge(frozen, adapters, key=KEY)["a"]["kernel"])
    assert lora_jax.rounding(frozen, adapters, key=KEY)["a/kernel"].vanished > 0
