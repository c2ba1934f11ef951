"""An embedding that may be the head of its model too."""

import json

import numpy as np
import pytest
import safetensors.numpy
from cli_folders import FILE, PREFIX

from lora_jax.files._tensors import Tensors


@pytest.fixture
def language_model(tmp_path):
    """An adapter of an embedding, and makes the base, with a config and other arrays."""
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["embed_tokens"]}
    names = ("lora_embedding_A", "lora_embedding_B")
    factors = [np.ones(shape, np.float32) for shape in ((2, 9), (4, 2))]
    keys = [f"{PREFIX}model.embed_tokens.{name}" for name in names]
    (tmp_path / "x").mkdir()
    safetensors.numpy.save_file(dict(zip(keys, factors, strict=True)), tmp_path / "x" / FILE)

    def make(said, arrays, **of_adapter):
        (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(config | of_adapter))
        base = tmp_path / "base"
        base.mkdir()
        arrays = {"model.embed_tokens.weight": np.eye(9, 4, dtype=np.float32)} | arrays
        safetensors.numpy.save_file(arrays, base / "model.safetensors")
        if said is not None:
            (base / "config.json").write_text(json.dumps(said))
        return tmp_path / "x", base

    return make


CAUSAL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
HEAD = {"lm_head.weight": np.eye(9, 4, dtype=np.float32)}
OTHER = {"lm_head.weight": np.ones((9, 4), np.float32)}


@pytest.mark.parametrize(
    ("config", "arrays", "adapter", "expected"),
    [
        (CAUSAL, {}, {}, "two arrays"),
        (CAUSAL, HEAD, {}, "two arrays"),
        (CAUSAL | {"tie_word_embeddings": True}, HEAD, {}, "two arrays"),
        (CAUSAL | {"tie_word_embeddings": False}, HEAD, {}, ""),
        (CAUSAL, OTHER, {}, ""),
        (CAUSAL | {"tie_word_embeddings": True}, OTHER, {}, "error: set tie_word_embeddings to"),
        (CAUSAL, {}, {"task_type": "SEQ_CLS"}, ""),
        ({"architectures": ["LlamaModel"]}, {}, {}, ""),
        (CAUSAL | {"architectures": ["LlamaModel"]}, {}, {"task_type": "CAUSAL_LM"}, "two arrays"),
        (CAUSAL | {"model_type": "new"}, {}, {}, "error: of the type 'new'"),
        ({"architectures": ["NewForCausalLM"]}, {}, {}, "error: of the type None"),
        ({}, {}, {}, "error: name the class in its architectures"),
        (CAUSAL | {"is_encoder_decoder": True}, {}, {}, "error: that share their embedding"),
        (CAUSAL | {"text_config": {"vocab_size": 9}}, {}, {}, "error: has several parts"),
        (None, {}, {}, "error: give the base's folder, with its config.json"),
        (None, HEAD, {}, ""),
        (None, {}, {"task_type": "FEATURE_EXTRACTION"}, ""),
        (CAUSAL, {}, {"ensure_weight_tying": True}, "error: holds nothing for the head"),
    ],
)
def test_what_an_embedding_is_tied_to(
    language_model, call, tmp_path, config, arrays, adapter, expected
):
    code, out = call("merge", *language_model(config, arrays, **adapter), tmp_path / "m")
    if expected.startswith("error: "):
        assert code == 1
        assert expected.removeprefix("error: ") in out
        assert not (tmp_path / "m").exists()
        return
    assert code == 0, out
    merged = Tensors(tmp_path / "m" / "model.safetensors")
    E = np.eye(9, 4, dtype=np.float32)
    assert np.array_equal(merged["model.embed_tokens.weight"], E + 8)
    if expected:
        assert expected in out
        assert np.array_equal(merged["lm_head.weight"], E)
        said = json.loads((tmp_path / "m" / "config.json").read_text())
        assert said == config | {"tie_word_embeddings": False}
    else:
        assert set(merged) == {"model.embed_tokens.weight", *arrays}
