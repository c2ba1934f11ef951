"""PEFT's files without PEFT: what is saved comes back, and what is wrong is refused.

`tests/interop/test_peft_files.py` does the same with PEFT itself.
"""

import json

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import unflatten_dict
from helpers import random_like, random_variables

import lora_jax
from lora_jax.cli._open_adapter import open_adapter
from lora_jax.files._tensors import Tensors, encode
from lora_jax.peft import FAMILIES, KeyMapping, _save
from lora_jax.peft._patterns import by_pattern, first_match

NAMES = [
    ("layers/{name}/kernel", "model.layers.{i}.{name}.weight"),
    ("layers/{name}/bias", "model.layers.{i}.{name}.bias", "plain"),
    ("heads/kernel", "model.heads.weight"),
    ("heads/bias", "model.heads.bias", "plain"),
    ("conv/kernel", "model.conv.weight", "conv"),
    ("conv/bias", "model.conv.bias", "plain"),
    ("embed/embedding", "model.embed.weight", "embedding"),
    ("{path*}/kernel", "{path*}.weight"),
    ("{path*}/bias", "{path*}.bias", "plain"),
]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(6, name="up")(x)), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 6, name="embed")(ids)
        x, _ = nn.scan(Layer, {"params": 0}, split_rngs={"params": True}, length=3)(name="layers")(
            x, None
        )
        x = nn.Conv(6, (3,), name="conv")(x)
        x = nn.DenseGeneral((2, 3), name="heads")(x)
        return nn.Dense(4, name="head")(x.reshape(*x.shape[:-2], 6))


IDS = jnp.array([[1, 5, 3, 2]])
FILE = "adapter_model.safetensors"
UP = "base_model.model.model.layers.0.up"
RULES = {
    "lora": [lora_jax.Rule("(layers/up|heads|conv)/kernel", rank=2, alpha=3.0)],
    "patterns": [
        lora_jax.Rule("layers/up/kernel", rank=2, alpha=1.5),
        lora_jax.Rule("heads/kernel", rank=4, alpha=3.0),
        lora_jax.Rule("conv/kernel", rank=4, alpha=3.0),
    ],
    "rslora": [lora_jax.Rule("heads/kernel", rank=2, alpha=3.0, rslora=True, dropout=0.1)],
    "dora": [
        lora_jax.Rule("(layers/up|heads|conv)/kernel", rank=2, variant="dora", detach_norm=True)
    ],
    "embedding": [lora_jax.Rule("embed/embedding", rank=2)],
}


@pytest.fixture
def model():
    params = random_variables(Model(), IDS)["params"]
    return params, lora_jax.kernel_axes(Model(), {"params": params}, IDS)


def adapted(model, rules, trainable=("head/.*",)):
    params, axes = model
    config = lora_jax.LoraConfig(rules, trainable=trainable)
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config, axes=axes)
    return frozen, random_like(adapters)


@pytest.fixture
def saved(model, tmp_path):
    frozen, adapters = adapted(model, RULES["dora"])
    lora_jax.peft.save(tmp_path, frozen, adapters, names=NAMES, axes=model[1])
    return tmp_path, frozen, adapters


def load(folder, model):
    return lora_jax.peft.load(folder, model[0], names=NAMES, axes=model[1])


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_comes_back_bit_for_bit(model, rules, tmp_path):
    frozen, adapters = adapted(model, rules)
    lora_jax.peft.save(tmp_path, frozen, adapters, names=NAMES, axes=model[1])
    again = load(tmp_path, model)
    chex.assert_trees_all_equal((frozen, adapters), again)
    assert jax.tree.structure((frozen, adapters)) == jax.tree.structure(again)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    lora_jax.peft.save(tmp_path, *again, names=NAMES, axes=model[1])
    assert files == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_half_precision(model, tmp_path):
    frozen, adapters = adapted(model, RULES["dora"])
    lora_jax.peft.save(tmp_path, frozen, adapters, names=NAMES, axes=model[1], dtype=jnp.bfloat16)
    assert {info.dtype.name for info in Tensors(tmp_path / FILE).info.values()} == {"bfloat16"}
    _, again = load(tmp_path, model)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(again)} == {"float32"}
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), adapters)
    chex.assert_trees_all_equal(again, rounded)


def test_biases(model, tmp_path):
    frozen, adapters = adapted(model, RULES["lora"], ["(layers/up|heads|conv)/bias"])
    lora_jax.peft.save(tmp_path, frozen, adapters, names=NAMES, axes=model[1])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["bias"] == "lora_only"
    chex.assert_trees_all_equal(load(tmp_path, model), (frozen, adapters))
    frozen, adapters = adapted(model, RULES["lora"], ["(layers/up|heads)/bias"])
    with pytest.raises(ValueError, match=r"biases of adapted modules.*'conv/bias' is not"):
        lora_jax.peft.save(tmp_path, frozen, adapters, names=NAMES, axes=model[1])


ADAPTED = ("layers.0.up", "layers.1.up", "layers.2.up", "heads", "conv")


@pytest.fixture
def biased(model, tmp_path):
    """A folder as PEFT writes it with lora_bias=True."""
    folder = tmp_path / "biased"
    frozen, adapters = adapted(model, RULES["lora"])
    lora_jax.peft.save(folder, frozen, adapters, names=NAMES, axes=model[1])
    rng = np.random.default_rng(1)
    added = {
        f"base_model.model.model.{module}.lora_B.bias": rng.standard_normal(6, np.float32)
        for module in ADAPTED
    }
    tensors = dict(Tensors(folder / FILE)) | added
    (folder / FILE).write_bytes(encode(tensors, {"format": "pt"}))
    file = folder / "adapter_config.json"
    file.write_bytes(file.read_bytes().replace(b'"lora_bias": false', b'"lora_bias": true'))
    return folder


