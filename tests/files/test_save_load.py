"""Saved adapters come back as they were, or not at all."""

import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import chex
import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_like

import lora_jax
from lora_jax.cli.adapters._open_adapter import open_adapter
from lora_jax.cli.adapters._trees_without_model import trees_of_lora_jax
from lora_jax.cli.merging._merge_lora_jax import updates_of_lora_jax
from lora_jax.files._adapter_json import checksum
from lora_jax.files._bytes import write_bytes
from lora_jax.files._checkpoint import Checkpoint
from lora_jax.files._fingerprint import fingerprint
from lora_jax.files._json import json_bytes, parse_json
from lora_jax.files._read_folder import read
from lora_jax.files._tensors import Tensors, encode


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((2, 3), name="split")(x)
        x = nn.DenseGeneral(5, axis=(-2, -1), name="join")(x)
        return nn.Dense(3, name="head", param_dtype=jnp.bfloat16)(x)


RULES = {
    "lora": lora_jax.Rule(".*(split|join)/kernel", rank=2, alpha=3.0, dropout=0.1),
    "dora": lora_jax.Rule(".*(split|join)/kernel", rank=2, variant="dora", detach_norm=True),
    "rslora": lora_jax.Rule("join/kernel", rank=3, rslora=True),
    "materialize": lora_jax.Rule(
        "split/bias|head/kernel", rank=1, materialize=True, input_axes=(0,)
    ),
    "fused": lora_jax.Rule("fused", rank=1, fused=3, parts=(0, 2)),
}


@pytest.fixture
def params():
    params = Model().init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    return params | {"fused": jax.random.normal(jax.random.key(1), (4, 6))}


def adapted(params, rule, trainable=("head/.*",)):
    if rule is RULES["materialize"]:
        trainable = ()
    axes = lora_jax.kernel_axes(Model(), {"params": params}, jnp.ones((1, 4)))
    if rule is RULES["fused"]:
        axes = None
    config = lora_jax.LoraConfig([rule], trainable=trainable)
    frozen, adapters = lora_jax.lora_init(jax.random.key(2), params, config, axes=axes)
    return frozen, random_like(adapters)


@pytest.fixture
def saved(params, tmp_path):
    frozen, adapters = adapted(params, RULES["dora"])
    lora_jax.save(tmp_path, adapters, frozen=frozen)
    return tmp_path, frozen, adapters


def edit(folder, change):
    """Changes the index, and makes its checksum right again."""
    index = json.loads((folder / "adapter.json").read_text())
    change(index)
    index["checksum"] = checksum(index)
    (folder / "adapter.json").write_bytes(json_bytes(index))


def set_in(*keys):
    *path, last, value = keys

    def change(index):
        for key in path:
            index = index[key]
        index[last] = value

    return change


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_comes_back_bit_for_bit(params, rule, tmp_path):
    frozen, adapters = adapted(params, rule)
    lora_jax.save(tmp_path / "a" / "b", adapters, frozen=frozen, metadata={"task": ["x", 1]})
    frozen2, adapters2 = lora_jax.load(tmp_path / "a" / "b", params, verify=True)
    chex.assert_trees_all_equal((frozen, adapters), (frozen2, adapters2))
    assert jax.tree.structure(adapters) == jax.tree.structure(adapters2)
    chex.assert_trees_all_equal_dtypes(adapters, adapters2)
    assert read(tmp_path / "a" / "b").metadata == {"task": ["x", 1]}


def test_other_containers_boxes_and_dtypes(tmp_path):
    params = {
        "a": {"kernel": nn.Partitioned(jnp.ones((3, 2), jnp.bfloat16), ("x", None))},
        "b": nn.Partitioned(jnp.ones(2, jnp.bfloat16), (None,)),
        "c": nn.Partitioned(jnp.ones(2), (None,)),
    }
    config = lora_jax.LoraConfig([lora_jax.Rule("a/kernel", rank=1)], trainable=["b|c"])
    params = flax.core.freeze(params)
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config)
    adapters = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim == 2 else x, adapters)
    lora_jax.save(tmp_path, adapters, frozen=frozen)
    frozen2, adapters2 = lora_jax.load(tmp_path, params, verify=True)
    assert jax.tree.structure((frozen, adapters)) == jax.tree.structure((frozen2, adapters2))
    chex.assert_trees_all_equal((frozen, adapters), (frozen2, adapters2))
    assert adapters2["a"]["kernel"].U.dtype == jnp.bfloat16


