"""A model with its names in PyTorch, saved for PEFT, and changes to what is saved."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import safetensors.numpy
from helpers import random_like

import lora_jax
from lora_jax.files._tensors import Tensors

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


class One(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="other")(self.layer(x))


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


def adapted(model, rules, trainable=("head/.*",)):
    params, axes = model
    config = lora_jax.LoraConfig(rules, trainable=trainable)
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config, axes=axes)
    return frozen, random_like(adapters)


def load(folder, model):
    return lora_jax.peft.load(folder, model[0], names=NAMES, axes=model[1])


def edit_config(folder, **change):
    file = folder / "adapter_config.json"
    fields = json.loads(file.read_text()) | change
    file.write_text(json.dumps({k: v for k, v in fields.items() if v != "DROP"}))


def edit_tensors(folder, change):
    tensors = dict(Tensors(folder / FILE))
    change(tensors)
    (folder / FILE).write_bytes(safetensors.numpy.save(tensors))


def keys_of(folder):
    return {k.removeprefix("base_model.model.").split(".lora")[0] for k in Tensors(folder / FILE)}
