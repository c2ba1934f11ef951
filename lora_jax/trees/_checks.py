"""What every function asks of a base and of adapters: each looks here, before it computes.

A base is nested dicts of arrays. A tree of adapters has an :class:`Adapter` or a :class:`LoraBias`
beside leaves of the base, and leaves that are fully trained, which the base lacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import empty_node

from lora_jax._compat import is_traced
from lora_jax.core._adapter import Adapter, FullyTrained, LoraBias
from lora_jax.core._matching import nearest_paths
from lora_jax.core._variants import VARIANTS
from lora_jax.trees._paths import Key, flatten, path_of, unbox

# Names that Flax gives to collections beside "params".
_COLLECTIONS = ("batch_stats", "cache", "intermediates", "losses", "params_axes", "perturbations")
# Names that Flax gives to parameters, and never to modules.
_PARAMETERS = ("kernel", "bias", "scale", "embedding")
_FILE = (
    "A tree read from a file has arrays only: load it into the tree that lora_init gives for the "
    "same config, as with flax.serialization.from_bytes."
)


def base_of(params: chex.ArrayTree, name: str = "frozen") -> dict[Key, Any]:
    """The leaves of a base, or of all parameters, by their keys; empty dicts among them.

    Raises:
      TypeError: no nested dict, or one with adapters in it.
      ValueError: all of a model's variables.
    """
    flat = flatten(params, name)
    if "params" in params and set(params) <= {"params", *_COLLECTIONS}:
        raise ValueError(
            f"{name} must be the 'params' collection alone: pass variables['params'], not the "
            f"whole dict of variables. Of other collections lora_jax.save takes those that "
            f"training changed, by collections=."
        )
    for key, leaf in flat.items():
        if isinstance(leaf, Adapter | LoraBias | FullyTrained):
            raise TypeError(
                f"The base has adapters in it, as at {path_of(key)!r}: {name} must be parameters "
                f"alone. It comes first, then the adapters: were they swapped?"
            )
    return flat


def nodes_of(
    adapters: chex.ArrayTree,
    name: str = "adapters",
    base: Mapping[Key, Any] | None = None,
) -> dict[Key, Any]:
    """The nodes of a tree of adapters by their keys: adapters, shifts, fully trained leaves.

    Args:
      adapters: the tree.
      name: for messages.
      base: the leaves of the base, where it is known.

    Raises:
      TypeError: no nested dict; a node of another kind; a tree as files have it, of arrays only.
      ValueError: a node that is not floating-point.
    """
    nodes = {key: node for key, node in flatten(adapters, name).items() if node is not empty_node}
    _check_restored(nodes, name, base)
    for key, node in nodes.items():
        path = path_of(key)
        if isinstance(node, Adapter | LoraBias):
            for field, array in vars(node).items():
                if field in ("U", "V", "m", "value") and array is not None:
                    check_floating(f"{path}.{field}", array, f"{name} has")
            if isinstance(node, Adapter):
                _check_variant(path, node)
            continue
        if dtype_of(node) is None:
            raise TypeError(
                f"{name} has {node!r} at {path!r}, which is neither an adapter nor an array."
            )
        check_trainable(path, node)
    return nodes


def pair_of(
    frozen: chex.ArrayTree,
    adapters: chex.ArrayTree,
    count: int | None = None,
    *,
    either: bool = False,
) -> tuple[dict[Key, Any], dict[Key, Any]]:
    """The leaves of a base and the nodes of the adapters that are for it, by their keys.

    Args:
      frozen: the base, as :func:`lora_jax.lora_init` returns it.
      adapters: the adapters.
      count: how many adapters there are, where they are stacked.
      either: whether the base may be all parameters too, leaves that are fully trained among them.

    Raises:
      TypeError: as :func:`base_of` and :func:`nodes_of`.
      ValueError: likewise; adapters that do not fit this base, and leaves that are in both.
    """
    base = base_of(frozen)
    nodes = nodes_of(adapters, base=base)
    for key, node in nodes.items():
        check_node(key, node, base, count)
        in_base = base.get(key, empty_node) is not empty_node
        if in_base and not either and not isinstance(node, Adapter | LoraBias):
            raise ValueError(
                f"{path_of(key)!r} is in the base and, fully trained, in the adapters. Pass the "
                f"frozen tree that lora_init returned, not the full parameters."
            )
    return base, nodes


def check_node(
    key: Key, node: Any, base: Mapping[Key, Any], count: int | None = None, name: str = "frozen"
) -> None:
    """Errors where a node is not for this base: the frozen tree, or all of a model's parameters."""
    path, leaf = path_of(key), base.get(key, empty_node)
    if isinstance(node, Adapter | LoraBias):
        if leaf is empty_node:
            paths = [path_of(key) for key, leaf in base.items() if leaf is not empty_node]
            raise ValueError(
                f"There is an adapter for {path!r}, which {name} lacks. Were the adapters made for "
                f"another model? Nearest paths: {', '.join(nearest_paths(path, paths)) or 'none'}."
            )
        check_fits(path, leaf, node, count)
    elif leaf is not empty_node:
        check_floating(path, leaf)
        found = tuple(unbox(node.value if isinstance(node, FullyTrained) else node).shape)
        shape = tuple(unbox(leaf).shape)
        if count is None and found != shape:
            raise ValueError(
                f"{path!r} was fully trained as {found}, but {name} has {shape} there. Was it made "
                f"for another model?"
            )


