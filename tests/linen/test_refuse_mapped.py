"""Parameters that go through nn.map_variables: refused in their layer, right where materialized."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import zoo
from helpers import random_like, random_variables, relative_error

import lora_jax
from lora_jax import LoraConfig, Rule

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(5), (4, 6))


def test_spectral_norm_is_materialized_or_refused():
    model = nn.SpectralNorm(nn.Dense(5))
    variables = model.init(KEY, X, update_stats=False)
    axes = lora_jax.kernel_axes(model, variables, X, update_stats=False)
    split = {}
    for materialize in (True, False):
        config = LoraConfig([Rule(".*kernel", 2, materialize=materialize)])
        split[materialize] = lora_jax.lora_init(KEY, variables["params"], config)
        if not materialize:
            with pytest.raises(
                ValueError, match=r"kernel' .*mapped by nn\.map_variables.*materialize=True"
            ):
                lora_jax.lora_init(KEY, variables["params"], config, axes=axes)
    for update in (True, False):
        frozen, adapters = split[True]
        adapters, rest = random_like(adapters), {"batch_stats": variables["batch_stats"]}
        y, stats = lora_jax.lora_apply(
            model,
            {"params": frozen, **rest},
            adapters,
            X,
            update_stats=update,
            mutable="batch_stats",
        )
        merged = {"params": lora_jax.lora_merge(frozen, adapters), **rest}
        expected, expected_stats = model.apply(
            merged, X, update_stats=update, mutable="batch_stats"
        )
        assert jnp.array_equal(y, expected)
        assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, stats, expected_stats)))
    frozen, adapters = split[False]
    with pytest.raises(
        ValueError, match=r"kernel' .*mapped by nn\.map_variables.*materialize=True"
    ):
        lora_jax.lora_apply(model, {"params": frozen, **rest}, adapters, X, update_stats=False)


@pytest.mark.parametrize(
    "model",
    [
        nn.WeightNorm(nn.Dense(5)),
        nn.WeightNorm(zoo.Compact()),
        zoo.Mapped(),
        zoo.Mapped(by_class=False),
        zoo.Mapped(layer=nn.jit(nn.Dense)),
    ],
)
def test_mapped_parameters_are_refused(model):
    variables = random_variables(model, X)
    config = LoraConfig([Rule(r"(.*/)?(?!.*scale)[^/]*kernel", 2)])
    axes = lora_jax.kernel_axes(model, variables, X)
    with pytest.raises(
        ValueError, match=r"kernel' .*mapped by nn\.map_variables.*materialize=True"
    ):
        lora_jax.lora_init(KEY, variables["params"], config, axes=axes)
    frozen, adapters = lora_jax.lora_init(KEY, variables["params"], config)
    with pytest.raises(
        ValueError, match=r"kernel' .*mapped by nn\.map_variables.*materialize=True"
    ):
        lora_jax.lora_apply(model, {"params": frozen}, adapters, X)


@pytest.mark.parametrize("scanned", [False, True])
def test_map_of_another_collection_is_no_map_of_parameters(scanned):
    """As the scans of T5X have it, for the names of their axes."""

    class MapsStatistics(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            y = nn.map_variables(nn.Dense, "batch_stats", lambda tree: tree)(6, name="d")(x)
            return y if not scanned else (y, None)

    model, args = MapsStatistics(), (X,)
    if scanned:
        model = nn.scan(MapsStatistics, {"params": 1}, split_rngs={"params": True}, length=2)()
        args = (X, None)
    variables = random_variables(model, *args)
    axes = lora_jax.kernel_axes(model, variables, *args)
    assert set(axes) == {"d/kernel"}
    config = LoraConfig([Rule(".*kernel", 2)])
    frozen, adapters = lora_jax.lora_init(KEY, variables["params"], config, axes=axes)
    adapters = random_like(adapters)
    y = lora_jax.lora_apply(model, {"params": frozen}, adapters, *args)
    merged = {"params": lora_jax.lora_merge(frozen, adapters)}
    y, expected = (jax.tree.leaves(out)[0] for out in (y, model.apply(merged, *args)))
    assert relative_error(y, expected) < 1e-5