def test_biases_of_B(biased, model, tmp_path):
    """They come back bit for bit, trained further or not, and compute W x + b + s (B A x + b_B)."""
    params, axes = model
    frozen, adapters = load(biased, model)
    assert frozen["layers"]["up"]["bias"] is params["layers"]["up"]["bias"]
    shift = adapters["layers"]["up"]["bias"]
    assert shift.scale == adapters["layers"]["up"]["kernel"].scale == 1.5
    lora_jax.peft.save(tmp_path / "again", frozen, adapters, names=NAMES, axes=axes)
    for file in biased.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()

    merged = lora_jax.lora_merge(frozen, adapters)
    expected = params["layers"]["up"]["bias"] + 1.5 * shift.value
    chex.assert_trees_all_equal(merged["layers"]["up"]["bias"], expected)
    logits = lora_jax.lora_apply(Model(), {"params": frozen}, adapters, IDS)
    assert jnp.allclose(logits, Model().apply({"params": merged}, IDS), atol=1e-5)
    row = lora_jax.summary(frozen, adapters).rows[-2]
    assert (row.path, row.variant, row.scale, row.trained) == ("layers/up/bias", "shift", 1.5, 18)
    assert lora_jax.rounding(frozen, adapters)["heads/bias"].largest == 0

    trained = random_like(adapters, seed=3)
    lora_jax.peft.save(tmp_path / "trained", frozen, trained, names=NAMES, axes=axes)
    chex.assert_trees_all_equal(load(tmp_path / "trained", model)[1], trained)
    lora_jax.save(tmp_path / "own", trained, frozen=frozen)
    again = lora_jax.load(tmp_path / "own", params, verify=True)
    chex.assert_trees_all_equal(again, (frozen, trained))
    assert jax.tree.structure(again[1]) == jax.tree.structure(trained)
    lora_jax.export(tmp_path / "merged", frozen, trained, names=NAMES, axes=axes)
    lora_jax.export(tmp_path / "plain", lora_jax.lora_merge(frozen, trained), {})
    bias = Tensors(tmp_path / "plain")["layers/up/bias"][1]
    assert np.array_equal(Tensors(tmp_path / "merged")["model.layers.1.up.bias"], bias)


def test_a_shift_is_trained_as_in_peft(biased, model):
    """Its gradient is s times that of the bias, and the bias may be in a box."""
    frozen, adapters = load(biased, model)

    def loss(adapters, frozen):
        return jnp.sum(lora_jax.lora_apply(Model(), {"params": frozen}, adapters, IDS) ** 2)

    got, bias = jax.grad(loss, argnums=(0, 1))(adapters, frozen)
    for layer in ("heads", "conv"):
        assert jnp.allclose(got[layer]["bias"].value, 1.5 * bias[layer]["bias"], rtol=1e-5)
        assert jnp.abs(got[layer]["bias"].value).max() > 0
    boxed = jax.tree.map(lambda x: x, frozen)
    boxed["conv"]["bias"] = nn.Partitioned(frozen["conv"]["bias"], names=("model",))
    merged = lora_jax.lora_merge(boxed, adapters)["conv"]["bias"]
    assert isinstance(merged, nn.Partitioned)
    chex.assert_trees_all_equal(merged.value, lora_jax.lora_merge(frozen, adapters)["conv"]["bias"])


def test_shifts_are_not_stacked(biased, model):
    _, adapters = load(biased, model)
    with pytest.raises(ValueError, match=r"adds something to '.*/bias' .*serve it apart"):
        lora_jax.stack([adapters, adapters], model[0])


def test_a_shift_of_half_precision_is_rounded_once(biased, model):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model[0])
    frozen, adapters = lora_jax.peft.load(biased, half, names=NAMES, axes=model[1])
    shift, base = adapters["heads"]["bias"], frozen["heads"]["bias"]
    merged = lora_jax.lora_merge(frozen, adapters)["heads"]["bias"]
    assert shift.value.dtype == jnp.float32
    assert jnp.array_equal(
        merged, (base.astype(jnp.float32) + 1.5 * shift.value).astype(jnp.bfloat16)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["heads"].pop("bias"), "for all adapted modules .* a bias of 'model.heads'"),
        (lambda a: a["heads"].update(bias=a["heads"]["bias"].replace(scale=2.0)), "one for both"),
        (lambda a: a["head"].update(bias=a["conv"]["bias"]), r"is \(6,\), but the base has \(4,\)"),
        (
            lambda a: a["head"].update(bias=lora_jax.LoraBias(jnp.ones(4), 1.5)),
            "added to 'head/bias', which PEFT has for biases of adapted",
        ),
        (lambda a: a.update(new={"bias": lora_jax.LoraBias(jnp.ones(4))}), "which frozen lacks"),
    ],
)
def test_shifts_that_peft_has_not(biased, model, tmp_path, change, message):
    frozen, adapters = load(biased, model)
    frozen["head"] = model[0]["head"]
    del adapters["head"]
    adapters["head"] = {}
    change(adapters)
    with pytest.raises(ValueError, match=message):
        lora_jax.peft.save(tmp_path / "new", frozen, adapters, names=NAMES, axes=model[1])


def test_dora_has_no_biases_of_B(saved, model, tmp_path):
    _, frozen, adapters = saved
    for name in ("heads", "conv"):
        adapters[name]["bias"] = lora_jax.LoraBias(jnp.ones(model[0][name]["bias"].shape))
    with pytest.raises(ValueError, match="no DoRA with lora_bias"):
        lora_jax.peft.save(tmp_path / "new", frozen, adapters, names=NAMES, axes=model[1])


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"bias": "all"}, lambda t: None, "trains every bias twice"),
        ({}, lambda t: t.pop(f"{UP}.lora_B.bias"), "'model.layers.0.up' has A, B, but by"),
        ({}, lambda t: t.update({f"{UP}.lora_B.bias": np.ones(5)}), "'model.layers.0.up.bias' is"),
        ({"modules_to_save": ["head", "up"]}, lambda t: None, "lacks .*of modules_to_save"),
        (
            {"alpha_pattern": {"layers.0.up": 4}, "rank_pattern": {"layers.0.up": 2}},
            lambda t: None,
            "different ranks and alphas",
        ),
    ],
)
def test_biases_of_B_that_do_not_fit(biased, model, config, change, message):
    edit_config(biased, **config)
    edit_tensors(biased, change)
    with pytest.raises(ValueError, match=message) as caught:
        load(biased, model)
    assert str(biased) in str(caught.value)


