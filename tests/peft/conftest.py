"""A model, and a folder of PEFT for it."""

import pytest
from helpers import random_variables
from peft_folders import IDS, NAMES, RULES, Model, adapted

import lora_jax


@pytest.fixture
def model():
    params = random_variables(Model(), IDS)["params"]
    return params, lora_jax.kernel_axes(Model(), {"params": params}, IDS)


@pytest.fixture
def saved(model, tmp_path):
    frozen, adapters = adapted(model, RULES["dora"])
    lora_jax.peft.save(tmp_path, frozen, adapters, names=NAMES, axes=model[1])
    return tmp_path, frozen, adapters
