"""The command ``lora-jax``: adapters as files, without a model and without an accelerator."""
