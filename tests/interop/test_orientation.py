"""Square weights go the right way round: what PEFT and transformers compute decides.

GPT-2's layers are `Conv1D`, (in, out); those of the same names in GPT-Neo are linear, (out, in).
"""

import json
import warnings

import jax
import numpy as np
import pytest
from helpers import random_like, relative_error
from test_peft_files import noisy

import lora_jax
from lora_jax.cli import commands
from lora_jax.files._tensors import Tensors

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:.*[Ff]lax.*"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set"),
]

IDS = np.arange(14).reshape(2, 7) + 3
WIDTHS = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 32} | {
    "tie_word_embeddings": False
}
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "vocab_size": 32,
    "tie_word_embeddings": False,
}
NEO = {name: SMALL[name] for name in list(SMALL) if "num" not in name} | {
    "num_layers": 1,
    "num_heads": 2,
    "attention_types": [[["global"], 1]],
}
MODELS = {
    "GPT-2": ("GPT2LMHeadModel", transformers.GPT2Config(**WIDTHS)),
    "GPT-2, square": ("GPT2LMHeadModel", transformers.GPT2Config(n_inner=16, **WIDTHS)),
    "GPT-2, classifier": (
        "GPT2ForSequenceClassification",
        transformers.GPT2Config(num_labels=16, pad_token_id=0, **WIDTHS),
    ),
    "GPT-Neo": ("GPTNeoForCausalLM", transformers.GPTNeoConfig(intermediate_size=24, **NEO)),
    "GPT-Neo, square": (
        "GPTNeoForCausalLM",
        transformers.GPTNeoConfig(intermediate_size=16, **NEO),
    ),
    "GPT-J": ("GPTJForCausalLM", transformers.GPTJConfig(rotary_dim=4, n_inner=16, **WIDTHS)),
    "OPT": (
        "OPTForCausalLM",
        transformers.OPTConfig(
            ffn_dim=16, word_embed_proj_dim=16, do_layer_norm_before=True, **SMALL
        ),
    ),
    "Llama": ("LlamaForCausalLM", transformers.LlamaConfig(intermediate_size=16, **SMALL)),
}