def test_a_layer_without_a_bias_says_so(biased, model):
    names = [name for name in NAMES if "bias" not in name[0]]
    with pytest.raises(ValueError, match=r"no bias that it could be added to.*use_bias=True"):
        lora_jax.peft.load(biased, model[0], names=names, axes=model[1])


@pytest.mark.parametrize(
    ("rules", "trainable", "message"),
    [
        (
            [lora_jax.Rule("heads/kernel", rank=2), *RULES["dora"]],
            (),
            "LoRA and DoRA in one",
        ),
        (
            [lora_jax.Rule("heads/kernel", rank=2, rslora=True), *RULES["lora"]],
            (),
            "rsLoRA and plain LoRA in one",
        ),
        (
            [lora_jax.Rule("heads/kernel", rank=2, dropout=0.1), *RULES["lora"]],
            (),
            "one dropout",
        ),
        (
            RULES["lora"],
            ["head/bias"],
            "part of the module 'head' is fully trained, and 'head/kernel' is not",
        ),
        ([], ["head/.*"], "no adapter of a kernel"),
        ([lora_jax.Rule("embed/embedding", rank=2, materialize=True)], (), "all uses see"),
    ],
)
def test_what_peft_has_not_is_refused(model, tmp_path, rules, trainable, message):
    frozen, adapters = adapted(model, rules, trainable)
    with pytest.raises(ValueError, match=message):
        lora_jax.peft.save(tmp_path / "new", frozen, adapters, names=NAMES, axes=model[1])
    assert not (tmp_path / "new").exists()


def test_a_parameter_without_a_name(model, tmp_path):
    frozen, adapters = adapted(model, RULES["lora"])
    with pytest.raises(ValueError, match=r"no name in PyTorch for '.*/kernel'"):
        lora_jax.peft.save(tmp_path, frozen, adapters, names=[("head/{leaf}", "head.{leaf}")])
    with pytest.raises(ValueError, match=r"stacks 1 axes.*Give names= a KeyMapping for it"):
        lora_jax.peft.save(tmp_path, frozen, adapters, axes=model[1])
    with pytest.raises(ValueError, match=r"stacks 0 axes.*known with axes="):
        lora_jax.export(tmp_path / "x", {"layers": {"up": {"kernel": X[0]}}}, {}, names=NAMES)
    for names, message in (
        ([("a/kernel", "lin.weight"), ("b/kernel", "lin.weight")], "another kernel has too"),
        ([("{x}/kernel", "mha.{x}_proj"), *NAMES[-1:]], "does not end in"),
    ):
        params = {x: {"kernel": jnp.ones((3, 3))} for x in "ab"}
        config = lora_jax.LoraConfig([lora_jax.Rule("./kernel", rank=1)])
        split = lora_jax.lora_init(jax.random.key(0), params, config)
        with pytest.raises(ValueError, match=message):
            lora_jax.peft.save(tmp_path, *split, names=names)


# --- where PEFT would compute something else ---


def unequal(module, x, trainable=(), **rule):
    """A model, its axes, and its kernel adapted or fully trained."""
    variables = random_variables(module, x)
    params, axes = variables["params"], lora_jax.kernel_axes(module, variables, x)
    rules = [] if trainable else [lora_jax.Rule(".*(kernel|embedding)", rank=1, **rule)]
    rules += [lora_jax.Rule("other/kernel", rank=1)] if trainable else []
    config = lora_jax.LoraConfig(rules, trainable=trainable)
    return *lora_jax.lora_init(jax.random.key(0), params, config, axes=axes), axes


class Attend(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 6, name="embed")
        return embed.attend(nn.Dense(6, name="other")(embed(ids)))


class Raw(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 6, name="embed")
        return nn.Dense(6, name="other")(embed(ids)) @ embed.embedding.T


class One(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="other")(self.layer(x))


X = jnp.ones((2, 8, 6))


@pytest.mark.parametrize(
    ("module", "x", "trainable", "message"),
    [
        (Attend(), IDS, ["embed/.*"], "only its lookup would be trained"),
        (Raw(), IDS, ["embed/.*"], "only its lookup would be trained"),
        (Attend(), IDS, (), "only its lookup would be adapted"),
        (One(nn.Conv(6, (3,), kernel_dilation=2)), X, (), "does not dilate"),
        (One(nn.Conv(6, (3,), padding="CIRCULAR")), X, (), "does not pad its factors with CIRC"),
        (One(nn.Conv(6, (3,), feature_group_count=2)), X, (), "have no groups"),
        (One(nn.ConvTranspose(6, (3,))), X, (), "no transposed convolutions"),
        (One(nn.ConvTranspose(6, (3,))), X, ["layer/.*"], "no transposed convolutions"),
        (One(nn.BatchNorm(True)), X, ["layer/.*"], "BatchNorm"),
    ],
)
def test_what_peft_computes_otherwise_is_refused(module, x, trainable, message, tmp_path):
    frozen, adapters, axes = unequal(module, x, trainable)
    with pytest.raises(ValueError, match=message):
        lora_jax.peft.save(tmp_path, frozen, adapters, axes=axes)
    assert not list(tmp_path.iterdir())


def test_an_embedding_needs_to_know_the_model(tmp_path):
    frozen, adapters, _ = unequal(Attend(), IDS, ["embed/.*"])
    with pytest.raises(ValueError, match="pass axes="):
        lora_jax.peft.save(tmp_path, frozen, adapters)


