"""Adapters on disk, of either format.

- ``_open_adapter.py``: an adapter as matrices.
- ``_adapted_matrix.py``: norms and singular values of ``s U V``.
- ``_trees_without_model.py``: trees for :mod:`lora_jax.peft`, without the model.
"""
