"""What the user says, and what he is told when it cannot be meant so."""

import pytest

import lora_jax


def test_config_is_hashable_and_immutable():
    config = lora_jax.LoraConfig([lora_jax.Rule("x", 8, batch_axes=[0])], trainable=["y"])
    assert hash(config) == hash(
        lora_jax.LoraConfig([lora_jax.Rule("x", 8, batch_axes=(0,))], trainable=["y"])
    )


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({}, ValueError, "would train nothing"),
        ({"rules": lora_jax.Rule("x", 2)}, TypeError, r"is a list; write rules=\["),
        ({"rules": [".*/kernel"]}, TypeError, r"'\.\*/kernel', which is not a Rule"),
        ({"trainable": "head/.*"}, TypeError, r"is a list; write trainable=\['head/\.\*'\]"),
        ({"trainable": ["["]}, ValueError, r"'\[' is not a valid regular expression"),
    ],
)
def test_bad_configs(arguments, error, match):
    with pytest.raises(error, match=match):
        lora_jax.LoraConfig(**arguments)