def test_the_base_is_not_saved(saved):
    folder, _, adapters = saved
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(adapters))
    assert sorted(file.suffix for file in folder.iterdir()) == [".json", ".safetensors"]
    for file in folder.glob("*.safetensors"):
        assert size < file.stat().st_size < size + 2000


def test_saving_again_replaces(saved, params):
    folder, _, adapters = saved
    twice = jax.tree.map(lambda x: 2 * x, adapters)
    lora_jax.save(folder, twice)
    assert len(list(folder.iterdir())) == 2
    chex.assert_trees_all_equal(lora_jax.load(folder, params)[1], twice)
    with pytest.raises(ValueError, match="no hashes of its base"):
        lora_jax.load(folder, params, verify=True)


def test_another_base(saved, params):
    folder, _, _ = saved
    other = jax.tree.map(lambda x: x, params)
    other["join"]["bias"] = other["join"]["bias"] + 1
    lora_jax.load(folder, other)
    with pytest.raises(ValueError, match=r"not the base .*'join/bias' has other values"):
        lora_jax.load(folder, other, verify=True)
    del other["fused"]
    with pytest.raises(ValueError, match="'fused' is missing"):
        lora_jax.load(folder, other, verify=True)
    other["more"] = jnp.ones(1)
    with pytest.raises(ValueError, match="'more' was not there"):
        lora_jax.load(folder, other, verify=True)


def test_without_a_base_there_is_none_to_verify(params, tmp_path):
    frozen, adapters = lora_jax.lora_init(
        jax.random.key(0), params, lora_jax.LoraConfig(trainable=[".*"])
    )
    lora_jax.save(tmp_path, adapters, frozen=frozen)
    chex.assert_trees_all_equal(lora_jax.load(tmp_path, params, verify=True), (frozen, adapters))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("join"), "'join/kernel', which params lacks.*Nearest paths"),
        (lambda p: p["join"].update(kernel=jnp.ones((2, 3, 6))), "'join/kernel' does not fit"),
        (lambda p: p["join"].update(kernel=jnp.ones((6, 5))), "kernel of 3 axes"),
        (lambda p: p["head"].update(kernel=jnp.ones((5, 3))), "fully trained as bfloat16"),
        (
            lambda p: p["head"].update(bias=jnp.ones(4, jnp.bfloat16)),
            "'head/bias' was fully trained",
        ),
    ],
)
def test_another_model(saved, params, change, message):
    change(params)
    with pytest.raises(ValueError, match=message):
        lora_jax.load(saved[0], params)


def no_kernels(U, V):
    axes = lora_jax.KernelAxes((1,), (2,), (0,))
    return lora_jax.Adapter(jnp.zeros(U), jnp.zeros(V), axes=axes)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda a: {}, ValueError, "nothing to save"),
        (lambda a: [a], TypeError, "nested dict"),
        (lambda a: {"kernel": 1.0}, TypeError, "neither an adapter nor an array"),
        (lambda a: {"a/b": a["join"]["kernel"]}, ValueError, "'a/b'"),
        (lambda a: {0: jnp.ones(1), "0": jnp.ones(1)}, ValueError, "two leaves have the path '0'"),
        (lambda a: {(0, 1): a["join"]["kernel"]}, ValueError, r"\(0, 1\) is part of it"),
        (lambda a: {"a\nb": a["join"]["kernel"]}, ValueError, "not a name"),
        (lambda a: {"k": a["join"]["kernel"], "k.U": jnp.ones(2)}, ValueError, "Two arrays"),
        (lambda a: jax.tree.map(lambda x: x * jnp.nan, a), ValueError, "'.*' has NaN"),
        (lambda a: jax.eval_shape(lambda: a), TypeError, "not an array"),
        (lambda a: {"k": no_kernels((0, 4, 1), (0, 1, 3))}, ValueError, r"'k': U is \(0, 4, 1\)"),
        (lambda a: {"k": no_kernels((2, 4, 1), (1, 1, 3))}, ValueError, "'k': the shapes .* not"),
    ],
)
def test_what_cannot_be_saved(saved, tmp_path_factory, make, kind, message):
    _, _, adapters = saved
    folder = tmp_path_factory.mktemp("new") / "folder"
    with pytest.raises(kind, match=message):
        lora_jax.save(folder, make(adapters))
    assert not folder.exists()


