"""Bases of few bits: functions over parameter trees whose kernels are quantized.

- ``_quantize.py``: kernels that match a pattern, quantized (``quantize``).
- ``_dequantize.py``: the base in floats again (``dequantize``).
- ``_loftq.py``: adapters that start at what quantizing has lost (``loftq``).
"""
