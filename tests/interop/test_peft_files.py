"""Adapters go from PEFT to Flax and back: the same numbers, the same files, no warning."""

import dataclasses
import json
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_like, random_variables, relative_error

import lora_jax
from examples import minilm
from lora_jax.cli import commands
from lora_jax.files._tensors import Tensors, encode
from lora_jax.peft.config._write import DEFAULTS

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.interop,
    # transformers' Flax models say that they will not be kept
    pytest.mark.filterwarnings("ignore:.*[Ff]lax.*"),
]

PARAM = nn.Module.param


@pytest.fixture(autouse=True)
def flax_as_it_is(monkeypatch):
    """Other tests of this process may have imported gemma, which puts a method of its own here."""
    monkeypatch.setattr(nn.Module, "param", PARAM)


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def noisy(model, seed=0):
    """Every trained parameter moved, so that no factor is zero and no magnitude is the norm."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.data += noise.to(parameter.dtype)
    return model.eval()


def check_both_ways(base, config, flax_logits, torch_logits, params, tmp_path, **options):
    """PEFT's file gives PEFT's logits in Flax; ours is the same file, and gives them in PEFT.

    Args:
      base: makes the PyTorch model anew.
      config: PEFT's.
      flax_logits: of ``(frozen, adapters)``.
      torch_logits: of a PyTorch model.
      params: the base in Flax.
      options: ``names`` and ``axes``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = noisy(peft.get_peft_model(base(), config))
        theirs.save_pretrained(tmp_path / "theirs")
    expected = torch_logits(theirs)
    assert relative_error(torch_logits(base()), expected) > 1e-2
    frozen, adapters = lora_jax.peft.load(tmp_path / "theirs", params, **options)
    assert relative_error(flax_logits(frozen, adapters), expected) < 1e-5

    lora_jax.peft.save(tmp_path / "ours", frozen, adapters, **options)
    before, after = (dict(Tensors(tmp_path / name / WEIGHTS)) for name in ("theirs", "ours"))
    before = {name: array for name, array in before.items() if "base_layer.weight" not in name}
    assert set(before) == set(after)
    for name, array in before.items():
        assert array.dtype == after[name].dtype
        assert np.array_equal(array, after[name])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # PEFT uses these patterns, but looks for them among the modules only when it warns.
        if config.target_parameters:
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did")
        back = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    assert relative_error(torch_logits(back), expected) < 1e-6
    again = lora_jax.peft.load(tmp_path / "ours", params, **options)
    assert jax.tree.structure(again[1]) == jax.tree.structure(adapters)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, (frozen, adapters)))
    return adapters


# --- layers ---


class Model(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 6, name="embed")(ids)
        x = nn.Conv(8, (3,), padding="VALID", name="conv1")(x)[:, :, None]
        x = nn.tanh(nn.Conv(8, (2, 1), padding="VALID", name="conv2")(x))[:, :, 0]
        for i in range(3):
            x = nn.tanh(nn.Dense(8, use_bias=i != 1, name=f"layer_{i}")(x))
        x = nn.LayerNorm(epsilon=1e-5, name="norm")(x)
        return nn.Dense(4, name="head")(x)


class TorchModel(torch.nn.Module):
    def __init__(self, params):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.conv1 = torch.nn.Conv1d(6, 8, 3)
        self.conv2 = torch.nn.Conv2d(8, 8, (2, 1))
        self.layer = torch.nn.ModuleList([torch.nn.Linear(8, 8, bias=i != 1) for i in range(3)])
        self.norm = torch.nn.LayerNorm(8)
        self.head = torch.nn.Linear(8, 4)
        state = {}
        for layer, leaves in params.items():
            for leaf, array in leaves.items():
                array = np.array(array)
                if leaf == "kernel":
                    array = np.ascontiguousarray(np.moveaxis(array, (-1, -2), (0, 1)))
                name = {"bias": "bias"}.get(leaf, "weight")
                state[f"{layer.replace('layer_', 'layer.')}.{name}"] = torch.from_numpy(array)
        self.load_state_dict(state)

    def forward(self, ids):
        x = self.conv1(self.embed(ids).transpose(1, 2))
        x = torch.tanh(self.conv2(x[..., None]))[..., 0].transpose(1, 2)
        for layer in self.layer:
            x = torch.tanh(layer(x))
        return self.head(self.norm(x))


