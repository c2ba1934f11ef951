"""The table before a long run."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
import zoo

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
            lora_jax.Rule("b/kernel", rank=3, variant="dora", batch_axes=(0,)),
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
        ("head/bias", "full", None, None),
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
    with pytest.raises(ValueError, match=r"adapter for 'a/kernel', which frozen lacks"):
        lora_jax.summary(frozen, adapters)


def report():
    params = {
        f"block_{i}": {"query": {"kernel": jnp.ones((6, 4)).at[:, 1].set(0)}, "bias": jnp.ones(4)}
        for i in range(12)
    }
    params["out"] = {"kernel": jnp.ones((4, 3))}
    params["embed"] = {"embedding": jnp.ones((9, 6))}
    config = lora_jax.LoraConfig(
        [
            lora_jax.Rule(".*block_1/query/kernel", 1, variant="dora"),
            lora_jax.Rule(r".*query/kernel", 2),
            lora_jax.Rule("embed/.*", 2, materialize=True),
        ],
        trainable=["block_0/.*"],
    )
    split = lora_jax.lora_init(jax.random.key(0), params, config)
    return lora_jax.summary(*split, config=config, tx=optax.adam(1e-3))


def test_report_as_data():
    table = report()
    first, second, third = table.rules
    assert (first.adapted, first.taken) == (("block_1/query/kernel",), {})
    assert len(second.adapted) == 10
    assert second.taken == {
        "block_0/query/kernel": "a trainable pattern",
        "block_1/query/kernel": "Rule('.*block_1/query/kernel')",
    }
    assert third.adapted == ("embed/embedding",)
    assert table.frozen_kernels == {"out/kernel": (4, 3)}
    assert {row.path for row in table.rows if row.zero_columns} == {"block_1/query/kernel"}
    assert {row.path for row in table.rows if row.materialized} == {"embed/embedding"}
    # Adam has two moments of all that is trained, and a step.
    assert table.optimizer_nbytes == 2 * table.nbytes + 4


def test_report_as_text():
    text = str(report()).splitlines()
    for line in [
        "block_*/query/kernel (10)  6 x 4  lora                   2      1      200    240   83.33",
        "Rule('.*query/kernel'): 10 of 12 matched leaves adapted",
        "  not block_0/query/kernel: has a trainable pattern",
        "  not block_1/query/kernel: has Rule('.*block_1/query/kernel')",
        "left frozen, of two or more axes: out/kernel",
        "block_1/query/kernel has 1 all-zero columns: DoRA keeps them at zero until U V gives them "
        "a direction",
        "optimizer state: 2.1 KiB",
    ]:
        assert line in text, (line, "\n".join(text))


def test_report_of_a_model():
    tokens = jnp.arange(4)
    model = zoo.Tied()
    variables = model.init(jax.random.key(0), tokens)
    axes = lora_jax.kernel_axes(model, variables, tokens)
    axes = dataclasses.replace(axes, tied=frozenset({"embed/embedding"}))
    for tied, expected in [("untie", ("embed/embedding",)), (None, ())]:
        pattern = "embed/embedding" if tied else "dense/kernel"
        config = lora_jax.LoraConfig([lora_jax.Rule(pattern, 2, tied=tied)])
        split = lora_jax.lora_init(jax.random.key(0), variables["params"], config, axes=axes)
        table = lora_jax.summary(*split, axes=axes)
        assert table.tied == expected
        assert set(table.frozen_kernels) == {"dense/kernel", "embed/embedding"} - {pattern}
        assert ("tied, so read outside of their layer too" in str(table)) == bool(tied)


def test_report_of_another_config():
    params = {"a": {"kernel": jnp.ones((4, 3))}, "b": {"kernel": jnp.ones((4, 3))}}
    made, other = (lora_jax.LoraConfig([lora_jax.Rule(p, 2)]) for p in ("a/.*", ".*"))
    split = lora_jax.lora_init(jax.random.key(0), params, made)
    with pytest.raises(ValueError, match=r"another config.*differ in 'b/kernel'"):
        lora_jax.summary(*split, config=other)
    with pytest.raises(TypeError, match="config must be a LoraConfig"):
        lora_jax.summary(*split, config=[made])
    with pytest.raises(TypeError, match="tx must be an optax optimizer"):
        lora_jax.summary(*split, tx=1e-3)
    noisy = optax.add_noise(0.1, 0.1, jax.random.key(0))
    assert lora_jax.summary(*split, tx=noisy).optimizer_nbytes > 0