FIXTURES = Path(__file__).parent / "fixtures" / "saved"


def numbers(*shape, start=0, dtype=np.float32):
    """The numbers of which the folders in tests/files/fixtures are."""
    return jnp.asarray(((np.arange(np.prod(shape)) + start) % 7 - 3).reshape(shape) / 4, dtype)


@pytest.mark.parametrize("name", ["with_base", "without_base"])
def test_folders_of_before_load(name):
    """Written by version 0.1.0 in version 1 of the format, before it knew of collections."""
    adapter = lora_jax.Adapter
    adapters = {
        "dora": {
            "kernel": adapter(
                numbers(3, 2),
                numbers(2, 4, start=1),
                jnp.array([1.0, 0.5, 2.0, 1.5]),
                variant=lora_jax.DoRA(detach_norm=True),
                rank=2,
                alpha=4.0,
                dropout=0.25,
            )
        },
        "head": {
            "kernel": numbers(4, 2, start=2),
            "bias": lora_jax.FullyTrained(numbers(2, start=3), "bfloat16"),
        },
        "lora": {
            "bias": lora_jax.LoraBias(numbers(4, start=4), 0.5),
            "kernel": adapter(numbers(3, 1, start=5), numbers(1, 4, start=6), alpha=0.5),
        },
        "scan": {
            "kernel": adapter(
                numbers(2, 2, 3, 1),
                numbers(2, 2, 1, 2, start=1),
                rslora=True,
                alpha=3.0,
                axes=lora_jax.KernelAxes((1,), (2,), (0,), fused=3, parts=(0, 2)),
            )
        },
        "tied": {
            "embedding": adapter(numbers(5, 1), numbers(1, 3, start=2), alpha=2.0, untied=True)
        },
        "whole": {
            "scale": adapter(numbers(2, 1), numbers(1, 2, start=2), alpha=2.0, materialize=True)
        },
    }
    params = {
        "dora": {"kernel": numbers(3, 4)},
        "lora": {"kernel": numbers(3, 4), "bias": numbers(4)},
        "scan": {"kernel": numbers(2, 3, 6)},
        "tied": {"embedding": numbers(5, 3)},
        "whole": {"scale": numbers(2, 2)},
        "norm": {"scale": numbers(3)},
        "head": {"kernel": jnp.zeros((4, 2)), "bias": jnp.zeros(2, jnp.bfloat16)},
    }
    frozen, got = lora_jax.load(FIXTURES / name, params, verify=name == "with_base")
    assert jax.tree.structure(got) == jax.tree.structure(adapters)
    chex.assert_trees_all_equal(got, adapters)
    assert set(frozen) == set(params) - {"head"}
    assert read(FIXTURES / name).collections == {}


# --- other collections ---


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(4)(x))
        return nn.Dense(2)(x)


X = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def normed():
    """A model with BatchNorm, trained: its variables, and what training changed."""
    model = Normed()
    variables = model.init(jax.random.key(0), X)
    config = lora_jax.LoraConfig([lora_jax.Rule("Dense_0/kernel", 2)], trainable=["Dense_1/.*"])
    frozen, adapters = lora_jax.lora_init(jax.random.key(1), variables["params"], config)
    adapters = random_like(adapters)
    call = {"params": frozen, "batch_stats": variables["batch_stats"]}
    _, state = lora_jax.lora_apply(model, call, adapters, X, train=True, mutable=["batch_stats"])
    y = lora_jax.lora_apply(model, {"params": frozen, **state}, adapters, X)
    return model, variables, frozen, adapters, state, y