def test_only_the_lookup_is_adapted_as_in_peft(tmp_path):
    """The logits keep the base's embeddings."""
    params = random_variables(Attend(), IDS)["params"]
    axes = lora_jax.kernel_axes(Attend(), {"params": params}, IDS)
    assert axes.shared == {"embed/embedding"}
    frozen, adapters, _ = unequal(Raw(), IDS, tied="untie")
    lora_jax.peft.save(tmp_path, frozen, random_like(adapters, scale=1.0), axes=axes)
    frozen, adapters = lora_jax.peft.load(tmp_path, params, axes=axes)
    adapter = adapters["embed"]["embedding"]
    assert adapter.untied
    adapted = params["embed"]["embedding"] + adapter.scale * adapter.U @ adapter.V
    other = lora_jax.lora_merge({"other": frozen["other"]}, {"other": adapters["other"]})["other"]
    x = adapted[IDS] @ other["kernel"] + other["bias"]
    logits = lora_jax.lora_apply(Attend(), {"params": frozen}, adapters, IDS)
    assert jnp.allclose(logits, x @ params["embed"]["embedding"].T, atol=1e-5)


@pytest.mark.parametrize("path", ["shared", "model/shared", "model/decoder/embed_positions"])
def test_embeddings_that_pytorch_reads_elsewhere(path, tmp_path):
    """T5's and BART's ``shared`` does nothing in PyTorch, and PEFT looks up tokens only."""
    params = unflatten_dict({(*path.split("/"), "embedding"): jnp.ones((11, 6))})
    config = lora_jax.LoraConfig([lora_jax.Rule(".*embedding", rank=1)])
    split = lora_jax.lora_init(jax.random.key(0), params, config)
    with pytest.raises(ValueError, match="is not where the model computes with"):
        lora_jax.peft.save(tmp_path, *split)


@pytest.mark.parametrize(
    ("rates", "message"),
    [((0.1, 0.0, 0.0), "one dropout for all"), ((0.1, 0.1, 0.1), "no dropout for embeddings")],
)
def test_dropouts_beside_an_embedding(model, rates, message, tmp_path):
    rules = [
        lora_jax.Rule(pattern, rank=1, dropout=rate)
        for pattern, rate in zip(
            ("layers/up/kernel", "heads/kernel", "embed/embedding"), rates, strict=True
        )
    ]
    frozen, adapters = adapted(model, rules)
    with pytest.raises(ValueError, match=message):
        lora_jax.peft.save(tmp_path, frozen, adapters, names=NAMES, axes=model[1])


def test_names_that_end_alike(tmp_path):
    """PEFT compares ends of names: what is not adapted is excluded, or it is refused."""
    params = {
        "lin": {"kernel": jnp.ones((3, 3))},
        "sub": {"lin": {"kernel": jnp.ones((3, 3))}, "prelin": {"kernel": jnp.ones((3, 3))}},
    }

    def split(pattern, trainable=()):
        config = lora_jax.LoraConfig([lora_jax.Rule(pattern, rank=1)], trainable=trainable)
        return lora_jax.lora_init(jax.random.key(0), params, config)

    lora_jax.peft.save(tmp_path, *split("lin/kernel"))
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (said["target_modules"], said["exclude_modules"]) == (["lin"], ["sub.lin"])
    chex.assert_trees_all_equal(lora_jax.peft.load(tmp_path, params), split("lin/kernel"))
    with pytest.raises(ValueError, match=r"train 'sub\.(pre)?lin\.weight' fully too"):
        lora_jax.peft.save(tmp_path, *split("sub/prelin/kernel", ["lin/kernel"]))
    head = {"classifier": {"kernel": jnp.ones((3, 2))}} | params
    config = lora_jax.LoraConfig([lora_jax.Rule("lin/kernel", rank=1)])
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), head, config)
    with pytest.raises(ValueError, match=r"'classifier\.weight' fully too.*leave out task_type"):
        lora_jax.peft.save(tmp_path, frozen, adapters, task_type="SEQ_CLS")


def test_patterns_are_written_in_the_order_that_counts(tmp_path):
    params = {x: {"kernel": jnp.ones((3, 3))} for x in "abc"}
    names = [
        ("a/kernel", "z.lin.weight"),
        ("b/kernel", "lin.weight"),
        ("c/kernel", "other.weight"),
    ]
    alphas = {"a": 7, "b": 3, "c": 1}
    rules = [lora_jax.Rule(f"{x}/kernel", rank=1, alpha=alpha) for x, alpha in alphas.items()]
    split = lora_jax.lora_init(jax.random.key(0), params, lora_jax.LoraConfig(rules))
    lora_jax.peft.save(tmp_path, *split, names=names)
    _, adapters = lora_jax.peft.load(tmp_path, params, names=names)
    assert {x: adapters[x]["kernel"].alpha for x in "abc"} == alphas


# --- who says whether PyTorch stores a weight (in, out): the layer's class, never its name ---


C_PROJ_A = "base_model.model.h.c_proj.lora_A.weight"


def conv1d_or_dense(k, bias, input_axes=None):
    """A layer that is called as GPT-2's are, adapted."""
    layer = {"kernel": jnp.ones((6, k))} | ({"bias": jnp.ones(bias)} if bias else {})
    params = random_like({"h": {"c_proj": layer}, "head": {"kernel": jnp.ones((k, 4))}})
    rule = lora_jax.Rule(".*/kernel", rank=2, input_axes=input_axes)
    return lora_jax.lora_init(jax.random.key(0), params, lora_jax.LoraConfig([rule]))


@pytest.mark.parametrize(
    ("k", "bias", "axes"),
    [
        (6, 6, {"h/c_proj/kernel": lora_jax.KernelAxes()}),
        (6, None, None),  # every Conv1D has a bias
        (5, 5, None),  # which is of its outputs
    ],
)
def test_a_linear_layer_that_is_called_as_gpt2s(k, bias, axes, tmp_path):
    frozen, adapters = conv1d_or_dense(k, bias)
    lora_jax.peft.save(tmp_path, frozen, adapters, axes=axes)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["fan_in_fan_out"] is False
    A = Tensors(tmp_path / FILE)[C_PROJ_A]
    assert np.array_equal(A, adapters["h"]["c_proj"]["kernel"].U.T)
    chex.assert_trees_all_equal(lora_jax.peft.load(tmp_path, frozen, axes=axes)[1], adapters)


