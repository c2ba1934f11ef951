"""The front end for Flax Linen: adapters stand in a model's variables.

- ``_model.py``: a model and its variables, as ``lora_apply`` calls them.
- ``_model_call.py``: calling a model, and what it is that is called.
- ``_dropout_is_active.py``: whether adapters have their dropout in a call.

Which layers can be adapted, and how they compute:

- ``_flax_layers.py``: the handlers of Flax's own layers.
- ``_third_party_layers.py``: the handlers of layers of other packages.

Inside of a call:

- ``_params.py``: adapter nodes in the ``params`` collection, next to their kernels.
- ``_interceptor.py``: each adapted layer is given to its handler.
- ``_layer_output.py``: the output of a layer by its handler.
- ``_refuse_mapped.py``: parameters that ``nn.map_variables`` maps, which is refused.

Inside of ``kernel_axes``:

- ``_kernel_axes.py``: an abstract call of a model.
- ``_axis_labels.py``: which parameter a layer has, and which of its axes are left.
- ``_axes_observer.py``: an interceptor that tells what each layer does with its kernels.
"""
