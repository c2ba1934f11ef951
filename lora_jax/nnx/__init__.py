"""The front end for Flax NNX: a model with adapters in its layers.

Using a model:

- ``_model.py``: a graphdef and a state, as ``lora_apply`` calls them.
- ``_kernel_axes.py``: an abstract call, in which it is seen which axes the kernels have.
- ``_lora_model.py``: ``lora_model``, a model object that has its adapters as variables;
  ``lora_state`` and ``lora_update`` take them out and put them back.
- ``_adapter_param.py``: the type of these variables.
- ``_model_call.py``: calling a model, and what it is that is called.

Which layers can be adapted, and how they compute:

- ``_flax_layers.py``: the handlers of Flax's own layers.
- ``_third_party_layers.py``: the handlers of layers of other packages.

Inside of these:

- ``_variables.py``: variables and their values, modules and what they have.
- ``_adapted_class.py``: a class for each layer's class, whose methods ask for the adapter.
- ``_in_layers.py``: adapters in layers, next to their kernels.
- ``_calls.py``: what the call that is under way has to do with the kernels of a layer.
"""
