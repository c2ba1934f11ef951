"""Functions of trees and files take the state of an NNX model as they take a dict."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import lora_jax
from lora_jax import LoraConfig, Rule


class Model(nnx.Module):
    def __init__(self, rngs):
        layers = [nnx.Linear(6, 6, rngs=rngs) for _ in range(2)]
        self.layers = nnx.List(layers) if hasattr(nnx, "List") else layers
        self.norm, self.dropout = nnx.BatchNorm(6, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(6, 3, param_dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.head(self.dropout(self.norm(x)))


X = jnp.ones((2, 6))
CONFIG = LoraConfig([Rule("layers/.*kernel", rank=2, variant="dora")], trainable=["head/.*"])


@pytest.fixture
def split():
    graphdef, state = nnx.split(Model(nnx.Rngs(0)))
    frozen, adapters = lora_jax.lora_init_model(jax.random.key(1), graphdef, state, CONFIG, X)
    return graphdef, state, frozen, jax.tree.map(lambda x: x + 0.1, adapters)


def test_init_and_merge_keep_the_state(split):
    _, state, frozen, adapters = split
    assert isinstance(frozen, nnx.State)
    assert type(adapters) is dict
    assert sorted(adapters) == ["head", "layers"]
    assert sorted(adapters["layers"]) == ["0", "1"]
    merged = lora_jax.lora_merge(frozen, adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(state)
    whole = jax.tree.leaves(adapters["head"]["kernel"])[0]
    assert jnp.array_equal(jax.tree.leaves(merged["head"]["kernel"])[0], whole.astype(jnp.bfloat16))
    # Statistics, counts and keys are as they were.
    others = nnx.Not(nnx.Param)
    chex.assert_trees_all_equal(nnx.filter_state(merged, others), nnx.filter_state(state, others))
    model = Model(nnx.Rngs(3))
    nnx.update(model, merged)
    chex.assert_trees_all_equal(nnx.state(model, nnx.Param), nnx.filter_state(merged, nnx.Param))


def test_files(split, tmp_path):
    _, state, frozen, adapters = split
    lora_jax.save(tmp_path / "ours", adapters, frozen=frozen)
    again = lora_jax.load(tmp_path / "ours", state, verify=True)
    chex.assert_trees_all_equal(again, (frozen, adapters))
    assert jax.tree.structure(again) == jax.tree.structure((frozen, adapters))
    # After training the statistics are others, and the base is the same.
    trained = jax.tree.map(lambda x: x, state)
    trained["norm"]["mean"] = trained["norm"]["mean"].replace(jnp.ones(6))
    lora_jax.load(tmp_path / "ours", trained, verify=True)
    statistics = {"batch_stats": nnx.filter_state(trained, nnx.BatchStat)}
    lora_jax.save(tmp_path / "more", adapters, collections=statistics)
    before = {"batch_stats": nnx.filter_state(state, nnx.BatchStat)}
    *_, back = lora_jax.load(tmp_path / "more", state, collections=before)
    chex.assert_trees_all_equal(back, statistics)

    lora_jax.peft.save(tmp_path / "peft", frozen, adapters)
    _, peft = lora_jax.peft.load(tmp_path / "peft", state)
    for layer in ("0", "1"):
        theirs, ours = (tree["layers"][layer]["kernel"] for tree in (peft, adapters))
        chex.assert_trees_all_close(dict(theirs.arrays), dict(ours.arrays))


def test_many_and_sums(split, tmp_path):
    graphdef, state, frozen, adapters = split
    other = jax.tree.map(lambda x: x * 1.5, adapters)
    stacked = lora_jax.stack([adapters, other])
    ids = jnp.array([1, 0])
    model = nnx.merge(graphdef, state)
    model.eval()
    graphdef = nnx.graphdef(model)
    both = lora_jax.lora_apply(graphdef, frozen, stacked, X, adapter_ids=ids)
    for row, one in enumerate((other, adapters)):
        alone = lora_jax.lora_apply(graphdef, frozen, one, X[row : row + 1])
        chex.assert_trees_all_close(both[row : row + 1], alone, rtol=1e-5)
    chex.assert_trees_all_equal(lora_jax.unstack(stacked)[0], adapters)

    by_name = {"one": adapters, "other": other}
    pool = lora_jax.AdapterPool(state, like=adapters, slots=2, load=by_name.__getitem__)
    with pool.use(["other", "one"]) as (resident, slots):
        from_pool = lora_jax.lora_apply(graphdef, state, resident, X, adapter_ids=slots)
    chex.assert_trees_all_close(from_pool, both, rtol=1e-5)

    layers = {"layers": adapters["layers"]}
    total, _ = lora_jax.combine([layers, layers], [0.5, 0.5], params=state)
    merged = (lora_jax.lora_merge(state, tree) for tree in (total, layers))
    summed, alone = (nnx.filter_state(tree, nnx.Param) for tree in merged)
    chex.assert_trees_all_close(summed, alone, rtol=1e-5)
    report = lora_jax.summary(frozen, adapters, config=CONFIG, tx=optax.adam(1e-3))
    assert report.total == sum(x.size for x in jax.tree.leaves(nnx.filter_state(state, nnx.Param)))
    assert lora_jax.rounding(frozen, adapters)
    cached = lora_jax.cache_norm(frozen, adapters)
    chex.assert_trees_all_close(
        lora_jax.lora_apply(graphdef, frozen, cached, X),
        lora_jax.lora_apply(graphdef, frozen, adapters, X),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (
            LoraConfig([Rule("layers/.*kernel", rank=2)], ["norm/mean"]),
            "which is BatchStat, and no",
        ),
        (LoraConfig([Rule("dropout/rngs/key", rank=2)]), "is RngKey, and no parameter"),
        (LoraConfig([Rule("layers/7/kernel", rank=2)]), "matches nothing|matches no"),
    ],
)
def test_patterns_are_for_parameters(split, config, match):
    with pytest.raises(ValueError, match=match):
        lora_jax.lora_init(jax.random.key(0), split[1], config)


def test_a_state_is_no_adapters(split):
    _, _, frozen, adapters = split
    for function in (lora_jax.lora_merge, lora_jax.summary):
        with pytest.raises(TypeError, match="adapters are nested dicts"):
            function(frozen, frozen)
    with pytest.raises(TypeError, match="The base has adapters in it"):
        lora_jax.lora_merge(adapters, frozen)


def test_the_model_is_not_its_parameters(split):
    with pytest.raises(TypeError, match=r"graphdef, state = nnx\.split\(model\)"):
        lora_jax.lora_init(jax.random.key(0), Model(nnx.Rngs(0)), CONFIG)
