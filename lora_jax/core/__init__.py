"""Arrays only, no model and no file: the mathematics of an adapter.

Nothing here knows a Flax module. From the ground up:

- ``_numerics.py``: column norms, exact products, dtypes, broadcasting.
- ``_split_product.py``: exact products with a kernel of 16 bits, as it is stored.
- ``variants/``: LoRA and DoRA as the papers write them, the reference for all the rest; and what a
  variant is.
- ``_meshes.py``: arrays whose sharding is a part of their type.
- ``_axes.py``: a kernel of any number of axes as a stack of matrices.
- ``quantized/``: kernels of few bits, which dequantize where they are read.
- ``_boxes.py``: leaves out of their boxes, ``nn.Partitioned`` and the like, and dequantized.
- ``_model_axes.py``: the axes of all kernels of a model.
- ``rules/``: what the user says, and which parameters it is for.
- ``_node.py``: what every node of an adapter tree can do.
- ``_array_node.py``: a node whose arrays are the leaves of its pytree.
- ``_adapter.py``: the node of an adapted kernel: the arrays of its variant, and how they start.
- ``_adapter_stack.py``: the node of several adapters of one kernel, and what each is.
- ``_placement.py``: how the arrays of an adapter are sharded, by the sharding of their kernel.
- ``_fully_trained.py``: the node of a leaf that is trained itself.
- ``products/``: the adapted product of a layer and its gradient.
"""
