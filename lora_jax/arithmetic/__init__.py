"""Arithmetic of adapters: weighted sums, task vectors, and compression to a lower rank."""
