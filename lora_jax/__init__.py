"""LoRA and DoRA for Flax, as pure functions over parameter trees.

A model's parameters are split into a frozen base and a small tree of adapters; the adapters
are all that is differentiated, optimized and saved, and the model's own code stays as it is:

    frozen, adapters = lora_jax.lora_init_model(key, model, {"params": params}, config, x)
    y = lora_jax.lora_apply(model, {"params": frozen}, adapters, x)
    params = lora_jax.lora_merge(frozen, adapters)
    lora_jax.save("reviews", adapters)
    frozen, adapters = lora_jax.load("reviews", params)

`combine` adds adapters, and `compress` cuts their rank. `lora_jax.peft` reads and writes PEFT's
files. `lora_init_model` is `kernel_axes`, which finds the `KernelAxes` of every kernel, together a
`ModelAxes`, and then `lora_init(key, params, config, axes=axes)`.
`register` takes a handler for a layer of yours, which computes with an `AdaptedKernel`; `Handlers`
are those of one call.
"""

from typing import TYPE_CHECKING

from lora_jax import peft
from lora_jax._deprecated import renamed_names as _renamed_names
from lora_jax._version import __version__ as __version__
from lora_jax.arithmetic._combine import combine
from lora_jax.arithmetic._compress import compress
from lora_jax.arithmetic._report import Approximation, ApproximationReport
from lora_jax.core._adapter import Adapter
from lora_jax.core._adapter_stack import AdapterStack
from lora_jax.core._axes import KernelAxes
from lora_jax.core._fully_trained import FullyTrained
from lora_jax.core._model_axes import ModelAxes
from lora_jax.core._numerics import column_norm
from lora_jax.core.products._adapted_kernel import AdaptedKernel
from lora_jax.core.products._product_with_U import save_only_xU
from lora_jax.core.quantized._array import QuantizedArray
from lora_jax.core.quantized._quantization import Quantization
from lora_jax.core.rules._config import LoraConfig
from lora_jax.core.rules._rule import Rule
from lora_jax.core.variants._dora import DoRA
from lora_jax.core.variants._lora import LoRA
from lora_jax.core.variants._registry import register_variant
from lora_jax.core.variants._variant import NormalForm, Variant
from lora_jax.files._load import load
from lora_jax.files._save import save
from lora_jax.layers._handlers import Handlers, register
from lora_jax.many._cache_norm import cache_norm
from lora_jax.many._optimizer import per_adapter
from lora_jax.many._pool import AdapterPool
from lora_jax.many._stack import stack, unstack
from lora_jax.models._apply import lora_apply
from lora_jax.models._init_model import lora_init_model
from lora_jax.models._kernel_axes import kernel_axes
from lora_jax.nnx._adapter_param import AdapterParam
from lora_jax.nnx._lora_model import lora_model, lora_state, lora_update
from lora_jax.peft._export import export
from lora_jax.peft._lora_bias import LoraBias
from lora_jax.quantized._dequantize import dequantize
from lora_jax.quantized._loftq import LoftQReport, QuantizationError, loftq
from lora_jax.quantized._quantize import quantize
from lora_jax.trees._init import lora_init
from lora_jax.trees._merge import lora_merge
from lora_jax.trees._rounding import Rounding, RoundingReport, rounding
from lora_jax.trees._shardings import shardings
from lora_jax.trees._summary import summary
from lora_jax.trees._summary_report import Summary

__all__ = [
    "AdaptedKernel",
    "Adapter",
    "AdapterParam",
    "AdapterPool",
    "AdapterStack",
    "Approximation",
    "ApproximationReport",
    "DoRA",
    "FullyTrained",
    "Handlers",
    "KernelAxes",
    "LoRA",
    "LoftQReport",
    "LoraBias",
    "LoraConfig",
    "ModelAxes",
    "NormalForm",
    "Quantization",
    "QuantizationError",
    "QuantizedArray",
    "Rounding",
    "RoundingReport",
    "Rule",
    "Summary",
    "Variant",
    "cache_norm",
    "column_norm",
    "combine",
    "compress",
    "dequantize",
    "export",
    "kernel_axes",
    "load",
    "loftq",
    "lora_apply",
    "lora_init",
    "lora_init_model",
    "lora_merge",
    "lora_model",
    "lora_state",
    "lora_update",
    "peft",
    "per_adapter",
    "quantize",
    "register",
    "register_variant",
    "rounding",
    "save",
    "save_only_xU",
    "shardings",
    "stack",
    "summary",
    "unstack",
]

if not TYPE_CHECKING:  # a type checker shall say that there is no such name
    __getattr__ = _renamed_names(
        __name__,
        {
            "Shift": LoraBias,
            "Whole": FullyTrained,
            "each_adapter": per_adapter,
            "freeze_norm": cache_norm,
        },
    )


def __dir__() -> list[str]:
    return sorted([*__all__, "__all__", "__doc__", "__version__"])
