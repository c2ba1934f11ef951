"""The command ``lora-jax``: adapters as files, without a model and without an accelerator.

Its files, from the command down:

- ``__main__.py``: the command and its exit code.
- ``_commands/``: the commands, one a file.
- ``_arguments.py``: the arguments that several commands have.
- ``_printing.py``: tables, lines and bars of progress.
- ``_open_adapter.py``: an adapter of either format, as matrices.
- ``_adapted_matrix.py``: norms and singular values of ``s U V``.
- ``_trees_without_model.py``: trees for :mod:`lora_jax.peft`, without the model.
- ``_head_and_config.py``: what follows from merged arrays for head, tokens and config.
- ``_merge_peft.py``: what an adapter of PEFT makes of the arrays of a base.
- ``_merge_lora_jax.py``: what an adapter of lora_jax makes of them.
- ``_merged_arrays.py``: merged arrays, computed one at a time, and their rounding.
- ``_prefixes.py``: names of adapter and base that begin differently.
- ``_experts.py``: which parameters adapters of parameters are for.
- ``_layouts.py``: how a base stores its weights, ``(in, out)`` or ``(out, in)``.
- ``_base_at_start.py``: a base as it was when the training began.
- ``_fits_base.py``: what a base must be before anything is merged into it.
- ``_tied.py``: an embedding that is the head too.
- ``_model.py``: what the config says of the model of a base.
- ``_vocabulary_arrays.py``: embeddings and heads, by their names.
"""
