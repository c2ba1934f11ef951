"""Functions of a model, traced: what their results depend on, and how they are mapped over rows.

Nothing here knows which library the model is of.

- ``_arrays_in.py``: the arrays in what a model gives.
- ``_as_given.py``: which inputs come to a place in the function as they are given.
- ``_liveness.py``: which inputs of a traced function its outputs depend on.
- ``_map_rows.py``: a model mapped over the rows of its batch, each with its own adapter.
- ``_row_axes.py``: where arrays have their rows, as a caller says it.
- ``_row_inputs.py``: what the mapped model is given.
- ``_row_results.py``: what the mapped model gives.
"""
