"""A pretrained encoder in Flax, two tasks, and the demo that fine-tunes it."""