def test_what_training_changed_beside_the_parameters_comes_back(normed, tmp_path):
    model, variables, frozen, adapters, state, y = normed
    lora_jax.save(tmp_path, adapters, frozen=frozen, collections=state)
    given = {**variables, "cache": {"i": jnp.ones(1)}}
    frozen, adapters, rest = lora_jax.load(
        tmp_path, variables["params"], collections=given, verify=True
    )
    assert set(rest) == {"batch_stats", "cache"}
    chex.assert_trees_all_equal(rest["batch_stats"], state["batch_stats"])
    again = lora_jax.lora_apply(model, {"params": frozen, **rest}, adapters, X)
    np.testing.assert_array_equal(again, y)
    before = {"params": frozen, "batch_stats": variables["batch_stats"]}
    assert abs(lora_jax.lora_apply(model, before, adapters, X) - y).max() > 0.1
    assert len(list(tmp_path.iterdir())) == 2


def test_collections_that_are_not_asked_for_are_not_forgotten(normed, tmp_path):
    _, variables, frozen, adapters, state, _ = normed
    lora_jax.save(tmp_path / "a", adapters, frozen=frozen, collections=state)
    params, stats = variables["params"], variables["batch_stats"]["BatchNorm_0"]
    with pytest.raises(ValueError, match=r"has the collection 'batch_stats'.*collections=variab"):
        lora_jax.load(tmp_path / "a", params, verify=True)
    with pytest.raises(TypeError, match="collections must be a dict of collections"):
        lora_jax.load(tmp_path / "a", params, collections=[])
    with pytest.raises(ValueError, match="Two arrays would have the name 'a:b'"):
        lora_jax.save(tmp_path / "b", {"a:b": X}, collections={"a": {"b": X}})
    with pytest.raises(ValueError, match="'batch_stats', which collections lacks"):
        lora_jax.load(tmp_path / "a", params, collections={"cache": {}})
    for other, message in [
        ({"mean": stats["mean"]}, "has 'BatchNorm_0/var' in the collection 'batch_stats', and the"),
        ({**stats, "var": jnp.ones(5)}, r"'BatchNorm_0/var' .* float32 \(4,\), but the model has"),
        ({**stats, "var": stats["var"].astype(jnp.bfloat16)}, "but the model has bfloat16"),
    ]:
        given = {"batch_stats": {"BatchNorm_0": other}}
        with pytest.raises(ValueError, match=message):
            lora_jax.load(tmp_path / "a", params, collections=given)
    pool = lora_jax.AdapterPool(params, adapters, slots=1, root=tmp_path)
    with pytest.raises(ValueError, match="has the collection 'batch_stats'"), pool.use(["a"]):
        pass


def test_the_command_forgets_no_collections(tmp_path):
    stats = {"batch_stats": {"mean": jnp.ones(2)}}
    lora_jax.save(tmp_path / "a", {"bias": jnp.ones(2)}, collections=stats)
    with pytest.raises(ValueError, match="'batch_stats' beside the adapters"):
        trees_of_lora_jax(tmp_path / "a", [])
    write_bytes(tmp_path / "base", encode({"bias": np.zeros(2, np.float32)}))
    with pytest.raises(ValueError, match="'batch_stats' beside the adapters"):
        updates_of_lora_jax(tmp_path / "a", Checkpoint(tmp_path / "base"))
    assert set(open_adapter(tmp_path / "a").fully_trained) == {"bias", "batch_stats: mean"}


