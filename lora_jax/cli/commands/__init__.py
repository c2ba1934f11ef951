"""The commands, one a file; each function returns its exit code.

===============  =============================================================
``_inspect.py``  shows what is in an adapter
``_convert.py``  an adapter of lora_jax as one of PEFT, or the other way round
``_merge.py``    an adapter into the safetensors of its base
``_diff.py``     how far two adapters are apart
``_extract.py``  an adapter from a fine-tuned model and its base
``_verify.py``   whether an adapter is complete, and for what base
===============  =============================================================
"""

from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.cli.commands._convert import convert
from lora_jax.cli.commands._diff import diff
from lora_jax.cli.commands._extract import extract
from lora_jax.cli.commands._inspect import inspect
from lora_jax.cli.commands._merge import merge
from lora_jax.cli.commands._verify import verify

COMMANDS: Mapping[str, Callable[..., Any]] = {
    "inspect": inspect,
    "convert": convert,
    "merge": merge,
    "diff": diff,
    "extract": extract,
    "verify": verify,
}
