"""Arrays only, no model and no file: the mathematics of an adapter.

Nothing here knows a Flax module. From the ground up:

- ``_hints.py``: what the likeliest mistakes are told.
- ``_meshes.py``: arrays whose sharding is a part of their type.
- ``_variants.py``: LoRA and DoRA as the papers write them, the reference for all the rest.
- ``_axes.py``: a kernel of any number of axes as a stack of matrices.
- ``_model_axes.py``: the axes of all kernels of a model.
- ``_rule.py``: one rule, which kernels are adapted and how.
- ``_config.py``: the rules, and the leaves that are fully trained.
- ``_matching.py``: which rule each path has.
- ``_adapter.py``: the nodes of an adapter tree, and how they start.
- ``_equation.py``: an einsum with a kernel as a matrix product.
- ``_skinny.py``: products with the thin factors, and what they need on CPUs.
- ``_norm.py``: DoRA's norm without forming ``U V``, and with it.
- ``_layer_factors.py``: the factors of one layer.
- ``_factored.py``: ``a (x W + s (x U) V)``, and as a sum of outer products.
- ``_dense.py``: ``x K`` with ``K = a (W + s U V)``, and its gradient.
- ``_product.py``: the product of a layer, and which of these computes it.
- ``_ids.py``: which of several adapters each row of a batch has.
- ``_row_factors.py``: the factors of the rows, gathered or one-hot.
- ``_mixed.py``: the product of a layer whose rows have different adapters.
- ``_observer.py``: what is told how a handler uses a kernel.
- ``_kernel.py``: the kernel that a layer's handler gets.
"""