NAMES = [
    ("layer_{i}/kernel", "layer.{i}.weight"),
    ("layer_{i}/bias", "layer.{i}.bias", "plain"),
    ("embed/embedding", "embed.weight", "embedding"),
    ("norm/scale", "norm.weight", "plain"),
    ("{conv}/kernel", "{conv}.weight", "weight"),
    ("{any}/bias", "{any}.bias", "plain"),
]
IDS = np.arange(18).reshape(2, 9) % 11
LAYERS = ["layer.0", "layer.1", "layer.2"]
CONFIGS = {
    "lora": {"target_modules": LAYERS},
    "dora": {"target_modules": LAYERS, "use_dora": True},
    "rslora": {"target_modules": LAYERS, "use_rslora": True},
    "dropout": {"target_modules": LAYERS, "lora_dropout": 0.1},
    "one regular expression": {"target_modules": r"layer\.(0|2)|head"},
    "patterns": {
        "target_modules": [*LAYERS, "head", "conv1"],
        "rank_pattern": {"layer.1": 2, r".*\.2": 4, "head": 1},
        "alpha_pattern": {"^layer.0": 7, "conv1": 1, "2": 5},
        "use_rslora": True,
    },
    "embedding": {"target_modules": ["embed", "layer.0"], "lora_dropout": 0.1},
    "embedding, dora": {"target_modules": ["embed"], "use_dora": True},
    "convolutions": {"target_modules": ["conv1", "conv2"]},
    "convolutions, dora": {"target_modules": ["conv1", "conv2", "layer.0"], "use_dora": True},
    "modules to save": {"target_modules": LAYERS, "modules_to_save": ["norm", "head"]},
    "embedding to save": {"target_modules": LAYERS, "modules_to_save": ["embed", "conv1"]},
    "biases": {"target_modules": [*LAYERS, "conv2"], "bias": "lora_only"},
    "all biases": {"target_modules": [*LAYERS, "conv2"], "bias": "all"},
    "gaussian": {"target_modules": LAYERS, "init_lora_weights": "gaussian"},
    "some layers": {"target_modules": ["layer.0", "layer.2", "head"], "exclude_modules": ["head"]},
}


@pytest.fixture(scope="module")
def params():
    return random_variables(Model(), IDS)["params"]


@pytest.fixture(scope="module")
def axes(params):
    return lora_jax.kernel_axes(Model(), {"params": params}, IDS)


def torch_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).numpy()


def flax_logits(frozen, adapters):
    return lora_jax.lora_apply(Model(), {"params": frozen}, adapters, IDS)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_layers(params, axes, config, tmp_path):
    check_both_ways(
        lambda: TorchModel(params),
        peft.LoraConfig(**{"r": 3, "lora_alpha": 5} | config),
        flax_logits,
        torch_logits,
        params,
        tmp_path,
        names=NAMES,
        axes=axes,
    )
    theirs, ours = (json.loads((tmp_path / n / CONFIG).read_text()) for n in ("theirs", "ours"))
    assert set(theirs) - {"auto_mapping"} == set(ours) - {"auto_mapping"}
    same = ("use_dora", "use_rslora", "lora_dropout", "bias", "peft_type", "fan_in_fan_out")
    assert {name: theirs[name] for name in same} == {name: ours[name] for name in same}


