"""Models of either library of Flax: the three functions that take one.

- ``_front_end.py``: which library a model is of.
- ``_apply.py``: ``lora_apply``, the call of the adapted model.
- ``_kernel_axes.py``: ``kernel_axes``, the axes of every kernel from one abstract call.
- ``_init_model.py``: ``lora_init_model``, ``lora_init`` with the axes found on the way.
"""
