"""Names: of a parameter in Flax and in PyTorch, and of its tensors in PEFT.

- ``_key_mapping.py``: a name in Flax and in PyTorch (``KeyMapping``).
- ``_families.py``: ``FAMILIES``, the names of well-known models.
- ``_templates.py``: names with placeholders, matched and filled in.
- ``_keys.py``: the keys of PEFT's tensors: what is added to the names of a model.
- ``_targets.py``: PEFT's name for what it adapts.
"""
