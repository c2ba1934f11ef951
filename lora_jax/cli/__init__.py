"""The command ``lora-jax``: adapters as files, without a model and without an accelerator.

- ``__main__.py``: the command and its exit code.
- ``commands/``: the commands, one a file.
- ``_arguments.py``: the arguments that several commands have.
- ``_printing.py``: tables, lines and bars of progress.
- ``adapters/``: adapters on disk, of either format.
- ``base/``: the base on disk, where no model says what it is.
- ``merging/``: what an adapter makes of a base.
"""