def test_an_adapter_knows_its_own_axes(tmp_path):
    frozen, adapters = conv1d_or_dense(6, 6, input_axes=(1,))
    lora_jax.peft.save(tmp_path, frozen, adapters)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["fan_in_fan_out"] is True


def test_a_layer_that_may_be_either_is_refused(tmp_path):
    frozen, adapters = conv1d_or_dense(6, 6)
    message = r"'h/c_proj/kernel' of shape \(6, 6\) may be of a FlaxConv1D.*Pass axes="
    with pytest.raises(ValueError, match=message):
        lora_jax.peft.save(tmp_path / "x", frozen, adapters)
    axes = {"h/c_proj/kernel": lora_jax.KernelAxes()}
    lora_jax.peft.save(tmp_path / "x", frozen, adapters, axes=axes)
    with pytest.raises(ValueError, match=message):
        lora_jax.peft.load(tmp_path / "x", frozen)
    # One that is not adapted does not matter, and whole both are PyTorch's transposed.
    rest = {"head": adapters["head"]}
    lora_jax.peft.save(tmp_path / "y", frozen, rest)
    chex.assert_trees_all_equal(lora_jax.peft.load(tmp_path / "y", frozen)[1], rest)
    lora_jax.export(tmp_path / "z", frozen, {}, names="transformers")
    kernel = frozen["h"]["c_proj"]["kernel"]
    assert np.array_equal(Tensors(tmp_path / "z")["h.c_proj.weight"], kernel.T)


def test_a_name_may_say_it(tmp_path):
    """Its kind says how PyTorch stores it, and its axes how Flax does."""
    frozen, adapters = conv1d_or_dense(6, 6)
    rest = [("head/kernel", "head.weight"), ("h/c_proj/bias", "h.c_proj.bias", "plain")]
    kernel, A = frozen["h"]["c_proj"]["kernel"], adapters["h"]["c_proj"]["kernel"].U.T
    conv1d = ("h/c_proj/kernel", "h.c_proj.weight", "conv1d")
    for name in (
        ("h/c_proj/kernel", "h.c_proj.weight"),
        (*conv1d, lora_jax.KernelAxes()),
        ("h/c_proj/kernel", "h.c_proj.weight", "weight", lora_jax.KernelAxes()),
    ):
        lora_jax.peft.save(tmp_path / "x", frozen, adapters, names=[name, *rest])
        assert np.array_equal(Tensors(tmp_path / "x" / FILE)[C_PROJ_A], A)
        lora_jax.export(tmp_path / "y", frozen, {}, names=[name, *rest])
        expected = kernel if name[2:3] == ("conv1d",) else kernel.T
        assert np.array_equal(Tensors(tmp_path / "y")["h.c_proj.weight"], expected)
    message = "'h/c_proj/kernel' .* may be of a FlaxConv1D"
    with pytest.raises(ValueError, match=message):
        lora_jax.peft.save(tmp_path / "x", frozen, adapters, names=[conv1d, *rest])
    with pytest.raises(ValueError, match=message):
        lora_jax.export(tmp_path / "y", frozen, {}, names=[conv1d, *rest])


def test_a_layer_of_a_class_that_is_not_known(tmp_path):
    """It stores (out, in) as FlaxConv1D does: whether it is one, only its user knows."""
    frozen, adapters = conv1d_or_dense(6, 6, input_axes=(1,))
    path, own = "h/c_proj/kernel", lora_jax.KernelAxes((1,), (0,))
    nothing = frozenset()
    axes = lora_jax.ModelAxes({path: own}, {path: "my.Layer"}, {}, {}, nothing, nothing)
    names = [(path, "h.c_proj.weight", "conv1d"), *FAMILIES["transformers"]]
    for call in (lora_jax.peft.save, lora_jax.export):
        with pytest.raises(ValueError, match=r"or, for a class of your own, names="):
            call(tmp_path / "x", frozen, adapters, names="transformers", axes=axes)
        call(tmp_path / call.__module__, frozen, adapters, names=names, axes=axes)


@pytest.mark.parametrize("input_axes", [(0,), (1,)])
def test_an_adapter_the_other_way_round_is_refused(input_axes, tmp_path):
    frozen, adapters = conv1d_or_dense(6, 6, input_axes)
    axes = {"h/c_proj/kernel": lora_jax.KernelAxes((1 - input_axes[0],), input_axes)}
    with pytest.raises(ValueError, match=r"'h/c_proj/kernel' has an adapter with inputs"):
        lora_jax.peft.save(tmp_path, frozen, adapters, axes=axes)


def test_a_dense_general_is_linear(tmp_path):
    """A kernel of three axes is that of a convolution only where the layer is one."""
    model, x = One(nn.DenseGeneral((2, 3))), jnp.ones((1, 6))
    params = random_variables(model, x)["params"]
    axes = lora_jax.kernel_axes(model, {"params": params}, x)
    lora_jax.export(tmp_path / "x", params, {}, names="transformers", axes=axes)
    expected = params["layer"]["kernel"].reshape(6, 6).T
    assert np.array_equal(Tensors(tmp_path / "x")["layer.weight"], expected)


def test_a_rank_above_the_matrix_comes_back(tmp_path):
    params = {"a": {"kernel": jnp.ones((3, 2))}}
    config = lora_jax.LoraConfig([lora_jax.Rule("a/kernel", rank=2)])
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config)
    adapter = adapters["a"]["kernel"]
    wide = adapter.replace(U=jnp.ones((3, 5)), V=jnp.ones((5, 2)), rank=5, alpha=5.0)
    lora_jax.peft.save(tmp_path / "peft", frozen, {"a": {"kernel": wide}})
    _, loaded = lora_jax.peft.load(tmp_path / "peft", params)
    lora_jax.save(tmp_path / "own", loaded)
    chex.assert_trees_all_equal(lora_jax.load(tmp_path / "own", params)[1], loaded)


