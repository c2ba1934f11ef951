"""The language model of the examples is SmolLM2, as transformers computes with the same weights."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import relative_error

from examples import chat, smollm2

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.interop

# gemma, which other tests import, replaces it for good, and that does not know FlaxLlama's RMSNorm.
PARAM = nn.Module.param


def test_logits(monkeypatch):
    """Within 1e-5 of those of FlaxLlamaForCausalLM, which knows nothing of GGUF files."""
    monkeypatch.setattr(nn.Module, "param", PARAM)
    try:
        config, params = smollm2.load_pretrained()
    except smollm2.MissingAsset as error:
        pytest.skip(str(error))
    tokens = np.array([chat.prompt(chat.load_tokenizer(), "What is the capital of France?")])
    said = transformers.LlamaConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        intermediate_size=config.hidden,
        rms_norm_eps=config.epsilon,
        max_position_embeddings=256,
    )
    # Its rotary embedding is always of the base 10,000, so for this comparison ours is too.
    config = dataclasses.replace(config, theta=10_000.0)
    model = transformers.FlaxLlamaForCausalLM(said, _do_init=False)
    expected = model(tokens, params=renamed(params)).logits
    logits = jax.jit(smollm2.SmolLM2(config).apply)({"params": params}, tokens)
    assert relative_error(logits, expected) < 1e-5


def renamed(params):
    """The parameters by the names of FlaxLlamaForCausalLM."""
    names = {"attention/": "self_attn/", "attention_norm/scale": "input_layernorm/weight"}
    names |= {"mlp_norm/scale": "post_attention_layernorm/weight"}
    flat = {}
    for path, array in flatten_dict(params, sep="/").items():
        layer, _, rest = path.partition("/")
        if layer.startswith("layer_"):
            for ours, theirs in names.items():
                rest = rest.replace(ours, theirs)
            part = "mlp/" if rest.startswith(("gate", "up", "down")) else ""
            flat[f"model/layers/{layer[6:]}/{part}{rest}"] = array
    flat["model/embed_tokens/embedding"] = params["embed"]["embedding"]
    flat["model/norm/weight"] = params["norm"]["scale"]
    flat["lm_head/kernel"] = jnp.transpose(params["embed"]["embedding"])
    return unflatten_dict(flat, sep="/")
