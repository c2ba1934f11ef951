r"""Measures the library on one GPU, beside what one would use instead, within minutes.

Installs nothing and downloads nothing: it runs with any Python that has JAX for CUDA, Flax, optax,
chex, safetensors and NumPy, and leaves out what needs PyTorch, PEFT or qwix where they are missing.

    python3 -m benchmarks.gpu                        # all cases, the most telling first
    python3 -m benchmarks.gpu --cases serve ranks    # these
    python3 -m benchmarks.gpu --tiny                 # the same programs in small, also on a CPU
    python3 -m benchmarks.gpu --profile decoder      # the most expensive kernels of its steps

Every case is a JSON file in the folder of results, which is written again after each group of
contenders, so that a run that is cut leaves what it had. `python -m benchmarks.report` makes tables
of those that are in `benchmarks/results`.
"""
