"""The front end for Flax Linen: a model is called with adapters as one more argument.

Using a model:

- ``_apply.py``: ``lora_apply``, ``model.apply`` of the adapted model.
- ``_kernel_axes.py``: ``kernel_axes``, the axes of every kernel from one abstract call.
- ``_init_model.py``: ``lora_init_model``, ``lora_init`` with the axes found on the way.

Which layers can be adapted, and how they compute:

- ``_handler_entry.py``: a method of a layer, and the handler that computes it with its kernels.
- ``_flax_layers.py``: the handlers of Flax's own layers.
- ``_third_party_layers.py``: the handlers of layers of other packages.
- ``_handlers.py``: ``Handlers``, all of these and a user's; and ``register``.

Inside of ``lora_apply``:

- ``_model_call.py``: calling a model, and what it is that is called.
- ``_dropout_is_active.py``: whether adapters have their dropout in a call.
- ``_place_adapters.py``: adapter nodes in the ``params`` collection, next to their kernels.
- ``_interceptor.py``: each adapted layer is given to its handler.
- ``_refuse_mapped.py``: parameters that ``nn.map_variables`` maps, which is refused.
- ``_check_use.py``: adapters that were not used, and kernels that are read elsewhere too.

Inside of ``kernel_axes``:

- ``_axis_labels.py``: which parameter a layer has, and which of its axes are left.
- ``_axes_observer.py``: handlers compute with zeros, and it is noted how.
- ``_output_heads.py``: which layers are the output heads.
"""