class Base:
    """A model of transformers, small, in a folder."""

    def __init__(self, name, folder, **options):
        self.cls, config = MODELS[name]
        self.folder = folder
        torch.manual_seed(0)
        model = getattr(transformers, self.cls)(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
        model.save_pretrained(folder, **options)

    def load(self, folder=None):
        cls = getattr(transformers, self.cls)
        return cls.from_pretrained(folder or self.folder).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.numpy()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def base(name):
        if name not in made:
            made[name] = Base(name, tmp_path_factory.mktemp("base"))
        return made[name]

    return base


def adapted(base, folder, targets, **config):
    """What PEFT's merge_and_unload computes, of an adapter in the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            base.load(), peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, **config)
        )
        noisy(model).save_pretrained(folder)
    return logits(model.merge_and_unload())


ALL_GPT2 = ["c_attn", "c_proj", "c_fc"]
ADAPTERS = [
    ("GPT-2", ["c_attn", "c_proj", "lm_head"], {}),
    ("GPT-2", ["attn.c_proj"], {"use_dora": True}),
    ("GPT-2, square", [*ALL_GPT2, "lm_head"], {"use_dora": True}),
    ("GPT-2, square", ["c_fc"], {"modules_to_save": ["attn.c_proj"]}),
    ("GPT-2, classifier", [*ALL_GPT2, "score"], {}),
    ("GPT-2, classifier", ["c_proj"], {"task_type": "SEQ_CLS"}),
    ("GPT-Neo", ["c_fc", "c_proj", "out_proj"], {"use_dora": True}),
    ("GPT-Neo, square", ["c_fc", "c_proj", "q_proj"], {}),
    ("GPT-Neo, square", ["c_fc", "out_proj"], {"modules_to_save": ["c_proj"]}),
    ("GPT-J", ["q_proj", "fc_in", "fc_out"], {}),
    ("OPT", ["q_proj", "out_proj", "fc1", "fc2"], {"use_dora": True}),
    ("Llama", ["q_proj", "o_proj", "gate_proj", "down_proj"], {}),
]
# Those of which the weights alone do not say it: no layer of the name has another shape.
ASKS = [("GPT-2, square", "c_attn"), ("GPT-Neo, square", "c_fc")]


@pytest.mark.parametrize(
    ("name", "targets", "config"), ADAPTERS, ids=[f"{n}-{','.join(t)}-{c}" for n, t, c in ADAPTERS]
)
def test_merge_is_pefts(bases, name, targets, config, tmp_path):
    """With the model's folder; and with its weights alone it is right, or asks."""
    base = bases(name)
    expected = adapted(base, tmp_path / "adapter", targets, **config)
    assert relative_error(logits(base.load()), expected) > 1e-2
    commands.merge(tmp_path / "adapter", base.folder, tmp_path / "merged")
    assert relative_error(logits(base.load(tmp_path / "merged")), expected) < 1e-5
    if "use_dora" in config:
        base.load().save_pretrained(tmp_path / "shards", max_shard_size="4kB")
        commands.merge(tmp_path / "adapter", tmp_path / "shards", tmp_path / "merged shards")
        assert len(list((tmp_path / "merged shards").glob("*.safetensors"))) > 1
        assert relative_error(logits(base.load(tmp_path / "merged shards")), expected) < 1e-5

    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(said | {"auto_mapping": None})
    )
    alone = tmp_path / "alone" / "model.safetensors"
    alone.parent.mkdir()
    alone.write_bytes((base.folder / "model.safetensors").read_bytes())
    out = tmp_path / "m.safetensors"
    merged = Tensors(tmp_path / "merged" / "model.safetensors")
    layout = None
    if (name, targets[0]) in ASKS and len(targets) > 1:
        with pytest.raises(ValueError, match="Say it, of all layers called"):
            commands.merge(tmp_path / "adapter", alone, out)
        layout = "in-out" if name.startswith("GPT-2") else "out-in"
    commands.merge(tmp_path / "adapter", alone, out, layout=layout)
    for key, array in merged.items():
        assert np.array_equal(Tensors(out)[key], array), key


def tuned(base, folder, names):
    """The base with other weights of rank 1, and its logits."""
    model = base.load()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(name.endswith(f"{one}.weight") for one in names):
            u, v = (torch.randn(n, 1, generator=generator) for n in parameter.shape)
            parameter.data += 0.3 * u @ v.T
    model.save_pretrained(folder)
    return logits(model)


TUNED = [
    ("GPT-2", ["c_attn", "c_proj", "c_fc"]),
    ("GPT-2, square", ALL_GPT2),
    ("GPT-2, classifier", ["c_attn", "c_proj", "score"]),
    ("GPT-Neo, square", ["c_fc", "c_proj", "q_proj"]),
    ("GPT-J", ["q_proj", "fc_in"]),
    ("OPT", ["q_proj", "fc2"]),
    ("Llama", ["q_proj", "down_proj"]),
]


@pytest.mark.parametrize(("name", "targets"), TUNED, ids=[name for name, _ in TUNED])
def test_extract_is_for_peft(bases, name, targets, tmp_path):
    base = bases(name)
    expected = tuned(base, tmp_path / "tuned", targets)
    assert relative_error(logits(base.load()), expected) > 1e-2
    commands.extract(tmp_path / "tuned", base.folder, tmp_path / "x", rank=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base.load(), tmp_path / "x").eval()
    assert not [w for w in caught if "fan_in" not in str(w.message)]
    assert relative_error(logits(model), expected) < 1e-4
    commands.merge(tmp_path / "x", base.folder, tmp_path / "merged")
    assert relative_error(logits(base.load(tmp_path / "merged")), expected) < 1e-4


