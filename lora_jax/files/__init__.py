"""Files: tensors, checkpoints, and the folder that an adapter is saved in, without a model."""
