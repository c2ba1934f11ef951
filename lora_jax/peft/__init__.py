"""Adapters to and from PEFT, the format of PyTorch's world.

PEFT's ``lora_A`` is ``U`` transposed, its ``lora_B`` is ``V`` transposed, its
``lora_magnitude_vector`` is ``m``, and its scale is not stored but follows from the config.

    frozen, adapters = lora_jax.peft.load("my-adapter", params, axes=axes)
    lora_jax.peft.save("my-adapter", frozen, adapters)

Its files, from the public functions down:

======================  ==========================================================================
``_load.py``            ``load``: a folder of PEFT as adapters
``_save.py``            ``save``: adapters as a folder of PEFT
``_export.py``          ``lora_jax.export``: the merged model as a safetensors file
``_to_nodes.py``        tensors of PEFT as the nodes of an adapter tree
``_from_nodes.py``      the nodes of an adapter tree as tensors of PEFT
``_lora_bias.py``       the node of ``lora_bias``: what is added to a bias
``_sort_tensors.py``    tensors by the leaf of the model that they are for; what is missing
``_folder.py``          a folder without a model: its tensors agree with its config
``_keys.py``            the keys of tensors: what is added to the names of a model
``_config.py``          what ``adapter_config.json`` says of a module
``_read_config.py``     ``adapter_config.json`` read and checked
``_write_config.py``    ``adapter_config.json`` written
``_patterns.py``        patterns of module names in the config
``_targets.py``         what PEFT calls that which it adapts
``_refusals.py``        where PEFT would compute something else than the model
``_torch_arrays.py``    leaves of a model in PyTorch's layout, and back
``_torch_model.py``     the PyTorch parameters that those of a Flax model are
``_flax_model.py``      the parameters of a Flax model: axes, kinds, ``Conv1D`` or linear
``_torch_layout.py``    one kernel, or its factors, in PyTorch's layout, and back
``_families.py``        ``FAMILIES``: names that are known by their family
``_key_mapping.py``     ``KeyMapping``: a name in Flax and in PyTorch
``_templates.py``       names with placeholders, matched and filled in
======================  ==========================================================================
"""

from lora_jax._renamed import renamed_names as _renamed_names
from lora_jax.peft._families import FAMILIES
from lora_jax.peft._key_mapping import KeyMapping
from lora_jax.peft._load import load
from lora_jax.peft._save import save

__all__ = ["FAMILIES", "KeyMapping", "load", "save"]

__getattr__ = _renamed_names(__name__, {"Name": KeyMapping})
