"""The front end for Flax Linen: a model is called with adapters as one more argument.

Using a model:

- ``_apply``: ``lora_apply``, ``model.apply`` of the adapted model.
- ``_discover``: ``kernel_axes``, the axes of every kernel from one abstract call.
- ``_init_model``: ``lora_init_model``, ``lora_init`` with the axes found on the way.

Which layers can be adapted, and how they compute:

- ``_entry``: one method of a layer, and the handler that computes it with adapted kernels.
- ``_layers``: the handlers of Flax's own layers.
- ``_packages``: the handlers of layers of other packages.
- ``_handlers``: ``Handlers``, all of these and a user's; and ``register``.

Inside of ``lora_apply``:

- ``_model_call``: calling a model, and what the arguments of the call say.
- ``_place``: adapter nodes in the ``params`` collection, next to their kernels.
- ``_interceptor``: each adapted layer is given to its handler.
- ``_mapped``: parameters that ``nn.map_variables`` maps, which is refused.
- ``_usage``: adapters that were not used, and kernels that are read elsewhere too.

Inside of ``kernel_axes``:

- ``_label``: which parameter a layer has, and which of its axes are left.
- ``_observer``: handlers compute with zeros, and it is noted how.
- ``_heads``: which layers are the output heads.
"""