def test_peft_has_no_place_for_collections(normed, tmp_path):
    _, _, frozen, adapters, state, _ = normed
    with pytest.raises(ValueError, match=r"no place for the collection 'batch_stats'.*_average"):
        lora_jax.peft.save(tmp_path / "p", frozen, adapters, collections=state)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("collections", "kind", "message"),
    [
        ([], TypeError, "collections must be a dict of collections"),
        ({"params": {}}, ValueError, "beside 'params'.*leave it out"),
        ({"batch_stats": jnp.ones(2)}, TypeError, r"collections\['batch_stats'\] must be a nested"),
        (
            {"batch_stats": {"mean": jnp.ones(2) * jnp.nan}},
            ValueError,
            "'batch_stats:mean' has",
        ),
        (
            {"batch_stats": {"mean": "x"}},
            TypeError,
            "'batch_stats:mean' is 'x', which",
        ),
        ({"x": {"mean": jnp.ones(2, jnp.int4)}}, ValueError, "'x:mean' is of dtype int4"),
        ({"x": {"key": jax.random.key(0)}}, TypeError, "'x:key' is .*random.key_data"),
    ],
)
def test_collections_that_cannot_be_saved(tmp_path, collections, kind, message):
    with pytest.raises(kind, match=message):
        lora_jax.save(tmp_path / "new", {"bias": jnp.ones(2)}, collections=collections)
    assert not (tmp_path / "new").exists()


def test_variables_are_no_base(normed, tmp_path):
    _, variables, frozen, adapters, _, _ = normed
    with pytest.raises(ValueError, match=r"variables\['params'\].*by collections="):
        lora_jax.save(tmp_path, adapters, frozen={**variables, "params": frozen})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in("collections", []), "'collections' must be dict"),
        (set_in("collections", {"batch_stats": "x"}), "'collections' has 'x' for 'batch_stats'"),
        (set_in("collections", {"x": ["mean"]}), "lacks 'x:mean'"),
        (set_in("collections", {}), "has 'batch_stats:mean', which .* does not describe"),
        (set_in("collections", {"batch_stats": ["mean", "mean"]}), "not paths"),
    ],
)
def test_an_index_whose_collections_make_no_sense(tmp_path, change, message):
    stats = {"batch_stats": {"mean": jnp.ones(2)}}
    lora_jax.save(tmp_path, {"bias": jnp.ones(2)}, collections=stats)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        lora_jax.load(tmp_path, {"bias": jnp.ones(2)}, collections=stats)


def test_layers_in_dicts_by_number(tmp_path):
    params = {"layers": {i: {"kernel": i + jnp.ones((3, 2))} for i in range(2)}}
    config = lora_jax.LoraConfig([lora_jax.Rule("layers/1/kernel", 1)], trainable=["layers/0/.*"])
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config)
    lora_jax.save(tmp_path / "a", adapters, frozen=frozen)
    again = lora_jax.load(tmp_path / "a", params, verify=True)
    chex.assert_trees_all_equal(again, (frozen, adapters))
    lora_jax.export(tmp_path / "m", frozen, adapters)
    assert set(Tensors(tmp_path / "m")) == {"layers/0/kernel", "layers/1/kernel"}


def test_layers_in_lists(tmp_path):
    params = {"layers": [{"kernel": jnp.ones((3, 2))}, {"kernel": jnp.zeros((3, 2))}]}
    params["head"] = {"kernel": jnp.ones((2, 2))}
    for config in (
        lora_jax.LoraConfig([lora_jax.Rule("layers/1/kernel", 1)]),
        lora_jax.LoraConfig([lora_jax.Rule(".*", 1)]),
        lora_jax.LoraConfig(trainable=["layers/.*"]),
    ):
        with pytest.raises(TypeError, match=r"list at 'layers'.*to_state_dict.*'layers/0/...'"):
            lora_jax.lora_init(jax.random.key(0), params, config)
    config = lora_jax.LoraConfig([lora_jax.Rule("head/kernel", 1)])
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config)
    lora_jax.save(tmp_path / "a", adapters, frozen=frozen)
    lora_jax.load(tmp_path / "a", params, verify=True)
    params["layers"][1]["kernel"] += 1
    with pytest.raises(ValueError, match="'layers' has other values"):
        lora_jax.load(tmp_path / "a", params, verify=True)
    with pytest.raises(TypeError, match=r"at 'layers', which is not one array.*to_state_dict"):
        lora_jax.export(tmp_path / "m", frozen, adapters)


