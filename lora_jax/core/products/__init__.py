"""The adapted product of a layer, and its gradient.

The formulas:

- ``_normal_form.py``: ``a``, ``L`` and ``R`` of an adapter, once for a call of the model.
- ``_stack_normal_forms.py``: those of several adapters.
- ``_factored.py``: ``a (x W + s (x U) V)``, and as a sum of outer products.
- ``_dense.py``: ``x K`` with ``K = a (W + s U V)``, and its gradient.
- ``_product.py``: the product of a layer, and which of these computes it.
- ``_mixed_product.py``: the product of a layer whose rows have different adapters.

What they are made of:

- ``_einsum_equation.py``: an einsum with a kernel as a matrix product.
- ``_layer_factors.py``: the factors of one layer.
- ``_platform.py``: forms of a computation, of which the program keeps that of its platform.
- ``_tuning.py``: what is chosen by, for each platform.
- ``_skinny_matmul.py``: products with the thin factors, in the layout that a platform wants.
- ``_product_with_U.py``: ``x U`` under a name, and the policy of remat that keeps it.
- ``_dequantized.py``: what is computed of a quantized kernel, which is not kept.
- ``_shared_input.py``: the input that several layers read.
- ``_row_ids.py``: which of several adapters each row of a batch has.
- ``_row_factors.py``: the factors of the rows, gathered or one-hot.

For layers:

- ``_adapted_kernel.py``: the kernel that a layer's handler gets (``AdaptedKernel``).
- ``_dropout_mask.py``: dropout of the input of the factors.
- ``_observer.py``: what is told how a handler uses a kernel.
"""
