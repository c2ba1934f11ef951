"""What an adapter on disk makes of a base on disk.

- ``_merge_peft.py``: an adapter of PEFT.
- ``_merge_lora_jax.py``: an adapter of lora_jax.
- ``_merged_arrays.py``: the merged arrays, computed one at a time, and their rounding.
- ``_prefixes.py``: names of adapter and base that begin differently.
- ``_experts.py``: which parameters adapters of parameters are for.
- ``_head_and_config.py``: what follows from merged arrays for head, tokens and config.
"""