def test_saving_checks_the_base(saved, tmp_path):
    _, frozen, adapters = saved
    with pytest.raises(ValueError, match="which frozen lacks"):
        lora_jax.save(tmp_path / "new", adapters, frozen={"other": jnp.ones(2)})
    frozen["join"]["kernel"] = jnp.ones((2, 3, 6))
    with pytest.raises(ValueError, match="does not fit"):
        lora_jax.save(tmp_path / "new", adapters, frozen=frozen)


def test_not_in_jit(saved, tmp_path):
    with pytest.raises(ValueError, match="traced"):
        jax.jit(lambda a: lora_jax.save(tmp_path / "new", a))(saved[2])


@pytest.mark.parametrize("metadata", [{"x": (1,)}, {1: 2}, {"x": jnp.ones(1)}, {"x": float("nan")}])
def test_metadata_must_be_json(saved, tmp_path, metadata):
    with pytest.raises(TypeError, match="what JSON has"):
        lora_jax.save(tmp_path / "new", saved[2], metadata=metadata)


# --- damaged and hostile folders ---


JOIN = ("adapters", "join/kernel")


def as_version_1(product):
    def change(index):
        index["version"] = 1
        for entry in index["adapters"].values():
            settings, _ = entry.pop("settings"), entry.pop("changes_base")
            entry |= {"detach_norm": settings.get("detach_norm", False), "product": product}

    return change


JOIN_AXES = {"inputs": [0, 1], "outputs": [2], "stacks": []}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in("format", "x"), "not of the format"),
        (set_in("version", 3), "install a newer one"),
        (set_in("more", 1), "must have"),
        (lambda i: i.pop("base"), "must have"),
        (set_in("metadata", []), "'metadata' must be dict"),
        (set_in("tensors", "file", "../x.safetensors"), "not a file of its own"),
        (set_in("tensors", "file", "adapter-0000000000000000.safetensors"), "is missing"),
        (set_in("tensors", "sha256", "0" * 64), "is damaged"),
        (set_in("base", {"x": 1}), "not a string"),
        (lambda i: i["adapters"].pop("join/kernel"), "which .* does not describe"),
        (set_in("shifts", []), "'shifts' must be dict"),
        (set_in("shifts", {"x": 1.0}), "lacks 'x'"),
        (
            set_in("shifts", {"join/kernel.U": 0.0}),
            "scale of a LoRA bias must be positive",
        ),
        (set_in("shifts", {"join/kernel.U": 1}), "scale of a LoRA bias must be positive"),
        (lambda i: i.update(shifts={next(iter(i["whole"])): 1.0}), "described twice"),
        (set_in("whole", "x", "float32"), "lacks 'x'"),
        (lambda i: i["adapters"]["join/kernel"].pop("rank"), "'join/kernel' must have"),
        (set_in(*JOIN, "rank", 3), "not those of an adapter of rank 3"),
        (set_in(*JOIN, "rank", True), "'rank' must be int"),
        (set_in(*JOIN, "rank", 0), "rank must be at least 1"),
        (set_in(*JOIN, "alpha", -1.0), "alpha must be positive"),
        (set_in(*JOIN, "alpha", 1), "'alpha' must be float"),
        (set_in(*JOIN, "variant", "x"), "no variant 'x'"),
        (set_in(*JOIN, "variant", "lora"), "variant 'lora' has no setting 'detach_norm'"),
        (
            set_in(*JOIN, "settings", {"detach_norm": 1}),
            "detach_norm must be bool, as its default is, got 1",
        ),
        (set_in(*JOIN, "settings", []), "'settings' must be dict"),
        (as_version_1("x"), "product must be one of"),
        (set_in(*JOIN, "axes", {}), "axes must have"),
        (set_in(*JOIN, "axes", "inputs", [0, 0]), "must name every axis"),
        (set_in(*JOIN, "axes", "inputs", [-1]), "must be integers"),
        (set_in(*JOIN, "axes", "fused", 10**15), "not those of an adapter"),
        (set_in(*JOIN, "axes", "fused", 0), r"KernelAxes\(fused=0\): fused must be at least 1"),
        (set_in(*JOIN, "axes", "fused", -2), r"KernelAxes\(fused=-2\): fused must be at least 1"),
        (
            set_in(*JOIN, "axes", {**JOIN_AXES, "fused": 10**15, "parts": []}),
            "of fused=1000000000000000 kernels no parts are named",
        ),
        (set_in(*JOIN, "axes", "parts", [10**15]), "parts must be some of"),
        (set_in(*JOIN, "axes", "stacks", [3]), "not those of an adapter"),
    ],
)
def test_an_index_that_makes_no_sense(saved, params, change, message):
    folder = saved[0]
    edit(folder, change)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        lora_jax.load(folder, params)
    assert str(folder) in str(caught.value)


