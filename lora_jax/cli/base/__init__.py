"""The base on disk that an adapter is merged into, where no model says what it is.

- ``_model.py``: what its config says of the model.
- ``_vocabulary_arrays.py``: embeddings and heads, by their names.
- ``_tied.py``: an embedding that is the head too.
- ``_layouts.py``: how it stores its weights, ``(in, out)`` or ``(out, in)``.
- ``_fits_base.py``: what is asked of it before anything is merged into it.
- ``_base_at_start.py``: the base as it was when the training began.
"""
