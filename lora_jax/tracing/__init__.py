"""Functions of a model, traced: what their results depend on, and how they are mapped over rows.

Nothing here knows which library the model is of.

- ``_arrays``: the arrays in what a model gives.
- ``_liveness``: which inputs of a traced function its outputs depend on.
- ``_rows``: a model mapped over the rows of its batch, each with an adapter of its own.
- ``_row_axes``: where arrays have their rows, as a caller says it.
- ``_row_inputs``: what the mapped model is given.
- ``_row_results``: what the mapped model gives.
"""
