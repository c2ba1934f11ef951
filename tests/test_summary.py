"""The table before a long run."""

import jax
import jax.numpy as jnp
import pytest

import lora_jax


def build(dtype=jnp.float32):
    key = jax.random.key(0)
    params = {
        "a": {"kernel": jnp.ones((20, 10), dtype), "bias": jnp.ones(10, dtype)},
        "b": {"kernel": jnp.ones((3, 10, 5), dtype)},
        "head": {"bias": jnp.ones(7, dtype)},
    }
    config = lora_jax.LoraConfig(
        [
            lora_jax.Rule("a/kernel", rank=2, alpha=8.0),
            lora_jax.Rule("b/kernel", rank=3, variant="dora", stack_axes=(0,)),
        ],
        trainable=["head/.*"],
    )
    return lora_jax.lora_init(key, params, config)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_counts(dtype):
    table = lora_jax.summary(*build(dtype))
    assert [(row.path, row.variant, row.rank, row.scale) for row in table.rows] == [
        ("a/kernel", "lora", 2, 4.0),
        ("b/kernel", "dora", 3, 1.0),
        ("head/bias", "whole", None, None),
    ]
    assert [row.shape for row in table.rows] == [(20, 10), (3, 10, 5), (7,)]
    trained = [2 * (20 + 10), 3 * (3 * (10 + 5) + 5), 7]
    assert [row.trained for row in table.rows] == trained
    assert [row.total for row in table.rows] == [200, 150, 7]
    assert table.trained == sum(trained)
    assert table.total == 200 + 10 + 150 + 7
    assert table.nbytes == 4 * sum(trained)
    assert table.percent == 100 * sum(trained) / 367


def test_text():
    text = str(lora_jax.summary(*build()))
    assert "b/kernel   3 x 10 x 5  dora" in text
    assert text.endswith("trained 217 of 367 parameters (59.13 %), 360 frozen; 868 bytes to save")


def test_abstract():
    assert str(lora_jax.summary(*jax.eval_shape(build))) == str(lora_jax.summary(*build()))


def test_adapters_of_another_base():
    frozen, adapters = build()
    del frozen["a"]
    with pytest.raises(ValueError, match=r"adapter for 'a/kernel', but no such kernel"):
        lora_jax.summary(frozen, adapters)
