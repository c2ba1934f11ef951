"""Adapters to and from PEFT, the format of PyTorch's world.

PEFT's ``lora_A`` is ``U`` transposed, its ``lora_B`` is ``V`` transposed, its
``lora_magnitude_vector`` is ``m``, and its scale is not stored but follows from the config.

    frozen, adapters = lora_jax.peft.load("my-adapter", params, axes=axes)
    lora_jax.peft.save("my-adapter", frozen, adapters)
"""

from lora_jax._renamed import renamed_names
from lora_jax.peft._families import FAMILIES
from lora_jax.peft._key_mapping import KeyMapping
from lora_jax.peft._load import load
from lora_jax.peft._save import save

__all__ = ["FAMILIES", "KeyMapping", "load", "save"]

__getattr__ = renamed_names(__name__, {"Name": KeyMapping})