# --- damaged and hostile folders ---


def edit_config(folder, **change):
    file = folder / "adapter_config.json"
    said = json.loads(file.read_text()) | change
    file.write_text(json.dumps({k: v for k, v in said.items() if v != "DROP"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "only LORA is read"),
        ({"r": 3}, "for rank 3"),
        ({"r": 0}, "a rank of at least 1"),
        ({"r": True}, "a rank of at least 1"),
        ({"lora_alpha": "x"}, "'lora_alpha' must be a positive number"),
        ({"lora_alpha": 10**400}, "'lora_alpha' must be a positive number"),
        ({"lora_alpha": None}, "'lora_alpha' must be a positive number, got None"),
        ({"r": None}, "a rank of at least 1, got None"),
        ({"lora_alpha": -1}, "'lora_alpha' must be a positive number"),
        ({"rank_pattern": {"up": 4}}, "for rank 4"),
        ({"rank_pattern": [1]}, "'rank_pattern' must be an object"),
        ({"rank_pattern": {"(a+)+": 4}}, "too complex .*of a group none but '\\?'"),
        ({"rank_pattern": {"(?:up){1,2}": 4}}, "too complex"),
        ({"rank_pattern": {".*a.*b.*c.*": 4}}, "too complex"),
        ({"alpha_pattern": {"(": 4}}, "not a regular expression"),
        ({"alpha_pattern": {"layers.0.up": 4}}, "different ranks and alphas"),
        ({"use_dora": False}, "it should have A, B"),
        ({"use_rslora": 1}, "must be true or false"),
        ({"lora_dropout": 1.0}, r"\[0, 1\)"),
        ({"bias": "some"}, "one of none, all, lora_only"),
        ({"lora_bias": True}, "makes no sense in PEFT"),
        ({"init_lora_weights": "pissa"}, "changes the base"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 1]]}, "no equal here"),
        ({"trainable_token_indices": [1]}, "no equal here. Some rows of an embedding"),
        ({"trainable_token_indices": {"embed": [1]}}, "no equal here. Some rows of an embedding"),
        ({"ensure_weight_tying": True}, "no equal here. It ties what is trained"),
        ({"of_the_future": {"x": 1}}, "of_the_future"),
        ({"modules_to_save": None}, "neither of an adapter nor of modules_to_save"),
        ({"modules_to_save": ["head", "embed"]}, "lacks 'model.embed.weight', of modules_to_save"),
        ({"target_modules": ["up", "heads", "conv", "embed"]}, "lacks 'model.embed'"),
        ({"target_modules": 1}, "list of strings"),
    ],
)
def test_a_config_that_makes_no_sense(saved, model, change, message):
    edit_config(saved[0], **change)
    with pytest.raises(ValueError, match=message) as caught:
        load(saved[0], model)
    assert str(saved[0]) in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"of_the_future": None},
        # As PEFT reads it, or its default.
        dict.fromkeys(
            ("fan_in_fan_out", "use_rslora", "lora_bias", "bias", "lora_dropout", "rank_pattern")
        ),
        dict.fromkeys(("alpha_pattern", "target_parameters", "init_lora_weights", "loftq_config")),
        {"target_modules": None},
        {"lora_ga_config": "DROP"},
        {"modules_to_save": ["head", "score"]},
    ],
)
def test_other_versions_of_peft(saved, model, change):
    edit_config(saved[0], **change)
    chex.assert_trees_all_equal(load(saved[0], model)[1], saved[2])


def edit_tensors(folder, change):
    tensors = dict(Tensors(folder / FILE))
    change(tensors)
    (folder / FILE).write_bytes(safetensors.numpy.save(tensors))


def renamed(old, new):
    def change(tensors):
        tensors[new] = tensors.pop(old)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}.lora_A.weight"), "'model.layers.0.up' has .*it should have A, B"),
        (lambda t: t.pop(f"{UP}.lora_magnitude_vector"), "magnitudes of DoRA dropped"),
        (lambda t: [t.pop(k) for k in list(t) if "layers.2" in k], "lacks 'model.layers.2.up"),
        (lambda t: [t.pop(k) for k in list(t) if "heads" in k], "lacks 'model.heads', of target"),
        (lambda t: t.pop("base_model.model.head.bias"), "lacks 'head.bias', of modules_to_save"),
        (lambda t: t.update({"x": np.ones(1)}), "'x' does not begin with"),
        (lambda t: t.update({f"{UP}.more": np.ones(1)}), "up.more' is neither of an adapter"),
        (
            lambda t: [t.update({k.replace("up", "down"): t.pop(k)}) for k in list(t)],
            "'model.layers.0.down.weight'.*Nearest: model.layers.0.up.weight",
        ),
        (renamed(f"{UP}.lora_A.weight", f"{UP}.lora_embedding_A"), "says that it is linear"),
        (
            lambda t: t.update({f"{UP}.lora_magnitude_vector.weight": np.ones(6)}),
            "in two forms",
        ),
        (lambda t: t.update({f"{UP}.lora_A.weight": np.ones((6, 2))}), "A of .* should be"),
        (lambda t: t.update({f"{UP}.lora_A.weight": np.ones((2, 6), int)}), "int64"),
        (lambda t: t.update({f"{UP}.lora_A.weight": np.ones((0, 6))}), r"A.weight' is \(0, 6\)"),
        (lambda t: t.update({f"{UP}.lora_B.weight": np.ones(())}), r"B.weight' is \(\), which is"),
        (
            lambda t: t.update({f"{UP}.lora_A.weight": np.full((2, 6), np.nan)}),
            "lora_A.weight' has NaN",
        ),
        (lambda t: t.update({"base_model.model.head.bias": np.ones(5)}), "'head.bias' is"),
        (lambda t: t.update({f"{UP}.base_layer.weight": np.ones((6, 6))}), "another one than"),
    ],
)
def test_tensors_that_do_not_fit(saved, model, change, message):
    edit_tensors(saved[0], change)
    with pytest.raises(ValueError, match=message) as caught:
        load(saved[0], model)
    assert str(saved[0]) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("lora_A.weight", (0, 2**62), "is .* larger than an array may be"),
        ("lora_A.weight", (0, 6), "which is not a matrix with numbers"),
        ("lora_B.weight", (6, 0), "which is not a matrix with numbers"),
        ("lora_magnitude_vector", (0,), r"'model.layers.0.up' has m \(0,\), but 6 outputs"),
        ("lora_magnitude_vector", (2**62, 0), "is .* larger than an array may be"),
    ],
)
def test_shapes_without_numbers(saved, name, shape, message):
    """They take no bytes of the file, so it need not be large for any size beside the 0."""
    tensors = dict(Tensors(saved[0] / FILE))
    tensors[f"{UP}.{name}"] = np.zeros(0, np.float32)
    content = encode(tensors)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[f"{UP}.{name}"]["shape"] = shape
    new = json.dumps(header).encode()
    content = len(new).to_bytes(8, "little") + new + content[8 + length :]
    (saved[0] / FILE).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_adapter(saved[0])
    assert str(saved[0] / FILE) in str(caught.value)


