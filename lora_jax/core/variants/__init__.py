"""The variants, as their papers write them: the reference that everything else must equal.

- ``_variant.py``: what a variant gives (``Variant``), and its normal form ``W' = a (W + s L R)``.
- ``_lora.py``: LoRA.
- ``_dora.py``: DoRA, and its norm without forming ``U V``.
- ``_cached_norm.py``: DoRA whose norm is computed, for inference.
- ``_apply_variant.py``: the functions of a variant, for kernels that are stacked.
- ``_registry.py``: the variants by their names, as rules and files say them.
- ``_check_variant.py``: what is refused of a variant that is not what it says.

``W`` is a Flax kernel of shape ``(d, k)``, input first, and a layer computes ``y = x W``.
"""
