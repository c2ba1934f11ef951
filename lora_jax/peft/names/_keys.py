"""The keys of PEFT's tensors: what each names in the model, and what is added to that.

``base_model.model.layer.0.query.lora_A.weight`` is the ``A`` of the module ``layer.0.query``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PREFIX = "base_model.model."

# What PEFT calls the layer, or the module, that it wrapped.
BASE_LAYER = ".base_layer"

# How the name of a tensor of an adapter ends, behind the module's name.
_ROLES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
    "lora_B.bias": "bias",
}
# Likewise, as PEFT writes it: of linear layers and convolutions, and of embeddings.
_ENDS = {
    False: {
        "A": "lora_A.weight",
        "B": "lora_B.weight",
        "m": "lora_magnitude_vector",
        "bias": "lora_B.bias",
    },
    True: {"A": "lora_embedding_A", "B": "lora_embedding_B", "m": "lora_magnitude_vector"},
}

# Copies of modules that are fully trained.
_COPY = re.compile(r"\.(original_module|modules_to_save)(?=\.)")

# What wraps a model, or a part of it, and gets into the names: of torch.compile and of FSDP.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# The adapter's name, where PyTorch's own state dict has it.
_ADAPTER_NAME = re.compile(
    r"\.(?:lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"\.(?!(?:weight|bias)$)([^.]+)(?=\.|$)"
)


def adapter_key(module: str, role: str, embedding: bool = False) -> str:
    """The key of a module's ``"A"``, ``"B"``, ``"m"`` or ``"bias"``.

    Example:
      >>> adapter_key("layer.0.query", "A")
      'base_model.model.layer.0.query.lora_A.weight'
    """
    return f"{PREFIX}{module}.{_ENDS[embedding][role]}"


def split_role(name: str) -> tuple[str, str] | None:
    """The module and the role of a tensor of an adapter; ``None`` for other tensors.

    Example:
      >>> split_role("layer.0.query.lora_A.weight"), split_role("score.weight")
      (('layer.0.query', 'A'), None)
    """
    end = next((end for end in _ROLES if name.endswith(f".{end}")), None)
    return None if end is None else (name.removesuffix(f".{end}"), _ROLES[end])


def without_copy(name: str) -> str:
    """The name of a parameter, where this may name a copy of it: trained, or as it was before."""
    return _COPY.sub("", name)


def without_base_layer(name: str) -> str:
    """The name that a parameter of an adapted layer has in the model."""
    return name.replace(f"{BASE_LAYER}.", ".")


def wrapped_module(name: str) -> str:
    """The module of the model that PEFT wrapped, once or several times.

    Example:
      >>> wrapped_module("mlp.experts.base_layer.base_layer")
      'mlp.experts'
    """
    while name.endswith(BASE_LAYER):
        name = name.removesuffix(BASE_LAYER)
    return name


def names_of(keys: Iterable[str], file: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """The keys by what they name in the model, and the parts of keys that name no module of it.

    Args:
      keys: all keys of a file.
      file: which one, for errors.

    Raises:
      ValueError: if there are several adapters, or two keys for one name; if only some keys begin
        as PEFT's do.
    """
    keys = list(keys)
    adapters = sorted({found[1] for key in keys if (found := _ADAPTER_NAME.search(key))})
    if len(adapters) > 1:
        raise ValueError(
            f"{file} has several adapters in one, {', '.join(adapters)}: save each with "
            f"PEFT's save_pretrained."
        )
    names: dict[str, str] = {}
    left_out: dict[str, None] = {f"{adapter}.": None for adapter in adapters}
    bare = not any(PREFIX in key for key in keys)
    for key in keys:
        parts = key.split(".")
        left_out |= dict.fromkeys(f"{part}." for part in parts if part in WRAPPERS)
        name = ".".join(part for part in parts if part not in WRAPPERS)
        if name.startswith(f"module.{PREFIX}"):
            name, left_out["module."] = name.removeprefix("module."), None
        if not (bare or name.startswith(PREFIX)):
            raise ValueError(f"{file}: {key!r} does not begin with {PREFIX!r}.")
        name = name.removeprefix(PREFIX)
        if found := _ADAPTER_NAME.search(name):
            name = name[: found.start(1) - 1] + name[found.end(1) :]
        for adapter in adapters:
            name = name.replace(f".modules_to_save.{adapter}.", ".modules_to_save.")
        if name in names:
            raise ValueError(f"{file}: {key!r} and {names[name]!r} are two of one kind.")
        names[name] = key
    return names, tuple(left_out)
