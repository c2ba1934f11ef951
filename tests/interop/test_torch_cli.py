"""What the command merges, transformers loads, and it computes what the adapter does in PEFT."""

import json

import numpy as np
import pytest

from lora_jax.cli import commands

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GPT2 = {"vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0}
WHISPER = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
WHISPER |= {"decoder_attention_heads": 2, "encoder_attention_heads": 2, "decoder_ffn_dim": 24}
WHISPER |= {"is_encoder_decoder": False, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
WHISPER |= {"decoder_start_token_id": 0, "max_target_positions": 32, "begin_suppress_tokens": None}
KINDS = {
    "llama": ("Llama", SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "untied": ("Llama", SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "neox": ("GPTNeoX", SMALL | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2", GPT2),
    "biogpt": ("BioGpt", SMALL),
    "whisper": ("Whisper", WHISPER),
    "bert": ("Bert", SMALL),
    "roberta": ("Roberta", SMALL),
    "distilbert": (
        "DistilBert",
        {"vocab_size": 40, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24},
    ),
    "xlnet": (
        "XLNet",
        {"vocab_size": 40, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24},
    ),
    "t5": ("T5", T5),
    "phi": ("Phi", SMALL),
}
IDS = torch.arange(14).reshape(2, 7) + 3


def logits(model):
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **more).logits.numpy()


def make_base(folder, kind, end, seed=0):
    """The folder of a model with random weights."""
    name, sizes = KINDS[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**sizes)
    size = "2KB" if kind == "neox" else "1GB"  # in shards, and in one file
    getattr(transformers, name + end)(config).save_pretrained(folder, max_shard_size=size)


def train(base, folder, kind, end, tokens=None, labels=None, **options):
    """Saves an adapter of PEFT, and gives the logits that it computes."""
    cls = getattr(transformers, KINDS[kind][0] + end)
    torch.manual_seed(3)
    model = cls.from_pretrained(base, **({"num_labels": labels} if labels else {}))
    if tokens is not None:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return cls, logits(model)


def check(cls, folder, expected):
    """A merged model has all that its class needs, and computes what was expected."""
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert np.abs(logits(model) - expected).max() < 1e-5 * np.abs(expected).max()
    assert json.loads((folder / "config.json").read_text())["architectures"] == [cls.__name__]


# The class of the model, its layer, its embedding and its head.
TIED = {
    "llama": ("ForCausalLM", "q_proj", "embed_tokens", "lm_head"),
    "neox": ("ForCausalLM", "query_key_value", "embed_in", "embed_out"),
    "gpt2": ("LMHeadModel", "c_attn", "wte", "lm_head"),
    "biogpt": ("ForCausalLM", "q_proj", "embed_tokens", "output_projection"),
    "whisper": ("ForCausalLM", "q_proj", "embed_tokens", "proj_out"),
    "bert": ("ForMaskedLM", "query", "word_embeddings", "decoder"),
    "roberta": ("ForMaskedLM", "query", "word_embeddings", "decoder"),
    "xlnet": ("LMHeadModel", "layer_1", "word_embedding", "lm_loss"),
    "t5": ("ForConditionalGeneration", "q", "shared", "lm_head"),
}
# What is adapted, and what is fully trained: "E" and "H" are the embedding and the head.
CHANGES = [("", "E"), ("", "H"), ("H", ""), ("EH", ""), ("", "EH"), ("E", ""), ("H", "E")]


@pytest.mark.parametrize("kind", TIED)
def test_a_tied_embedding(kind, tmp_path, capsys):
    """Its head is its own, unless one array has several uses that the model cannot tell apart."""
    end, layer, embedding, head = TIED[kind]
    make_base(tmp_path / "base", kind, end)
    names = {"E": embedding, "H": head}
    for i, (targets, saved) in enumerate(CHANGES if kind == "llama" else CHANGES[-3:]):
        options = {"target_modules": [layer, *(names[one] for one in targets)]}
        options["modules_to_save"] = [names[one] for one in saved] or None
        cls, expected = train(tmp_path / "base", tmp_path / f"x{i}", kind, end, **options)
        out = tmp_path / f"merged{i}"
        if kind == "t5":
            with pytest.raises(ValueError, match="an encoder and a decoder that share"):
                commands.merge(tmp_path / f"x{i}", tmp_path / "base", out)
            assert not out.exists()
            continue
        commands.merge(tmp_path / f"x{i}", tmp_path / "base", out)
        check(cls, out, expected)
        assert "two arrays now" in capsys.readouterr().out
    if kind not in ("t5", "neox"):
        with pytest.raises(ValueError, match="give the base's folder"):
            commands.merge(tmp_path / "x0", tmp_path / "base" / "model.safetensors", tmp_path / "m")


@pytest.mark.parametrize("where", ["target_modules", "modules_to_save"])
@pytest.mark.parametrize("tokens", [None, 43])
def test_a_tie_that_peft_keeps(where, tokens, tmp_path):
    """What PEFT's files have for the head too is merged as the two arrays that they are."""
    make_base(tmp_path / "base", "llama", "ForCausalLM")
    options = {"target_modules": ["q_proj"], "ensure_weight_tying": True}
    options[where] = [*options.get(where, ()), "embed_tokens"]
    cls, expected = train(
        tmp_path / "base", tmp_path / "x", "llama", "ForCausalLM", tokens, **options
    )
    commands.merge(tmp_path / "x", tmp_path / "base", tmp_path / "out")
    check(cls, tmp_path / "out", expected)


HEADS = {
    "labels": ("bert", "Model", "ForSequenceClassification", "query", 3, {"task_type": "SEQ_CLS"}),
    "labels of tokens": (
        "bert",
        "ForMaskedLM",
        "ForTokenClassification",
        ["query", "word_embeddings"],
        5,
        {"modules_to_save": ["classifier"]},
    ),
    "of a language model": (
        "llama",
        "ForCausalLM",
        "ForSequenceClassification",
        ["q_proj", "embed_tokens"],
        4,
        {"task_type": "SEQ_CLS", "use_dora": True},
    ),
    "of two layers": (
        "distilbert",
        "ForMaskedLM",
        "ForSequenceClassification",
        "q_lin",
        3,
        {"task_type": "SEQ_CLS"},
    ),
    "of a base without prefix": (
        "gpt2",
        "Model",
        "ForSequenceClassification",
        "c_attn",
        3,
        {"task_type": "SEQ_CLS"},
    ),
    "tied, of a base without prefix": (
        "gpt2",
        "Model",
        "LMHeadModel",
        ["c_attn", "lm_head"],
        None,
        {"task_type": "CAUSAL_LM"},
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_head_that_the_base_lacks(case, tmp_path, capsys):
    kind, base, end, targets, labels, options = HEADS[case]
    make_base(tmp_path / "base", kind, base)
    options = options | {"target_modules": [targets] if isinstance(targets, str) else targets}
    trained = train(tmp_path / "base", tmp_path / "x", kind, end, labels=labels, **options)
    commands.merge(tmp_path / "x", tmp_path / "base", tmp_path / "out")
    cls, expected = trained
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if "LMHead" in end:
        config["architectures"] = [cls.__name__]
        (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    check(cls, tmp_path / "out", expected)
    said = capsys.readouterr().out
    assert ("lacks" in said) == ("is a" in said) == (labels is not None)
    assert ("without" in said) == (base == "Model")


LACKS = {
    "pooler": ("bert", "ForMaskedLM", "ForSequenceClassification", "query"),
    "sequence_summary": ("xlnet", "LMHeadModel", "ForSequenceClassification", "layer_1"),
}


@pytest.mark.parametrize("layer", LACKS)
def test_a_layer_before_the_head_that_nothing_has(layer, tmp_path):
    """Else transformers would make another one than the training was with."""
    kind, base, end, target = LACKS[layer]
    make_base(tmp_path / "base", kind, base)
    options = {"target_modules": [target], "task_type": "SEQ_CLS"}
    if kind == "xlnet":
        options["modules_to_save"] = ["logits_proj"]
    cls, expected = train(tmp_path / "base", tmp_path / "x", kind, end, **options)
    with pytest.raises(ValueError, match=f"{cls.__name__} has a '{layer}', and neither"):
        commands.merge(tmp_path / "x", tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    options["modules_to_save"] = [*options.get("modules_to_save", ()), layer]
    cls, expected = train(tmp_path / "base", tmp_path / "y", kind, end, **options)
    commands.merge(tmp_path / "y", tmp_path / "base", tmp_path / "out")
    check(cls, tmp_path / "out", expected)


def test_a_head_alone_does_not_say_the_prefix(tmp_path):
    make_base(tmp_path / "base", "gpt2", "Model")
    options = {"target_modules": ["lm_head"], "task_type": "CAUSAL_LM"}
    _, expected = train(tmp_path / "base", tmp_path / "x", "gpt2", "LMHeadModel", **options)
    arguments = (tmp_path / "x", tmp_path / "base", tmp_path / "out")
    with pytest.raises(ValueError, match="--adapter-prefix transformer"):
        commands.merge(*arguments)
    commands.merge(*arguments, adapter_prefix="transformer")
    merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert np.abs(logits(merged) - expected).max() < 1e-5 * np.abs(expected).max()


def test_an_adapter_of_the_base_alone(tmp_path, capsys):
    make_base(tmp_path / "base", "bert", "ForMaskedLM")
    model = transformers.BertModel.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"]))
    for name, parameter in model.named_parameters():
        parameter.data += 0.2 * ("lora_B" in name)
    model.save_pretrained(tmp_path / "x")
    commands.merge(tmp_path / "x", tmp_path / "base", tmp_path / "out")
    assert "behind 'bert.'" in capsys.readouterr().out
    merged = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out").bert.eval()
    with torch.no_grad():
        a, b = (one.eval()(input_ids=IDS).last_hidden_state for one in (merged, model))
    assert torch.allclose(a, b, atol=1e-6)


HEAD = ["q_proj", "lm_head"]
GROWN = [
    ("phi", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),  # its head has a bias
    ("phi", {}),
    ("llama", {}),
    ("untied", {}),
    ("llama", {"modules_to_save": ["embed_tokens"]}),
    ("untied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    ("untied", {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True}),
]


def test_a_vocabulary_that_has_grown(tmp_path, capsys):
    for kind in ("llama", "untied", "phi"):
        make_base(tmp_path / kind, kind, "ForCausalLM")
    for i, (kind, options) in enumerate(GROWN):
        folder, options = tmp_path / f"x{i}", {"target_modules": ["q_proj"]} | options
        trained = train(tmp_path / kind, folder, kind, "ForCausalLM", tokens=43, **options)
        commands.merge(folder, tmp_path / kind, tmp_path / f"merged{i}")
        check(trained[0], tmp_path / f"merged{i}", trained[1])
        assert "There are 43 tokens" in capsys.readouterr().out
    other = tmp_path / "other"
    make_base(other, "llama", "ForCausalLM", seed=1)
    with pytest.raises(ValueError, match=r"was trained on another 'model.embed_tokens.weight'"):
        commands.merge(tmp_path / "x6", other, tmp_path / "no")
    # PEFT saves none of the new rows of an embedding beside a head that is adapted.
    train(tmp_path / "untied", tmp_path / "x", "untied", "ForCausalLM", 43, target_modules=HEAD)
    with pytest.raises(ValueError, match=r"has 40 in 'model.embed_tokens.weight'"):
        commands.merge(tmp_path / "x", tmp_path / "untied", tmp_path / "no")


@pytest.mark.parametrize("kind", ["untied", "phi"])
def test_what_ties_nothing_keeps_its_config(kind, tmp_path):
    make_base(tmp_path / "base", kind, "ForCausalLM")
    targets = ["q_proj", "embed_tokens", "lm_head"]
    cls, expected = train(
        tmp_path / "base", tmp_path / "x", kind, "ForCausalLM", target_modules=targets
    )
    commands.merge(tmp_path / "x", tmp_path / "base", tmp_path / "out")
    check(cls, tmp_path / "out", expected)
    before, after = (tmp_path / n / "config.json" for n in ("base", "out"))
    assert before.read_bytes() == after.read_bytes()
