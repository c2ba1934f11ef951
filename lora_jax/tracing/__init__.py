"""Functions of a model, traced: what their results depend on, and how they are mapped over rows.

Nothing here knows which library the model is of.
"""