def test_a_stack_of_no_kernels(tmp_path, monkeypatch):
    with monkeypatch.context() as without:
        without.setattr(lora_jax.Adapter, "check_arrays", lambda *_: None)
        lora_jax.save(tmp_path / "x", {"k": no_kernels((0, 4, 1), (0, 1, 3))})
    with pytest.raises(
        ValueError, match=r"adapter.json: 'k': U is \(0, 4, 1\), in which there are"
    ):
        read(tmp_path / "x")


def test_an_edited_index(saved, params):
    file = saved[0] / "adapter.json"
    file.write_text(file.read_text().replace('"alpha": 2.0', '"alpha": 3.0', 1))
    with pytest.raises(ValueError, match="checksum"):
        lora_jax.load(saved[0], params)


def test_a_folder_without_adapters(tmp_path, params):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="There are no adapters in"):
            lora_jax.load(folder, params)


def header_of(entries, data=b""):
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


FOUR = b"\0" * 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes only"),
        (b"1234567", "7 bytes only"),
        (struct.pack("<Q", 10), "truncated"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "truncated"),
        (header_of(b"[]"), "not a JSON object"),
        (header_of(b"{"), "cannot be read"),
        (header_of(b"\xff\xfe"), "cannot be read"),
        (header_of(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "nested too deep"),
        (header_of({"x": entry()}), "truncated"),
        (header_of({"x": entry()}, FOUR * 2), "header says 4"),
        (header_of({"x": entry(offsets=(0, 8))}, FOUR * 2), "'x'.*offsets say 8"),
        (header_of({"x": entry(offsets=(4, 8))}, FOUR * 2), "'x' begins at byte 4"),
        (header_of({"x": entry(), "y": entry()}, FOUR), "'y' begins at byte 0"),
        (header_of({"x": entry(shape=(2**62,))}, FOUR), "'x'.*offsets say 4"),
        (header_of({"x": entry(shape=(2**40, 2**40), offsets=(0, 2**82))}, FOUR), "header says"),
        (
            header_of({"x": entry(shape=(0, 2**62), offsets=(0, 0))}),
            "'x' is .* larger than an array",
        ),
        (
            header_of({"x": entry(shape=(2**64, 0), offsets=(0, 0))}),
            "'x' is .* larger than an array",
        ),
        (header_of({"x": entry(shape=(-1,))}, FOUR), "integers from 0"),
        (header_of({"x": entry(shape=(True,))}, FOUR), "integers from 0"),
        (header_of({"x": entry(shape=(1,) * 33)}, FOUR), "33 axes"),
        (header_of({"x": entry(dtype="Q9")}, FOUR), "dtype 'Q9'"),
        (header_of({"x": entry(dtype=["F32"])}, FOUR), "dtype"),
        (header_of({"x": []}, FOUR), "must have dtype"),
        (header_of({"x": entry() | {"more": 1}}, FOUR), "must have dtype"),
        (header_of({"": entry()}, FOUR), "not a name"),
        (header_of({"\x1b[2J": entry()}, FOUR), "not a name"),
        (header_of({"__metadata__": {"a": 1}}), "__metadata__"),
        (header_of(b'{"x":1,"x":1}'), "'x' is there twice"),
        (header_of(b'{"x":NaN}'), "not a number"),
        (header_of(b'{"x":' + b"9" * 5000 + b"}"), "cannot be read"),
        (header_of({"x": entry()}, struct.pack("<f", float("inf"))), "'x' has NaN"),
    ],
)
def test_a_broken_safetensors_file(tmp_path, content, message):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        dict(Tensors(file))
    assert str(file) in str(caught.value)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        Tensors(tmp_path / "pipe")
    with pytest.raises(OSError, match="directory"):
        Tensors(tmp_path)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint64", "float16", "bfloat16", "float64"])
