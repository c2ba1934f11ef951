"""Kernels of few bits, which dequantize where they are read.

- ``_quantization.py``: how a kernel is quantized, as a user says it (``Quantization``).
- ``_kinds.py``: the numbers that codes stand for: NF4, integers, floats of 8 bits.
- ``_blocks.py``: blocks of a kernel, each with a scale of its own.
- ``_packed.py``: two codes of 4 bits in one byte.
- ``_array.py``: the leaf (``QuantizedArray``), and what it dequantizes to.
- ``_encode.py``: a leaf of a kernel.
"""
