"""Arrays only, no model and no file: the mathematics of an adapter.

From the ground up: the formulas of LoRA and DoRA, the kernel as a matrix, the node of an adapter,
the adapted product and its gradient, the products of a batch of mixed rows, and what a user says in
a ``Rule`` and a ``LoraConfig``. Nothing here knows a Flax module.
"""
