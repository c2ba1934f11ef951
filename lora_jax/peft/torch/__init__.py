"""PyTorch's parameters of a Flax model, and their layout; PyTorch itself is not needed.

- ``_layout.py``: one kernel, or its factors, in PyTorch's layout, and back.
- ``_arrays.py``: leaves of a model in PyTorch's layout, and back: stacked and fused ones too.
- ``_torch_model.py``: which PyTorch parameters those of a Flax model are.
- ``_flax_model.py``: the parameters of a Flax model: axes, kinds, ``Conv1D`` or linear.
"""
