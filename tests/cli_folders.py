"""What tests of the command have in common."""

import jax
from helpers import random_like

import lora_jax

KEY = jax.random.key(0)


def with_biases_of_B(split):
    """The same without DoRA, and with what PEFT's lora_bias adds."""
    adapters = {
        name: {
            "kernel": split[1][name]["kernel"].replace(m=None, variant="lora"),
            "bias": lora_jax.LoraBias(random_like(split[0][name]["bias"], scale=1.0), 1.5),
        }
        for name in "ab"
    }
    return split[0], adapters


FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