def test_null_is_what_peft_reads(params, axes, tmp_path):
    """As trainers write it: false, or the default."""
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=LAYERS)
    noisy(peft.get_peft_model(TorchModel(params), config)).save_pretrained(tmp_path)
    nulls = ("fan_in_fan_out", "use_dora", "use_rslora", "lora_bias", "init_lora_weights")
    said = json.loads((tmp_path / CONFIG).read_text()) | dict.fromkeys(nulls)
    (tmp_path / CONFIG).write_text(json.dumps(said))
    expected = torch_logits(peft.PeftModel.from_pretrained(TorchModel(params), tmp_path).eval())
    split = lora_jax.peft.load(tmp_path, params, names=NAMES, axes=axes)
    assert relative_error(flax_logits(*split), expected) < 1e-5


def test_config_is_what_peft_writes():
    assert {k: v for k, v in DEFAULTS.items() if k != "target_modules"} == {
        k: v
        for k, v in json.loads(json.dumps(peft.LoraConfig().to_dict())).items()
        if k != "target_modules"
    }


def test_bias_of_B(params, axes, tmp_path):
    """It comes back as it was, or trained further; PEFT also adds it to a layer without one."""
    target = ["layer.0", "layer.2", "conv1", "conv2"]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=target, lora_bias=True)
    options = {"names": NAMES, "axes": axes}
    adapters = check_both_ways(
        lambda: TorchModel(params), config, flax_logits, torch_logits, params, tmp_path, **options
    )
    theirs, ours = (json.loads((tmp_path / n / CONFIG).read_text()) for n in ("theirs", "ours"))
    assert (ours["lora_bias"], ours["bias"]) == (theirs["lora_bias"], "none") == (True, "none")

    frozen, _ = lora_jax.peft.load(tmp_path / "theirs", params, **options)
    trained = random_like(adapters)
    lora_jax.peft.save(tmp_path / "trained", frozen, trained, **options)
    back = peft.PeftModel.from_pretrained(TorchModel(params), tmp_path / "trained").eval()
    assert relative_error(flax_logits(frozen, trained), torch_logits(back)) < 1e-5

    # Layer 1 has none: with one of zeros it is what PEFT computes, and the same file.
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=LAYERS, lora_bias=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = noisy(peft.get_peft_model(TorchModel(params), config))
        model.save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="the layer of 'layer_1/kernel' has no bias"):
        lora_jax.peft.load(tmp_path / "none", params, **options)
    zeros = params | {"layer_1": params["layer_1"] | {"bias": jnp.zeros(8)}}
    split = lora_jax.peft.load(tmp_path / "none", zeros, names=NAMES)
    layer = lora_jax.lora_merge(*split)["layer_1"]
    x = random_like(jnp.zeros((5, 8)), scale=1.0)
    with torch.no_grad():
        expected = model.base_model.model.layer[1](torch.from_numpy(np.array(x))).numpy()
    assert relative_error(x @ layer["kernel"] + layer["bias"], expected) < 1e-5
    lora_jax.peft.save(tmp_path / "again", *split, names=NAMES)
    before, after = (dict(Tensors(tmp_path / n / WEIGHTS)) for n in ("none", "again"))
    assert {k: v.tobytes() for k, v in before.items()} == {k: v.tobytes() for k, v in after.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(params, dtype, tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=LAYERS, use_dora=True)
    model = noisy(peft.get_peft_model(TorchModel(params), config))
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(TorchModel(params), tmp_path / "theirs").eval()
    frozen, adapters = lora_jax.peft.load(tmp_path / "theirs", params, names=NAMES)
    assert relative_error(flax_logits(frozen, adapters), torch_logits(loaded)) < 1e-5
    lora_jax.peft.save(tmp_path / "ours", frozen, adapters, names=NAMES, dtype=dtype)
    before, after = (dict(Tensors(tmp_path / name / WEIGHTS)) for name in ("theirs", "ours"))
    assert {k: v.tobytes() for k, v in before.items()} == {k: v.tobytes() for k, v in after.items()}


def test_weights_that_are_saved_but_not_trained(params, axes, tmp_path):
    """As PEFT saves embeddings of a new size: the base must have them already."""
    config = peft.LoraConfig(r=3, target_modules=LAYERS)
    model = noisy(peft.get_peft_model(TorchModel(params), config))
    model.save_pretrained(tmp_path)
    file = tmp_path / WEIGHTS
    embed = model.base_model.model.embed.weight.detach().numpy()
    tensors = dict(Tensors(file)) | {"base_model.model.embed.weight": embed}
    file.write_bytes(encode(tensors, {"format": "pt"}))
    frozen, adapters = lora_jax.peft.load(tmp_path, params, names=NAMES, axes=axes)
    assert "embed" not in adapters
    assert relative_error(flax_logits(frozen, adapters), torch_logits(model)) < 1e-5
    other = params | {"embed": {"embedding": params["embed"]["embedding"] + 1}}
    with pytest.raises(ValueError, match="Put it into params first"):
        lora_jax.peft.load(tmp_path, other, names=NAMES, axes=axes)


def test_a_folder_for_per_adapter(params, tmp_path):
    config = peft.LoraConfig(r=3, target_modules=LAYERS)
    model = peft.get_peft_model(TorchModel(params), config, adapter_name="one")
    model.add_adapter("two", peft.LoraConfig(r=2, target_modules=LAYERS[:1]))
    model.save_pretrained(tmp_path)
    for name, rank in (("one", 3), ("two", 2)):
        _, adapters = lora_jax.peft.load(tmp_path / name, params, names=NAMES)
        assert adapters["layer_0"]["kernel"].rank == rank
    with pytest.raises(FileNotFoundError, match="one, two"):
        lora_jax.peft.load(tmp_path, params, names=NAMES)


def test_merged_is_pefts(params, axes, tmp_path):
    """PEFT merges to what we merge to."""
    config = peft.LoraConfig(r=3, target_modules=[*LAYERS, "conv2"], use_dora=True)
    model = noisy(peft.get_peft_model(TorchModel(params), config))
    model.save_pretrained(tmp_path)
    frozen, adapters = lora_jax.peft.load(tmp_path, params, names=NAMES, axes=axes)
    merged = lora_jax.lora_merge(frozen, adapters)
    plain = model.merge_and_unload()
    assert relative_error(merged["layer_0"]["kernel"], plain.layer[0].weight.detach().T) < 1e-6
    kernel = plain.conv2.weight.detach().permute(2, 3, 1, 0)
    assert relative_error(merged["conv2"]["kernel"], kernel) < 1e-6


@pytest.mark.parametrize(
    "config", [{}, {"use_dora": True}, {"bias": "lora_only"}], ids=["lora", "dora", "biases"]
)
def test_scanned_layers_are_one_key_each(params, config, tmp_path):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(8, name="up")(x)), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(Layer, {"params": 1}, split_rngs={"params": True}, length=3)
            return layers(name="layers")(x, None)[0]

    class Unrolled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList()
            for i in range(3):
                layer = torch.nn.Module()
                layer.up = torch.nn.Linear(8, 8)
                layer.up.weight.data = torch.from_numpy(np.array(kernel[:, i].T))
                layer.up.bias.data = torch.from_numpy(np.array(bias[:, i]))
                self.layers.append(layer)

        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer.up(x))
            return x

    x = random_like(jnp.zeros((2, 8)), scale=1.0)
    stacked = random_variables(Scanned(), x)["params"]
    kernel, bias = stacked["layers"]["up"]["kernel"], stacked["layers"]["up"]["bias"]

    def logits(model):
        with torch.no_grad():
            return model(torch.from_numpy(np.array(x))).numpy()

    check_both_ways(
        Unrolled,
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=["up"], **config),
        lambda frozen, a: lora_jax.lora_apply(Scanned(), {"params": frozen}, a, x),
        logits,
        stacked,
        tmp_path,
        names=[
            ("layers/up/kernel", "layers.{i}.up.weight"),
            ("layers/up/bias", "layers.{i}.up.bias", "plain"),
        ],
        axes=lora_jax.kernel_axes(Scanned(), {"params": stacked}, x),
    )