def test_no_pickle(saved, model):
    (saved[0] / FILE).rename(saved[0] / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickle"):
        load(saved[0], model)


def test_a_folder_that_has_folders(saved, model):
    saved[0].rename(saved[0].parent / "hub")
    (saved[0] / "a").mkdir(parents=True)
    (saved[0].parent / "hub").rename(saved[0] / "task")
    with pytest.raises(FileNotFoundError, match="Folders in it that have one: task"):
        load(saved[0], model)
    load(saved[0] / "task", model)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
        load(saved[0] / "none", model)


def test_a_folder_of_the_other_format_says_so(saved, model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"of PEFT, which lora_jax\.peft\.load reads"):
        lora_jax.load(saved[0], model[0])
    lora_jax.save(tmp_path / "own", saved[2])
    with pytest.raises(FileNotFoundError, match=r"of lora_jax, which lora_jax\.load reads"):
        load(tmp_path / "own", model)


def test_every_truncation_is_found(saved, model):
    content = (saved[0] / FILE).read_bytes()
    for size in np.random.default_rng(0).integers(len(content), size=100):
        (saved[0] / FILE).write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
            load(saved[0], model)


def test_a_config_is_never_beside_tensors_of_another(saved, model, monkeypatch):
    folder, frozen, _ = saved
    frozen, adapters = adapted(model, RULES["patterns"])

    def fail(path, content):
        raise OSError("disk full")

    monkeypatch.setattr(_save, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        lora_jax.peft.save(folder, frozen, adapters, names=NAMES, axes=model[1])
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
        load(folder, model)


# --- names and patterns ---


def test_patterns_are_pefts():
    """The first that matches the end of a name wins, '.' is any character."""
    patterns = {"layers.1.q": 1, "q": 2, r".*\.mlp\..*": 3, "^x.k": 4}
    modules = {"layers.1.q": 1, "a.layers.1.q": 1, "layersx1.q": 1, "a.q": 2, "aq": 0}
    modules |= {"a.mlp.b": 3, "x.k": 4, "y.x.k": 0}
    assert {module: first_match(patterns, module, 0) for module in modules} == modules


@pytest.mark.parametrize(
    ("pattern", "fits", "other"),
    [
        (r"(?:q|v)_proj", "a.0.v_proj", "a.0.k_proj"),
        (r"layers\.\d{1,2}\.q", "x.layers.12.q", "x.layers.123.q"),
        (r"^(?!.*vision).*\.q", "text.0.q", "vision.0.q"),
        (r".*(?<!k_)proj", "a.q_proj", "a.k_proj"),
        (r"[\d]+?\.q", "a.31.q", "a.b.q"),
        (r"(?:up\.)?q", "a.up.q", "a.k"),
    ],
)
def test_patterns_of_any_kind_that_is_safe(pattern, fits, other):
    assert first_match({pattern: 1}, fits, 0) == 1
    assert first_match({pattern: 1}, other, 0) == 0


def test_patterns_that_are_written():
    values = {"q": 1, "a.q": 2, "b.q": 1, "b": 1}
    common, patterns = by_pattern(values)
    assert (common, patterns) == (1, {"a.q": 2})
    values = {"q": 2, "a.q": 1, "b": 1}
    common, patterns = by_pattern(values)
    assert (common, patterns) == (1, {"^q": 2})
    assert {m: first_match(patterns, m, common) for m in values} == values


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("{a}/k", "{b}.k"), "every placeholder"),
        (("{a}/{a}", "{a}"), "every placeholder"),
        (("a", "b", "x"), "no kind 'x'"),
        (("a", "{i*}"), r"no '\*'"),
        (("{a|b}", "{a|b}"), "every placeholder"),
    ],
)
def test_names_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        KeyMapping(*fields)


def test_names_of_fused_kernels():
    name = KeyMapping("l_{i}/kv", "l.{i}.{k|v}.weight")
    assert name.match("l_3/kv", (2,)) == [((0,), "l.3.k.weight"), ((1,), "l.3.v.weight")]
    assert name.match("l_3/q", (2,)) is None
    with pytest.raises(ValueError, match="names 2"):
        name.match("l_3/kv", (3,))


# --- kernels side by side, of which some are adapted ---

QKV = [
    ("{path*}/qkv/kernel", "{path*}.{q|k|v}_proj.weight", "linear", lora_jax.KernelAxes(fused=3))
]


def keys_of(folder):
    return {k.removeprefix("base_model.model.").split(".lora")[0] for k in Tensors(folder / FILE)}


