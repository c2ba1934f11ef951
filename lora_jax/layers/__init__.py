"""The layers of a model and their adapters, whichever library of Flax the model is of.

Which layers can be adapted, and how they compute:

- ``_entry.py``: a method of a layer, and the handler that computes it with its kernels.
- ``_handlers.py``: ``Handlers``, those of the front ends and a user's; and ``register``.

In a call:

- ``_place_adapters.py``: adapter nodes as they are placed next to their kernels.
- ``_check_use.py``: adapters that were not used, and kernels that are read elsewhere too.

In an abstract call:

- ``_abstract_inputs.py``: the arguments, arrays without values among them.
- ``_axes_seen.py``: handlers compute with zeros, and it is noted how.
- ``_find_axes.py``: the axes of every kernel, from what was seen and what was traced.
- ``_output_heads.py``: which layers are the output heads.
"""