def check_fits(path: str, leaf: Any, adapter: Adapter | LoraBias, count: int | None = None) -> None:
    """Errors where an adapter, or a stack of so many, is not for a kernel of this shape."""
    check_floating(path, leaf)
    shape = tuple(unbox(leaf).shape)
    if isinstance(adapter, LoraBias):
        found = tuple(adapter.value.shape)
        if found != shape:
            raise ValueError(
                f"What is added to {path!r} is {found}, but the base has {shape} there. Was it "
                f"made for another model?"
            )
        return
    if len(shape) != adapter.axes.ndim:
        raise ValueError(
            f"The adapter for {path!r} is for a kernel of {adapter.axes.ndim} axes, but the base "
            f"has {shape} there. Was it made for another model?"
        )
    _check_variant(path, adapter)
    try:
        shapes = adapter.shapes(shape)
    except ValueError as error:
        raise ValueError(f"The adapter for {path!r} does not fit: {error}") from None
    for name, expected in shapes.items():
        found = tuple(getattr(adapter, name).shape)
        if count is not None:
            expected = (count, *expected)
        if found[1:] == expected and count is None:
            raise ValueError(
                f"The adapter for {path!r} is a stack of {found[0]}. Say which one each example of "
                f"the batch shall have, lora_apply(..., adapter_ids=ids), or take one alone: "
                f"jax.tree.map(lambda x: x[i], stacked)."
            )
        if found != expected:
            raise ValueError(
                f"The adapter for {path!r} does not fit the kernel {shape}: {name} is {found}, "
                f"but should be {expected}. Was it made for another model?"
            )


def check_factors(path: str, adapter: Adapter, name: str) -> None:
    """Errors where U and V are not those of one adapter."""
    U, V = np.shape(adapter.U), np.shape(adapter.V)
    if U[:-2] != V[:-2] or not U[-1] == V[-2] == adapter.rank:
        raise ValueError(
            f"{name} has U {U} and V {V} at {path!r}, which are not of one stack and of rank "
            f"{adapter.rank}."
        )


def check_merges(path: str, adapter: Adapter | LoraBias) -> None:
    """Errors for an adapter that no merged parameter is equal to."""
    if isinstance(adapter, Adapter) and adapter.untied:
        raise ValueError(
            f"The adapter of {path!r} has tied='untie': it adapts one of several uses of the "
            f"parameter, so no merged parameter gives the same model."
        )


def check_floating(path: str, leaf: Any, what: str = "the base has") -> None:
    """Errors where a leaf is no array of real numbers, as the codes of a quantized base are."""
    dtype = dtype_of(leaf)
    if dtype is None:
        raise TypeError(
            f"{what} {leaf!r} at {path!r}, which is not one array of numbers: dequantize a "
            f"quantized base first."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{what} {dtype} at {path!r}, which is not floating-point. Integers may be the codes "
            f"of a quantized base, whose scale is elsewhere: dequantize it first."
        )


def check_trainable(path: str, leaf: Any) -> None:
    """Errors where a leaf cannot be fully trained, or was, and could not go back into its dtype."""
    dtype = jnp.dtype(leaf.dtype) if isinstance(leaf, FullyTrained) else dtype_of(leaf)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{path!r} cannot be fully trained: it is {dtype}, not floating-point.")