def test_tensors_of_every_kind(tmp_path, dtype):
    arrays = {"scalar": np.ones((), dtype), "empty": np.ones((0, 2), dtype)}
    arrays["transposed"] = np.arange(6).reshape(2, 3).T.astype(dtype)
    write_bytes(tmp_path / "x", encode(arrays, {"a": "b"}))
    tensors = Tensors(tmp_path / "x")
    assert tensors.metadata == {"a": "b"}
    chex.assert_trees_all_equal(dict(tensors), arrays)


def test_every_truncation_and_every_flipped_bit_is_found(saved, params):
    folder, _, _ = saved
    files = {file: file.read_bytes() for file in folder.iterdir()}
    rng = np.random.default_rng(0)
    for file, content in files.items():
        for _ in range(300):
            if rng.random() < 0.5:
                changed = content[: rng.integers(len(content))]
            else:
                changed = bytearray(content)
                changed[rng.integers(len(content))] ^= 1 << rng.integers(8)
            file.write_bytes(changed)
            try:
                adapters = read(folder).adapters
            except (ValueError, FileNotFoundError):
                continue
            # Only the last newline and the like may go.
            assert file.suffix == ".json"
            assert parse_json(bytes(changed), "x") == parse_json(content, "x")
            assert adapters
        file.write_bytes(content)
    lora_jax.load(folder, params)


# --- kills and races ---

SAVER = """
import sys
import numpy as np
import lora_jax
value, folder = 0, sys.argv[1]
adapters = lambda v: {"a": np.full((64, 64), v, np.float32), "b": np.full(3, v, np.float32)}
lora_jax.save(folder, adapters(value))
print("ready", flush=True)
while True:
    value += 1
    lora_jax.save(folder, adapters(value))
"""


def check_whole(folder):
    """The folder loads, and all of it is of one save."""
    adapters = read(folder).adapters
    values = {float(x) for array in adapters.values() for x in np.unique(array)}
    assert len(values) == 1
    return values.pop()


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_kill_leaves_the_old_or_the_new(tmp_path, kills):
    rng = np.random.default_rng(0)
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        end = time.monotonic() + rng.uniform(0.05, 0.2)
        reads = 0
        while time.monotonic() < end or not reads:
            check_whole(tmp_path)  # while it is being saved
            reads += 1
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        check_whole(tmp_path)
    lora_jax.save(tmp_path, {"a": np.ones(1, np.float32)})
    assert check_whole(tmp_path) == 1.0


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_failed_save_leaves_the_old(saved, params, monkeypatch, suffix):
    folder, _, adapters = saved
    before, replace = sorted(folder.iterdir()), os.replace

    def fail(old, new):
        if str(new).endswith(suffix):
            raise OSError("disk full")
        replace(old, new)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        lora_jax.save(folder, jax.tree.map(lambda x: 2 * x, adapters))
    assert sorted(folder.iterdir()) == before
    chex.assert_trees_all_equal(lora_jax.load(folder, params)[1], adapters)


def test_hash_is_of_values_shape_and_dtype():
    arrays = [np.zeros((2, 2)), np.zeros(4), np.zeros((2, 2), np.int64), np.ones((2, 2))]
    assert len({fingerprint(array, "x") for array in arrays}) == len(arrays)
    assert len(fingerprint(arrays[0], "x")) == hashlib.blake2b(digest_size=16).digest_size * 2