@pytest.mark.parametrize("parts", [(0,), (1,), (2,), (0, 2), (2, 1), (0, 1, 2)])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_parts_of_a_fused_kernel(parts, variant, tmp_path):
    """They are chosen from what is in the file, and go back as the same keys."""
    params = {
        "a": {"qkv": {"kernel": jnp.ones((4, 9))}},
        "b": {"qkv": {"kernel": jnp.ones((4, 9))}},
    }
    params = random_like(params)
    options = {"variant": variant, "detach_norm": variant == "dora", "fused": 3}
    rules = [
        lora_jax.Rule("a/qkv/kernel", rank=2, parts=parts, **options),
        lora_jax.Rule("b/qkv/kernel", rank=2, **options),
    ]
    frozen, adapters = lora_jax.lora_init(
        jax.random.key(0), params, lora_jax.LoraConfig(rules), axes=None
    )
    adapters = random_like(adapters)
    lora_jax.peft.save(tmp_path / "one", frozen, adapters, names=QKV)
    expected = {f"a.{'qkv'[part]}_proj" for part in parts} | {f"b.{x}_proj" for x in "qkv"}
    assert keys_of(tmp_path / "one") == expected
    said = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert said["target_modules"] == sorted(expected)

    frozen, again = lora_jax.peft.load(tmp_path / "one", params, names=QKV)
    assert again["a"]["qkv"]["kernel"].axes.parts == tuple(sorted(parts))
    assert again["b"]["qkv"]["kernel"].axes.parts == (0, 1, 2)
    chex.assert_trees_all_close(
        lora_jax.lora_merge(frozen, again), lora_jax.lora_merge(frozen, adapters), atol=1e-6
    )
    lora_jax.peft.save(tmp_path / "two", frozen, again, names=QKV)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_parts_of_fused_kernels_in_a_scan(tmp_path):
    """Every layer has the same ones, or it is refused."""
    axes = lora_jax.KernelAxes((1,), (2,), (0,), fused=3)
    names = [("layers/qkv", "layers.{i}.{q|k|v}_proj.weight", "linear", axes)]
    params = random_like({"layers": {"qkv": jnp.ones((2, 4, 9))}})
    model_axes = {"layers/qkv": lora_jax.KernelAxes((1,), (2,), (0,))}
    rule = lora_jax.Rule("layers/qkv", rank=2, fused=3, parts=(0, 2))
    frozen, adapters = lora_jax.lora_init(
        jax.random.key(0), params, lora_jax.LoraConfig([rule]), axes=model_axes
    )
    adapters = random_like(adapters)
    lora_jax.peft.save(tmp_path, frozen, adapters, names=names)
    assert keys_of(tmp_path) == {f"layers.{i}.{x}_proj" for i in (0, 1) for x in "qv"}
    chex.assert_trees_all_equal(lora_jax.peft.load(tmp_path, params, names=names)[1], adapters)
    edit_tensors(tmp_path, lambda t: [t.pop(k) for k in list(t) if "1.q_proj" in k])
    edit_config(tmp_path, target_modules=[])
    with pytest.raises(ValueError, match=r"lacks 'layers\.1\.q_proj\.weight'"):
        lora_jax.peft.load(tmp_path, params, names=names)


def test_a_part_that_should_be_there(tmp_path):
    params = random_like({"a": {"qkv": {"kernel": jnp.ones((4, 9))}}})
    rule = lora_jax.Rule(".*", rank=2, fused=3, parts=(0, 2))
    split = lora_jax.lora_init(jax.random.key(0), params, lora_jax.LoraConfig([rule]))
    lora_jax.peft.save(tmp_path, *split, names=QKV)
    edit_config(tmp_path, target_modules=["q_proj", "k_proj", "v_proj"])
    with pytest.raises(ValueError, match=r"lacks 'a\.k_proj', of target_modules"):
        lora_jax.peft.load(tmp_path, params, names=QKV)
    # A list of names may name some of the kernels only: those that are adapted.
    axes = lora_jax.KernelAxes(fused=3, parts=(0, 2))
    some = [("a/qkv/kernel", "a.{q|v}_proj.weight", "linear", axes)]
    lora_jax.peft.save(tmp_path / "two", *split, names=some)
    assert keys_of(tmp_path / "two") == {"a.q_proj", "a.v_proj"}
    chex.assert_trees_all_equal(
        lora_jax.peft.load(tmp_path / "two", params, names=some)[1], split[1]
    )
    rule = lora_jax.Rule(".*", rank=2, fused=3, parts=(1,))
    split = lora_jax.lora_init(jax.random.key(0), params, lora_jax.LoraConfig([rule]))
    with pytest.raises(ValueError, match="no name in PyTorch for part 1 of 'a/qkv/kernel'"):
        lora_jax.peft.save(tmp_path / "three", *split, names=some)
    with pytest.raises(ValueError, match="3 kernels side by side, and names names 2 of them"):
        lora_jax.export(tmp_path / "merged", *split, names=some)


@pytest.mark.parametrize("parts", [(0,), (1,), (0, 1)])
def test_gemmas_keys_and_values(parts, tmp_path):
    params = {"layer_0": {"attn": {"kv_einsum": {"w": jnp.ones((2, 2, 6, 3))}}}}
    params = random_like(params)
    axes = lora_jax.KernelAxes((2,), (0, 1, 3))
    rule = lora_jax.Rule(".*", rank=2, fused=2, parts=parts)
    frozen, adapters = lora_jax.lora_init(
        jax.random.key(0),
        params,
        lora_jax.LoraConfig([rule]),
        axes={"layer_0/attn/kv_einsum/w": axes},
    )
    adapters = random_like(adapters)
    lora_jax.peft.save(tmp_path, frozen, adapters, names="gemma")
    assert keys_of(tmp_path) == {f"model.layers.0.self_attn.{'kv'[part]}_proj" for part in parts}
    chex.assert_trees_all_equal(
        lora_jax.peft.load(tmp_path, params, names="gemma"), (frozen, adapters)
    )


@pytest.mark.parametrize("names", ["llama9", 3])
def test_families_that_do_not_exist(saved, model, names):
    with pytest.raises((ValueError, TypeError), match="names"):
        lora_jax.peft.load(saved[0], model[0], names=names)
