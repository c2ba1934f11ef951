"""``adapter_config.json`` of PEFT.

- ``_read.py``: it is read and checked.
- ``_write.py``: it is written.
- ``_module_config.py``: what it says of a module: rank, alpha, whether it is adapted.
- ``_patterns.py``: its patterns of module names.
"""