def check_command_merges(base, folder, out, **options):
    """The command writes what PEFT's merge_and_unload gives."""
    file = out / "base.safetensors"
    state = {name: x.detach().numpy() for name, x in base().state_dict().items()}
    file.write_bytes(encode(state, {"format": "pt"}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base(), folder).merge_and_unload()
    commands.merge(folder, file, out / "merged.safetensors", **options)
    merged, expected = Tensors(out / "merged.safetensors"), model.state_dict()
    assert set(merged) == set(expected)
    for name, array in expected.items():
        assert relative_error(merged[name], array.numpy()) < 1e-6


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["layer.0", "layer.2", "conv1", "conv2"], "lora_bias": True},
        {"target_modules": [*LAYERS, "conv2", "embed"], "use_dora": True},
        {"target_modules": LAYERS, "bias": "all", "modules_to_save": ["norm"]},
    ],
    ids=["biases of B", "dora", "fully trained"],
)
def test_command_merges_as_peft(params, config, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(TorchModel(params), peft.LoraConfig(r=3, **config))
        noisy(model).save_pretrained(tmp_path / "adapter")
    check_command_merges(lambda: TorchModel(params), tmp_path / "adapter", tmp_path)


# --- models of Hugging Face ---

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
}
VISION = {name: SMALL[name] for name in list(SMALL)[1:5]} | {"image_size": 32, "patch_size": 8}
GPT2 = {"vocab_size": 99, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
TOKENS = np.arange(14).reshape(2, 7) + 3
IMAGE = np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)


