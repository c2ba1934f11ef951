"""Where PEFT would compute something else than the model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import unflatten_dict
from helpers import random_like, random_variables
from peft_folders import IDS, One

import lora_jax


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
