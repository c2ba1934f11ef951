"""Many adapters of one base: mixed batches, switches, training side by side, memory.

    python -m benchmarks.many

JAX is measured in this process and PEFT in another, in turn; the one waits while the other works.
"""
