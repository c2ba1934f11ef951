"""Variables of NNX and their values, modules and what they have, in all versions of Flax."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from lora_jax.trees._paths import Key, flatten, path_of

# What NNX has that is not a plain pytree; nnx.Pytree is not in older versions.
_OBJECTS: tuple[type[Any], ...] = (
    nnx.Variable,
    nnx.Module,
    nnx.Object,
    *([nnx.Pytree] if hasattr(nnx, "Pytree") else []),
)


def has_own_get_value(cls: type[Any]) -> bool:
    """Whether a type of variables says by a method what a layer sees; older ones have hooks."""
    return hasattr(cls, "get_value")


def value_of(variable: Any) -> Any:
    """The value of a variable, as the layer sees it."""
    return variable.get_value() if has_own_get_value(type(variable)) else variable.value


def set_value(variable: Any, value: Any) -> None:
    """Gives a variable another value, as it is stored."""
    if hasattr(type(variable), "set_raw_value"):
        variable.set_raw_value(value)
    else:
        variable.raw_value = value


def raw_value_of(variable: Any) -> Any:
    """The value of a variable as it is stored."""
    if hasattr(type(variable), "get_raw_value"):
        return variable.get_raw_value()
    return variable.raw_value


def copied(tree: Any) -> Any:
    """A copy with the same arrays, whose variables and modules are other objects."""

    def is_object(leaf: Any) -> bool:
        return isinstance(leaf, _OBJECTS)

    def copy(leaf: Any) -> Any:
        return nnx.clone(leaf) if is_object(leaf) else leaf

    return jax.tree.map(copy, tree, is_leaf=is_object)


def arrays_of(tree: Any) -> list[Any]:
    """The arrays of the modules and variables in a tree."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, _OBJECTS))
    found: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, nnx.Variable):
            found.append(raw_value_of(leaf))
        elif isinstance(leaf, _OBJECTS):
            found += [raw_value_of(variable) for variable in variables_of(leaf).values()]
    return found


def modules_of(model: Any) -> Iterator[tuple[Key, nnx.Module]]:
    """The modules of a model, each once, with the paths of their variables in its state."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            yield tuple(map(str, path)), node


def variables_in(module: nnx.Module) -> Iterator[tuple[str, Any]]:
    """The variables that are a module's own attributes, by their names."""
    for name, value in vars(module).items():
        if isinstance(value, nnx.Variable):
            yield name, value


def variables_of(model: Any) -> dict[Key, Any]:
    """The variables of a model by their keys in its state, each once."""
    found: dict[Key, Any] = {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable):
            found[tuple(map(str, path))] = node
    return found


def merged(graphdef: Any, state: Any) -> Any:
    """``nnx.merge``, of a state that has the variables of the model and no others.

    Raises:
      ValueError: if it has not.
    """
    given = set(flatten(state, "state"))
    try:
        model = nnx.merge(graphdef, state)
    except ValueError as error:
        if "leaves" not in str(error):
            raise
        raise ValueError(
            f"The state has {len(given)} variables, which are not those of the model: {error} "
            f"What nnx.split(model, nnx.Param, ...) gives apart is a part of it, "
            f"nnx.merge_state(frozen, rest); what a call has added, as nnx.Intermediate, is not."
        ) from None
    # By the state of the model: the graph has shared variables by other paths in older versions.
    if lacking := sorted(set(flatten(nnx.state(model), "state")) - given):
        raise ValueError(
            f"The model has {path_of(lacking[0])!r}, and the state does not: is it the state of "
            f"another model?"
        )
    return model
