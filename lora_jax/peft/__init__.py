"""Adapters to and from PEFT, the format of PyTorch's world.

PEFT's ``lora_A`` is ``U`` transposed, its ``lora_B`` is ``V`` transposed, its
``lora_magnitude_vector`` is ``m``, and its scale is not stored but follows from the config.

    frozen, adapters = lora_jax.peft.load("my-adapter", params, axes=axes)
    lora_jax.peft.save("my-adapter", frozen, adapters)

Its files, from the public functions down:

- ``_load.py``: ``load``, a folder of PEFT as adapters.
- ``_save.py``: ``save``, adapters as a folder of PEFT.
- ``_export.py``: ``lora_jax.export``, the merged model as a safetensors file.
- ``_to_nodes.py``: tensors of PEFT as the nodes of an adapter tree.
- ``_from_nodes.py``: the nodes of an adapter tree as tensors of PEFT.
- ``_plain_variants.py``: other variants as the LoRA or the DoRA that computes the same.
- ``_sort_tensors.py``: tensors by the leaf of the model that they are for; what is missing.
- ``_folder.py``: a folder without a model: its tensors agree with its config.
- ``_refusals.py``: where PEFT would compute something else than the model.
- ``_lora_bias.py``: the node of ``lora_bias``, what is added to a bias.
- ``config/``: ``adapter_config.json``.
- ``torch/``: PyTorch's parameters of a Flax model, and their layout.
- ``names/``: of a parameter in Flax and in PyTorch, and of its tensors in PEFT.
"""

from typing import TYPE_CHECKING

from lora_jax._deprecated import renamed_names as _renamed_names
from lora_jax.peft._load import load
from lora_jax.peft._save import save
from lora_jax.peft.names._families import FAMILIES
from lora_jax.peft.names._key_mapping import KeyMapping

__all__ = ["FAMILIES", "KeyMapping", "load", "save"]

if not TYPE_CHECKING:  # a type checker shall say that there is no such name
    __getattr__ = _renamed_names(__name__, {"Name": KeyMapping})


def __dir__() -> list[str]:
    return sorted([*__all__, "__all__", "__doc__"])
