"""Arithmetic of adapters.

- ``_combine.py``: several adapters as one (``combine``).
- ``_compress.py``: adapters with a lower rank (``compress``).
- ``_options.py``: the options of both, checked together.
- ``_combine_trees.py``: trees path by path, and what must be alike to be added.
- ``_combine_leaf.py``: the adapters of one kernel, and the values of one fully trained leaf.
- ``_sums.py``: the weighted sum of adapters by their factors, exact.
- ``_task_vectors.py``: TIES, DARE and pruning of dense task vectors.
- ``_low_rank.py``: the nearest matrix of a lower rank, by singular values.
- ``_report.py``: rank and relative error of every adapter of the result.
"""