def dtype_of(leaf: Any) -> np.dtype[Any] | None:
    """The dtype of a leaf in or without a box; ``None`` where it is not one array."""
    arrays = jax.tree.leaves(leaf)
    if len(arrays) != 1 or not hasattr(arrays[0], "shape"):
        return None
    try:
        dtype: np.dtype[Any] = jnp.dtype(arrays[0].dtype)
    except (AttributeError, TypeError):  # of another library, or a key
        return None
    return dtype


def stack_size(adapters: Any, what: str) -> int:
    """How many adapters are stacked in a tree.

    Args:
      adapters: of adapters, or of anything that has their arrays, such as gradients.
      what: is for stacked adapters, for the message.

    Raises:
      ValueError: its arrays do not have one first size, or an adapter is alone.
    """
    alone = [
        node
        for node in jax.tree.leaves(adapters, is_leaf=lambda x: isinstance(x, Adapter))
        if isinstance(node, Adapter) and node.count is None and np.ndim(node.U) == node.ndim
    ]
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(adapters)}
    if alone or len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"{what} for stacked adapters, of which every array has the number of adapters as its "
            f"first size, and here these are {sorted(sizes)}: stack them with "
            f"lora_jax.stack([...])."
        )
    return int(sizes.pop()[0])


def is_finite(array: Any) -> bool:
    """Whether all of an array is finite; what is traced or elsewhere can't be checked."""
    if is_traced(array) or not getattr(array, "is_fully_addressable", True):
        return True
    with jax.ensure_compile_time_eval():  # an array that a jitted function closes over is known
        return bool(jnp.isfinite(jnp.asarray(array)).all())


def _check_variant(path: str, adapter: Adapter) -> None:
    """Errors where an adapter has no arrays of its variant."""
    if adapter.variant not in VARIANTS:
        raise ValueError(
            f"The adapter for {path!r} is of variant {adapter.variant!r}; there are "
            f"{', '.join(VARIANTS)}."
        )
    if (adapter.m is None) != (VARIANTS[adapter.variant].magnitude is None):
        has = "no m" if adapter.m is None else "an m"
        raise ValueError(
            f"The adapter for {path!r} is of variant {adapter.variant!r}, but has {has}. Was it "
            f"saved with another variant?"
        )


def _check_restored(nodes: Mapping[Key, Any], name: str, base: Mapping[Key, Any] | None) -> None:
    """Errors for the arrays of an adapter in a dict, as they come from a file without a target."""
    inside: dict[Key, dict[str, Any]] = {}
    dicts = {key[:n] for key in base or () for n in range(1, len(key))}
    for key, node in nodes.items():
        if key in dicts:
            raise ValueError(
                f"{name} has {path_of(key)!r} as a leaf, and the base has parameters in it. Was it "
                f"made for another model?"
            )
        inside.setdefault(key[:-1], {})[key[-1]] = node
        for above in (key[:n] for n in range(1, len(key))):
            if base is not None and base.get(above, empty_node) is not empty_node:
                raise TypeError(
                    f"{name} has {path_of(key)!r}, where the base has a parameter "
                    f"{path_of(above)!r}. {_FILE}"
                )
    structured = any(isinstance(node, Adapter | LoraBias | FullyTrained) for node in nodes.values())
    boxes = any(key[-1] == "value" for key in base or ())  # the model's own are in such dicts
    for parent, found in inside.items():
        named = bool(parent) and parent[-1] in _PARAMETERS
        factors = _are_factors(found) and (named or (base is None and not structured))
        if factors or (named and set(found) == {"value"} and not boxes):
            raise TypeError(
                f"{name} has a dict of {' and '.join(map(repr, found))} at "
                f"{path_of(parent) or 'its top'!r}. {_FILE}"
                + (" Where these are parameters of the model, pass the base too." * (base is None))
            )


def _are_factors(found: Mapping[str, Any]) -> bool:
    """Whether arrays have the names and the shapes of one adapter's."""
    if not {"U", "V"} <= set(found) <= {"U", "V", "m"}:
        return False
    U, V = (np.shape(found[name]) for name in ("U", "V"))
    return len(U) == len(V) > 1 and U[:-2] == V[:-2] and U[-1] == V[-2]
