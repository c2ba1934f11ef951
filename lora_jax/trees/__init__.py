"""Pure functions over parameter trees.

The functions:

- ``_init.py``: splits parameters into a frozen base and adapters (``lora_init``).
- ``_merge.py``: merges base and adapters into plain parameters (``lora_merge``).
- ``_rounding.py``: what merging loses in 16 bits, and stochastic rounding (``rounding``).
- ``_shardings.py``: where adapters are on a mesh (``shardings``), and puts them there.
- ``_summary.py``: counts what is trained and what is not (``summary``).
- ``_summary_report.py``: the report that ``summary`` returns, and its text.

What they are made of:

- ``_pair.py``: the base and the adapters leaf by leaf, and all checks that they fit.
- ``_base_hash.py``: the hash of a kernel that a variant has changed.
- ``_refuse_plain_arrays.py``: refuses adapters whose arrays are in plain dicts.
- ``_leaves.py``: one leaf: its dtype, and whether it is floating-point and finite.
- ``_quantized_leaf.py``: a quantized kernel in the box, or the variable, that the kernel was in.
- ``_qwix_leaf.py``: a kernel that qwix has quantized, as a leaf of ours.
- ``_states.py``: ``nnx.State`` as a tree.
- ``_paths.py``: nested dicts by the paths of their leaves.
- ``_resolve_axes.py``: which axes of a matched kernel are inputs, outputs and batch.
- ``_stack_size.py``: how many adapters are stacked in a tree.
- ``_table.py``: rows as plain text.
"""