@pytest.mark.parametrize("target", ["attn.c_proj.weight", "mlp.c_fc.weight"])
def test_a_parameter_of_conv1d_by_itself(bases, target, tmp_path):
    """Of target_parameters PEFT does not know that they are (in, out)."""
    base = bases("GPT-2")
    expected = adapted(base, tmp_path / "x", [], target_parameters=[target])
    commands.merge(tmp_path / "x", base.folder, tmp_path / "merged")
    assert relative_error(logits(base.load(tmp_path / "merged")), expected) < 1e-5
    model = transformers.FlaxGPT2LMHeadModel.from_pretrained(base.folder, from_pt=True)
    axes = lora_jax.kernel_axes(model, {"params": model.params}, IDS)
    frozen, adapters = lora_jax.peft.load(tmp_path / "x", model.params, axes=axes)
    got = lora_jax.lora_apply(model, {"params": frozen}, adapters, IDS).logits
    assert relative_error(got, expected) < 1e-5


FLAX = {
    "GPT-2": ("c_attn|c_fc|attn/c_proj", [".*mlp/c_proj/.*"]),
    "GPT-2, square": ("c_attn|c_fc|attn/c_proj|lm_head", [".*mlp/c_proj/.*"]),
    "GPT-Neo": ("c_fc|c_proj|lm_head", [".*out_proj/.*"]),
    "GPT-Neo, square": ("c_fc|q_proj", [".*c_proj/.*"]),
    "GPT-J": ("q_proj|fc_in", []),
    "OPT": ("q_proj|fc1", [".*/out_proj/.*"]),
}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", FLAX)
def test_flax_is_peft(bases, name, dora, tmp_path):
    """What Flax computes, PEFT computes with what is saved, and transformers with the export."""
    base, (targets, trainable) = bases(name), FLAX[name]
    model = getattr(transformers, f"Flax{base.cls}").from_pretrained(base.folder, from_pt=True)
    params, variant = model.params, {"variant": "dora", "detach_norm": True} if dora else {}
    axes = lora_jax.kernel_axes(model, {"params": params}, IDS)
    rule = lora_jax.Rule(f"(.*/)?({targets})/kernel", rank=2, **variant)
    config = lora_jax.LoraConfig([rule], trainable=trainable)
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config, axes=axes)
    adapters = random_like(adapters)
    expected = lora_jax.lora_apply(model, {"params": frozen}, adapters, IDS).logits

    def in_peft(folder):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "fan_in_fan_out is set")
            return logits(peft.PeftModel.from_pretrained(base.load(), folder).eval())

    lora_jax.peft.save(tmp_path / "adapter", frozen, adapters, axes=axes)
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert said["fan_in_fan_out"] == name.startswith("GPT-2")
    assert relative_error(in_peft(tmp_path / "adapter"), expected) < 1e-5
    again = lora_jax.peft.load(tmp_path / "adapter", params, axes=axes)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, (frozen, adapters)))
    for options in ({}, {"axes": axes}):
        file = tmp_path / "m" / "model.safetensors"
        lora_jax.export(file, frozen, adapters, names="transformers", **options)
        (tmp_path / "m" / "config.json").write_bytes((base.folder / "config.json").read_bytes())
        assert relative_error(logits(base.load(tmp_path / "m")), expected) < 1e-5
    if "square" in name:  # without axes nothing says it
        with pytest.raises(ValueError, match=r"name does not say it\. Pass axes="):
            lora_jax.peft.load(tmp_path / "adapter", params)

    lora_jax.save(tmp_path / "own", adapters)
    commands.merge(tmp_path / "own", base.folder, tmp_path / "merged")
    assert relative_error(logits(base.load(tmp_path / "merged")), expected) < 1e-5
    commands.convert(tmp_path / "own", tmp_path / "converted")
    assert relative_error(in_peft(tmp_path / "converted"), expected) < 1e-5
    if name == "GPT-Neo, square":
        with pytest.raises(ValueError, match="may be a Conv1D, as in GPT-2, or a linear layer"):
            commands.convert(tmp_path / "converted", tmp_path / "back")
    elif name != "GPT-Neo":
        commands.convert(tmp_path / "converted", tmp_path / "back")
        back = lora_jax.load(tmp_path / "back", params)
        assert jax.tree.all(jax.tree.map(np.array_equal, back, (frozen, adapters)))