@dataclasses.dataclass
class Case:
    """A model of transformers, small, and what PEFT adapts in it."""

    cls: str
    config: str
    sizes: dict[str, Any]
    peft: dict[str, Any]
    input: np.ndarray = dataclasses.field(default_factory=lambda: TOKENS)


BERT = ("BertForSequenceClassification", "BertConfig", SMALL)
CASES = {
    "BERT": Case(*BERT, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "BERT, dora, all": Case(*BERT, {"target_modules": "all-linear", "use_dora": True}),
    "BERT, embedding": Case(*BERT, {"target_modules": ["word_embeddings", "key"]}),
    "RoBERTa": Case(
        "RobertaForSequenceClassification",
        "RobertaConfig",
        SMALL,
        {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"]},
    ),
    "GPT-2": Case(
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT2,
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
    "GPT-2, dora, tied embedding": Case(
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT2,
        {"target_modules": ["c_attn", "c_fc", "wte"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "Llama": Case(
        "LlamaForCausalLM",
        "LlamaConfig",
        SMALL,
        {"target_modules": ["q_proj", "v_proj", "gate_proj"], "rank_pattern": {"0.*q_proj": 2}},
    ),
    "ViT": Case(
        "ViTForImageClassification",
        "ViTConfig",
        VISION,
        {"target_modules": ["query", "value", "projection"], "modules_to_save": ["classifier"]},
        IMAGE,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_models(case, tmp_path):
    config = getattr(transformers, case.config)(**case.sizes)
    torch.manual_seed(0)
    getattr(transformers, case.cls)(config).save_pretrained(tmp_path / "base")

    def base():
        return getattr(transformers, case.cls).from_pretrained(tmp_path / "base").eval()

    flax_model = getattr(transformers, f"Flax{case.cls}").from_pretrained(
        tmp_path / "base", from_pt=True
    )

    def logits(model):
        with torch.no_grad():
            return model(torch.from_numpy(case.input)).logits.numpy()

    def ours(frozen, adapters):
        return lora_jax.lora_apply(flax_model, {"params": frozen}, adapters, case.input).logits

    params = flax_model.params
    check_both_ways(
        base,
        peft.LoraConfig(**{"r": 4, "lora_alpha": 8} | case.peft),
        ours,
        logits,
        params,
        tmp_path,
        axes=lora_jax.kernel_axes(flax_model, {"params": params}, case.input),
    )


GEMMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "v_proj"],
        ["k_proj", "up_proj"],
        "all-linear",
        r".*0\.self_attn\.v_proj|.*gate_proj",
    ],
    ids=["q and v", "k and up", "all", "one layer"],
)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_gemma(targets, dora, tmp_path):
    """Kernels that Google's gemma has side by side are adapted where PEFT adapts them."""
    config = transformers.GemmaConfig(
        vocab_size=99,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        intermediate_size=10,
    )
    torch.manual_seed(0)
    state = transformers.GemmaForCausalLM(config).state_dict()

    def base():
        model = transformers.GemmaForCausalLM(config)
        model.load_state_dict(state)
        return model.eval()

    def flax(state):
        """As gemma stores them: by hand, and not with what is tested."""
        params = {}
        for i in range(2):
            one = {n: state[f"model.layers.{i}.{m}.{n}.weight"].numpy().T for m, n in modules}
            q, k, v = (one[n].reshape(12, -1, 4).swapaxes(0, 1) for n in GEMMA[:3])
            params[f"layer_{i}"] = {
                "attn": {
                    "q_einsum": {"w": q},
                    "kv_einsum": {"w": np.stack([k, v])},
                    "attn_vec_einsum": {"w": one["o_proj"].reshape(4, 4, 12)},
                },
                "mlp": {
                    "gating_einsum": np.stack([one["gate_proj"].T, one["up_proj"].T]),
                    "linear": one["down_proj"],
                },
            }
        return jax.tree.map(jnp.asarray, params)

    modules = [("self_attn" if n in GEMMA[:4] else "mlp", n) for n in GEMMA]
    peft_config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, use_dora=dora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = noisy(peft.get_peft_model(base(), peft_config))
        model.save_pretrained(tmp_path / "theirs")
    params = flax(state)
    frozen, adapters = lora_jax.peft.load(tmp_path / "theirs", params, names="gemma")
    lora_jax.peft.save(tmp_path / "ours", frozen, adapters, names="gemma")
    before, after = (dict(Tensors(tmp_path / name / WEIGHTS)) for name in ("theirs", "ours"))
    assert {k: v.tobytes() for k, v in before.items()} == {k: v.tobytes() for k, v in after.items()}

    with torch.no_grad():
        expected = model(torch.from_numpy(TOKENS)).logits.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    with torch.no_grad():
        assert relative_error(back(torch.from_numpy(TOKENS)).logits.numpy(), expected) < 1e-6
    merged = lora_jax.lora_merge(frozen, adapters)
    plain = flax(model.merge_and_unload().state_dict())
    assert max(jax.tree.leaves(jax.tree.map(relative_error, merged, plain))) < 1e-5


# --- real weights ---


def test_minilm(tmp_path):
    """all-MiniLM-L6-v2 in both frameworks, with the names of the example."""
    config, params = minilm.load_pretrained()
    ids, mask = minilm.tokenize(["Effective but too tepid biopic", "A charmer."], 16)
    encoder = minilm.Encoder(config)

    def logits(model):
        with torch.no_grad():
            return model(torch.tensor(ids), torch.tensor(mask)).last_hidden_state.numpy()

    check_both_ways(
        lambda: transformers.BertModel.from_pretrained(minilm.folder()).eval(),
        peft.LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=r"encoder.*(query|key|value|dense)",
            use_dora=True,
        ),
        lambda frozen, a: lora_jax.lora_apply(encoder, {"params": frozen}, a, ids, mask),
        logits,
        params,
        tmp_path,
        names=minilm.NAMES,
    )


class FlaxExperts(nn.Module):
    """Every token goes to all experts: kernels are ``(experts, in, out)``."""

    @nn.compact
    def __call__(self, x):
        up = self.param("up", nn.initializers.normal(0.3), (4, 6, 5))
        down = self.param("down", nn.initializers.normal(0.3), (4, 5, 6))
        hidden = jnp.tanh(jnp.einsum("td,edf->etf", x, up))
        return jnp.einsum("etf,efd->td", hidden, down)


class FlaxMoe(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = nn.Dense(6, name=f"dense_{i}")(x + FlaxExperts(name=f"experts_{i}")(x))
        return x


class TorchExperts(torch.nn.Module):
    def __init__(self, params, transposed):
        super().__init__()
        if transposed:
            self.is_transposed = True
        # The order of these two is the order in which PEFT wraps them.
        for name in ("up", "down"):
            array = torch.from_numpy(np.array(params[name]))
            array = array if transposed else array.transpose(1, 2).contiguous()
            setattr(self, name, torch.nn.Parameter(array))
        self.equations = ("td,edf->etf", "etf,efd->td")
        if not transposed:
            self.equations = ("td,efd->etf", "etf,edf->td")

    def forward(self, x):
        hidden = torch.tanh(torch.einsum(self.equations[0], x, self.up))
        return torch.einsum(self.equations[1], hidden, self.down)


class TorchMoe(torch.nn.Module):
    def __init__(self, params, transposed):
        super().__init__()
        self.layers = torch.nn.ModuleList()
        for i in range(2):
            layer = torch.nn.Module()
            layer.experts = TorchExperts(params[f"experts_{i}"], transposed)
            layer.dense = torch.nn.Linear(6, 6)
            layer.dense.weight.data = torch.from_numpy(np.array(params[f"dense_{i}"]["kernel"].T))
            layer.dense.bias.data = torch.from_numpy(np.array(params[f"dense_{i}"]["bias"]))
            self.layers.append(layer)

    def forward(self, x):
        for layer in self.layers:
            x = layer.dense(x + layer.experts(x))
        return x


@pytest.mark.parametrize("transposed", [False, True], ids=["out by in", "in by out"])
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": [], "target_parameters": ["experts.up"]},
        {"target_modules": [], "target_parameters": ["experts.down", "experts.up"]},
        {
            "target_modules": ["dense"],
            "target_parameters": ["experts.down", "experts.up"],
            "rank_pattern": {"experts.up": 2, "layers.1.dense": 1},
            "alpha_pattern": {"layers.0.experts.down": 7},
            "use_rslora": True,
        },
        {
            "target_modules": [],
            "target_parameters": ["experts.down", "0.dense.weight"],
            "alpha_pattern": {"dense.weight": 9},
        },
    ],
    ids=["one", "two", "patterns", "a matrix"],
)
def test_experts(config, transposed, tmp_path):
    """Parameters that hold experts, of which PEFT wraps a module once for each."""
    x = random_like(jnp.zeros((3, 6)), scale=1.0)
    params = random_variables(FlaxMoe(), x)["params"]
    kind = "experts_transposed" if transposed else "experts"
    axes = {
        f"experts_{i}/{name}": lora_jax.KernelAxes((1,), (2,), (0,))
        for i in range(2)
        for name in ("up", "down")
    }

    def base():
        return TorchMoe(params, transposed)

    def logits(model):
        with torch.no_grad():
            return model(torch.from_numpy(np.array(x))).numpy()

    check_both_ways(
        base,
        peft.LoraConfig(r=3, lora_alpha=5, **config),
        lambda frozen, a: FlaxMoe().apply({"params": lora_jax.lora_merge(frozen, a)}, x),
        logits,
        params,
        tmp_path,
        names=[
            ("experts_{i}/up", "layers.{i}.experts.up", kind),
            ("experts_{i}/down", "layers.{i}.experts.down", kind),
            ("dense_{i}/kernel", "layers.{i}.dense.weight"),
            ("dense_{i}/bias", "layers.{i}.dense.bias", "plain"),
        ],
        axes=axes,
    )
    # Its experts are each the other's transposes, so that their shapes do not say which they are.
    names = {t.rpartition(".")[2] for t in config["target_parameters"]}
    order = tuple(name for name in ("up", "down", "weight") if name in names)
    check_command_merges(base, tmp_path / "theirs", tmp_path, experts=order)
