"""Something next to the kernels of a model's layers, and the classes that look there.

What is put next to a kernel is a variable of the kernel's own type, so that transforms of NNX
slice, carry and broadcast it as they do with the kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx

from lora_jax.layers._handlers import Handlers
from lora_jax.layers._place_adapters import Placed
from lora_jax.nnx._adapted_class import adapted_class, own_class, set_class
from lora_jax.nnx._calls import SUFFIX
from lora_jax.nnx._variables import modules_of, variables_in, variables_of
from lora_jax.trees._paths import Key
from lora_jax.trees._quantized_leaf import is_quantized_variable


def put_beside(model: Any, beside: Mapping[Key, Any], handlers: Handlers) -> None:
    """Puts something next to kernels, in every layer that has the kernel.

    Layers with a quantized kernel compute by their handlers too, as these do not keep it.

    Args:
      model: is changed.
      beside: what to put there, by the keys of the kernels. An array that is in the model as it is,
        and no variable, has no place next to it.
      handlers: say which layers can compute with it.
    """
    variables = variables_of(model)
    by_variable = {id(variables[key]): beside[key] for key in beside if key in variables}
    classes: dict[type[Any], Any] = {}
    for _, module in list(modules_of(model)):
        for name, variable in list(variables_in(module)):
            if id(variable) in by_variable:
                placed = by_variable[id(variable)]
                setattr(module, name + SUFFIX, _of_type(type(variable), placed))
            elif not is_quantized_variable(variable):
                continue
            cls = own_class(module)
            if cls not in classes:
                classes[cls] = adapted_class(cls, handlers)
            if classes[cls] is not None:
                set_class(module, classes[cls])


@contextlib.contextmanager
def explained(beside: type[Any] = Placed) -> Iterator[None]:
    """For the time of a call of a model: says what it means if it computes with what we put there.

    Args:
      beside: the class of what was put next to kernels.

    Raises:
      ValueError: if the model does.
    """
    try:
        yield
    except (AttributeError, TypeError) as error:
        if beside.__name__ not in str(error):
            raise
        raise ValueError(
            "The model computes with all variables that it finds in a layer, as nnx.SpectralNorm "
            "does, and next to a kernel there is what lora_jax has put there. Such kernels cannot "
            "be adapted in their layer: make the adapters by lora_jax.lora_init, without axes, and "
            "give these kernels a rule with materialize=True."
        ) from error


def parents_of(model: Any) -> dict[Key, Any]:
    """The modules of a model by their keys."""
    return dict(modules_of(model))


def _of_type(cls: type[Any], value: Any) -> nnx.Variable[Any]:
    """A variable of the type of a kernel, without what else the kernel's own says of itself."""
    does_more = any(hasattr(cls, f"on_{verb}_value") for verb in ("get", "set", "create")) or any(
        getattr(cls, name, None) is not getattr(nnx.Variable, name, None)
        for name in ("get_value", "set_value")
    )
    return nnx.Param(value) if does_more else cls(value)
