"""Adapters as a folder: ``adapter.json``, which says all about them, and a safetensors file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import empty_node

from lora_jax._compat import is_traced
from lora_jax._version import __version__
from lora_jax.core._adapter import Adapter, FullyTrained, LoraBias
from lora_jax.core._axes import KernelAxes
from lora_jax.core._matching import nearest_paths
from lora_jax.core._rule import Rule
from lora_jax.core._variants import VARIANTS
from lora_jax.files import _collections as variables
from lora_jax.files._paths import named, named_pair
from lora_jax.files._tensors import (
    DTYPES,
    StrPath,
    Tensors,
    check_name,
    encode,
    is_floating,
    is_ints,
    json_bytes,
    read_json,
    write_bytes,
)
from lora_jax.trees._checks import base_of, check_fits, check_floating, nodes_of
from lora_jax.trees._paths import path_of, rebox, unbox, unflatten

INDEX = "adapter.json"
FORMAT = "lora_jax adapter"
VERSION = 1

# The fields of an Adapter beside its arrays, and those of its axes, with their types in JSON. What
# has another name here than in files, where names stay:
_NAMES_IN_FILES = {"materialize": "substitute", "batch": "stacks"}
_PRODUCTS_IN_FILES = {"dense": "merged"}
_FIELDS = {
    "variant": str,
    "rank": int,
    "alpha": float,
    "rslora": bool,
    "dropout": float,
    "detach_norm": bool,
    "substitute": bool,
    "untied": bool,
    "product": str,
    "axes": dict,
}
_AXES = tuple(
    _NAMES_IN_FILES.get(field.name, field.name)
    for field in dataclasses.fields(KernelAxes)
    if field.compare
)
_INDEX = {
    "format": str,
    "version": int,
    "library": str,
    "tensors": dict,
    "adapters": dict,
    "whole": dict,
    "base": dict,
    "metadata": dict,
    "checksum": str,
}
# What an index has only where the adapters have such nodes.
_OPTIONAL = {"shifts": dict, "collections": dict}
_TENSORS = re.compile(r"adapter-[0-9a-f]{16}\.safetensors")


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a folder holds.

    Attributes:
      adapters: every :class:`Adapter` and :class:`LoraBias`, and every leaf that was fully trained,
        by its path; leaves that the model has in another dtype are :class:`FullyTrained`.
      base: a hash of every frozen parameter by its path; empty where none were taken.
      metadata: what the user gave to :func:`save`.
      library: version of lora_jax that wrote it.
      collections: the arrays of other collections of the model, by the name of the collection and
        their paths.
    """

    adapters: Mapping[str, Any]
    base: Mapping[str, str]
    metadata: Mapping[str, Any]
    library: str
    collections: Mapping[str, Mapping[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    def adapters_alone(self, path: StrPath) -> Mapping[str, Any]:
        """The adapters, for what has no place for other collections.

        Raises:
          ValueError: there are such collections.
        """
        if self.collections:
            raise ValueError(
                f"{path} has {variables.listed(self.collections)} beside the adapters, which "
                f"training changed, and for which there is no place here: load it in Python, with "
                f"lora_jax.load and collections=."
            )
        return self.adapters


def save(
    path: StrPath,
    adapters: chex.ArrayTree,
    *,
    frozen: chex.ArrayTree | None = None,
    collections: Mapping[str, chex.ArrayTree] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Saves adapters in a folder, with all that is needed to use them again; the base is not in it.

    The folder has ``adapter.json`` and a safetensors file that it names. Whoever loads the folder
    meanwhile, or after a kill at any moment, has all of the old adapters or all of the new ones.
    With several processes let one of them save.

    Args:
      path: the folder; it is made where there is none, and what was saved there is replaced.
      adapters: the adapters, as :func:`lora_jax.lora_init` returned them, trained.
      frozen: the base. With it the adapters are checked to fit, and a hash of every frozen
        parameter is saved, so that :func:`load` can verify that it is given the same base.
      collections: the model's other collections that training changed, as ``mutable=`` returns
        them: ``{"batch_stats": ...}``. They are no part of the base that ``frozen`` is, and
        without them the model does not compute what it did.
      metadata: anything that JSON has; it stands in ``adapter.json`` under that name.

    Raises:
      TypeError: adapters, collections or metadata of another kind.
      ValueError: arrays that are not finite, adapters that do not fit the base, leaves that are in
        both, what this process does not have in full.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=1)])
      >>> frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config)
      >>> folder = tempfile.mkdtemp()
      >>> lora_jax.save(folder, adapters, frozen=frozen)
      >>> frozen, again = lora_jax.load(folder, params, verify=True)
      >>> chex.assert_trees_all_equal(adapters, again)
    """
    entries: dict[str, Any] = {}
    whole: dict[str, str] = {}
    shifts: dict[str, float] = {}
    arrays: dict[str, np.ndarray] = {}
    base: dict[str, Any] = {}
    if frozen is None:
        nodes = named(nodes_of(adapters), "adapters")
    else:
        base, nodes = named_pair(frozen, adapters)
    for leaf_path, node in nodes.items():
        if isinstance(node, LoraBias):
            shifts[leaf_path] = float(node.scale)
            found = {leaf_path: node.value}
        elif isinstance(node, Adapter):
            check_alone(leaf_path, node)
            entries[leaf_path] = _said(node)
            found = {f"{leaf_path}.{name}": getattr(node, name) for name in _names(node.variant)}
        else:
            value = unbox(node.value if isinstance(node, FullyTrained) else node)
            dtype = node.dtype if isinstance(node, FullyTrained) else value.dtype
            whole[leaf_path] = jnp.dtype(dtype).name
            found = {leaf_path: value}
        for name, array in found.items():
            if name in arrays:
                raise ValueError(f"Two arrays would have the name {name!r}.")
            arrays[name] = host(array, name)
        if isinstance(node, Adapter):
            _check_arrays(node, f"adapters: {leaf_path!r}")
    if not arrays:
        raise ValueError("There is nothing to save: adapters is empty.")
    others = {} if collections is None else variables.arrays_of(collections)
    for collection, leaves in others.items():
        for leaf_path, array in leaves.items():
            name = variables.tensor_name(collection, leaf_path)
            if name in arrays:
                raise ValueError(f"Two arrays would have the name {name!r}.")
            arrays[name] = host(array, name)
    for name, array in arrays.items():
        if array.dtype not in DTYPES.values():
            raise ValueError(f"{name!r} is of dtype {array.dtype}, which no safetensors file has.")
    content = encode(arrays)
    folder, file = Path(path), f"adapter-{secrets.token_hex(8)}.safetensors"
    index = {
        "format": FORMAT,
        "version": VERSION,
        "library": __version__,
        "tensors": {"file": file, "sha256": hashlib.sha256(content).hexdigest()},
        "adapters": entries,
        "whole": whole,
        "base": {p: fingerprint(leaf, p) for p, leaf in base.items()},
        "metadata": _checked_metadata(metadata or {}),
    } | ({"shifts": shifts} if shifts else {})
    if others:
        index["collections"] = {name: list(leaves) for name, leaves in others.items()}
    index["checksum"] = _checksum(index)
    folder.mkdir(parents=True, exist_ok=True)
    old, new = _tensors_of(folder), folder / file
    write_bytes(new, content)
    try:
        write_bytes(folder / INDEX, json_bytes(index))
    except BaseException:
        new.unlink()
        raise
    # No other file: a process beside this one may be about to name it.
    if old is not None:
        old.unlink(missing_ok=True)


@overload
def load(
    path: StrPath, params: chex.ArrayTree, *, collections: None = None, verify: bool = False
) -> tuple[chex.ArrayTree, chex.ArrayTree]: ...


@overload
def load(
    path: StrPath,
    params: chex.ArrayTree,
    *,
    collections: Mapping[str, chex.ArrayTree],
    verify: bool = False,
) -> tuple[chex.ArrayTree, chex.ArrayTree, dict[str, chex.ArrayTree]]: ...


def load(
    path: StrPath,
    params: chex.ArrayTree,
    *,
    collections: Mapping[str, chex.ArrayTree] | None = None,
    verify: bool = False,
) -> (
    tuple[chex.ArrayTree, chex.ArrayTree]
    | tuple[chex.ArrayTree, chex.ArrayTree, dict[str, chex.ArrayTree]]
):
    """Loads adapters for a model: as :func:`lora_jax.lora_init`, with trained adapters.

    Args:
      path: the folder that :func:`save` wrote.
      params: the model's ``params`` collection, as for ``lora_init``.
      collections: the model's other collections, as ``model.init`` returns them; ``"params"`` may
        be among them and is passed over. Needed where some were saved.
      verify: compare every frozen parameter with the hash that was saved with the adapters.

    Returns:
      ``(frozen, adapters)``; with ``collections`` ``(frozen, adapters, collections)``, in which
      those that were saved are as they were, and the others as they were given.

    Raises:
      FileNotFoundError: no adapters are there.
      ValueError: files that are damaged, adapters or collections that do not fit this model,
        collections that were saved and not asked for, or, verified, a base that is not the one that
        they were trained on. The message names the file and the parameter.

    Example:
      >>> import tempfile, flax.linen as nn, jax, jax.numpy as jnp, lora_jax
      >>> model, x = nn.BatchNorm(use_running_average=False), jnp.arange(6.0).reshape(3, 2)
      >>> variables = model.init(jax.random.key(0), x)
      >>> config = lora_jax.LoraConfig(trainable=["scale|bias"])
      >>> frozen, adapters = lora_jax.lora_init(jax.random.key(1), variables["params"], config)
      >>> rest = {"batch_stats": variables["batch_stats"]}
      >>> y, changed = lora_jax.lora_apply(
      ...     model, {"params": frozen, **rest}, adapters, x, mutable=["batch_stats"]
      ... )
      >>> folder = tempfile.mkdtemp()
      >>> lora_jax.save(folder, adapters, frozen=frozen, collections=changed)
      >>> frozen, adapters, rest = lora_jax.load(
      ...     folder, variables["params"], collections=variables, verify=True
      ... )
      >>> chex.assert_trees_all_equal(rest, changed)
    """
    stored = read(path)
    if stored.collections and collections is None:
        raise ValueError(
            f"{path} has {variables.listed(stored.collections)} beside the adapters, as training "
            f"changed it. Pass the model's own too, and use what is returned: frozen, adapters, "
            f"collections = lora_jax.load(path, params, collections=variables)."
        )
    flat = base_of(params, "params")
    keys = {path_of(key): key for key, leaf in flat.items() if leaf is not empty_node}
    frozen, adapters = dict(flat), {}
    for leaf_path, node in stored.adapters.items():
        if leaf_path not in keys:
            raise ValueError(
                f"{path} has an adapter for {leaf_path!r}, but params has no such leaf. Is it of "
                f"another model? Nearest paths: "
                f"{', '.join(nearest_paths(leaf_path, keys)) or 'none'}."
            )
        key = keys[leaf_path]
        if isinstance(node, Adapter | LoraBias):
            try:
                check_fits(leaf_path, flat[key], node)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            adapters[key] = jax.tree.map(lambda x: _to_jax(x, str(path)), node)
        else:
            leaf = frozen.pop(key)
            adapters[key] = whole_leaf(leaf_path, node, leaf, str(path))
    if verify:
        _verify(
            stored.base, {path_of(k): v for k, v in frozen.items() if v is not empty_node}, path
        )
    split = unflatten(frozen, params), unflatten(adapters, params)
    if collections is None:
        return split
    others = {
        name: {p: _to_jax(array, str(path)) for p, array in arrays.items()}
        for name, arrays in stored.collections.items()
    }
    return *split, variables.restored(others, collections, str(path))


def read(path: StrPath) -> Stored:
    """What a folder holds, without a model; arrays are NumPy's.

    Raises:
      FileNotFoundError: no adapters are there.
      ValueError: files that are damaged; the message names the file and the key.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> folder = tempfile.mkdtemp()
      >>> save(folder, {"bias": jnp.zeros(2)}, metadata={"task": "reviews"})
      >>> stored = read(folder)
      >>> list(stored.adapters), stored.metadata["task"]
      (['bias'], 'reviews')
    """
    folder = Path(path)
    index = _index(folder)
    while True:
        file = folder / index["tensors"]["file"]
        try:
            tensors = Tensors(file)
            with file.open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
            break
        except FileNotFoundError:
            # Saved anew since the index was read?
            newer = _index(folder)
            if newer["tensors"]["file"] == index["tensors"]["file"]:
                raise FileNotFoundError(f"{file} is missing, which {INDEX} names.") from None
            index = newer
    if found != index["tensors"]["sha256"]:
        raise ValueError(f"{file} is damaged: its SHA-256 is not the one in {INDEX}.")
    return _stored(index, tensors, folder / INDEX)


def fingerprint(leaf: Any, path: str) -> str:
    """A hash of a parameter: its dtype, shape and values; of several arrays, of their hashes."""
    if len(arrays := jax.tree.leaves(leaf)) > 1:
        whole = "".join(fingerprint(array, path) for array in arrays)
        return hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()
    array = host(unbox(leaf), path)
    digest = hashlib.blake2b(f"{array.dtype.name} {array.shape} ".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def host(array: Any, path: str) -> np.ndarray:
    """An array on the host.

    Raises:
      TypeError: no array.
      ValueError: one that this process does not have in full, or that is only traced.
    """
    if is_traced(array):
        raise ValueError(f"{path!r} is traced: files are written and checked outside of jax.jit.")
    if isinstance(array, jax.ShapeDtypeStruct) or not hasattr(array, "dtype"):
        raise TypeError(f"{path!r} is {array!r}, which is no array.")
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{path!r} is a random key, no array: save jax.random.key_data of it.")
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        raise ValueError(
            f"{path!r} is spread over processes: gather it first, as with "
            f"jax.experimental.multihost_utils.process_allgather(adapters, tiled=True)."
        )
    return np.asarray(array)


def check_alone(path: str, adapter: Adapter) -> None:
    """Errors for what is not one adapter with all its facts."""
    if adapter.count is not None:
        raise ValueError(
            f"The adapter of {path!r} is a stack of {adapter.count}: save each one alone, "
            f"jax.tree.map(lambda x: x[i], stacked)."
        )
    if adapter.dropout is None:
        raise ValueError(
            f"The adapter of {path!r} is out of a stack of adapters with several rates of dropout, "
            f"and does not say its own: save it as it was before it was stacked."
        )
    if not VARIANTS[adapter.variant].trained:
        raise ValueError(
            f"The adapter of {path!r} is of cache_norm: save the adapter as it was before, from "
            f"which cache_norm makes it again."
        )


def _names(variant: str) -> tuple[str, ...]:
    return ("U", "V") if VARIANTS[variant].magnitude is None else ("U", "V", "m")


def _said(adapter: Adapter) -> dict[str, Any]:
    """The fields of an adapter, as JSON has them."""
    said = {name: getattr(adapter, _name_here(name)) for name in _FIELDS if name != "axes"}
    said["alpha"], said["dropout"] = float(adapter.alpha), float(adapter.dropout or 0.0)
    said["product"] = _PRODUCTS_IN_FILES.get(adapter.product, adapter.product)
    return said | {"axes": {name: getattr(adapter.axes, _name_here(name)) for name in _AXES}}


def _name_here(name: str) -> str:
    """The field that has a name in files."""
    return next((here for here, there in _NAMES_IN_FILES.items() if there == name), name)


def _checked_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    try:
        same: dict[str, Any] = json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be what JSON has: {error}.") from error
    if same != metadata:
        raise TypeError("metadata must be what JSON has: lists, not tuples; strings for keys.")
    return same


def _checksum(index: Mapping[str, Any]) -> str:
    content = {name: value for name, value in index.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _tensors_of(folder: Path) -> Path | None:
    """The safetensors file that the index of a folder names, where it has one."""
    try:
        return folder / str(_index(folder)["tensors"]["file"])
    except (FileNotFoundError, ValueError):
        return None


def _index(folder: Path) -> dict[str, Any]:
    """The content of ``adapter.json``, of which all but the adapters is checked."""
    file = folder / INDEX
    try:
        index = read_json(file)
    except (FileNotFoundError, NotADirectoryError):
        theirs = (folder / "adapter_config.json").exists()
        raise FileNotFoundError(
            f"There are no adapters in {folder}: {file} is missing."
            + (" It holds an adapter of PEFT, which lora_jax.peft.load reads." if theirs else "")
        ) from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{file} is not of the format {FORMAT!r}.")
    if index.get("version") != VERSION:
        raise ValueError(
            f"{file} is of version {index.get('version')!r} of the format, and this lora_jax reads "
            f"version {VERSION}: install a newer one."
        )
    more = {name: kind for name, kind in _OPTIONAL.items() if name in index}
    _check_types(index, _INDEX | more, str(file))
    if index["checksum"] != _checksum(index):
        raise ValueError(
            f"{file} is damaged, or was edited: its checksum is not that of its content. Save the "
            f"adapters again."
        )
    _check_types(index["tensors"], {"file": str, "sha256": str}, f"{file}: 'tensors'")
    if not _TENSORS.fullmatch(index["tensors"]["file"]):
        raise ValueError(f"{file} names {index['tensors']['file']!r}, which is no file of its own.")
    for name in ("base", "whole"):
        for key, value in index[name].items():
            if not isinstance(value, str):
                raise ValueError(f"{file}: {name!r} has {value!r} for {key!r}, no string.")
    return index


def _check_types(said: object, types: Mapping[str, type], where: str) -> None:
    """Errors where a JSON object has other keys, or values of other types."""
    if not isinstance(said, dict) or set(said) != set(types):
        keys = sorted(said) if isinstance(said, dict) else type(said).__name__
        raise ValueError(f"{where} must have {sorted(types)}, but has {keys}.")
    for name, kind in types.items():
        if type(said[name]) is not kind:
            raise ValueError(f"{where}: {name!r} must be {kind.__name__}, got {said[name]!r}.")


def _stored(index: Mapping[str, Any], tensors: Tensors, file: Path) -> Stored:
    """The adapters that the index describes and the tensors hold, all of them and no more."""
    shifts, others = index.get("shifts", {}), index.get("collections", {})
    expected = set(index["whole"]) | set(shifts)
    for collection, paths in others.items():
        texts = isinstance(paths, list) and all(isinstance(path, str) for path in paths)
        if not texts or len(set(paths)) < len(paths):
            raise ValueError(f"{file}: 'collections' has {paths!r} for {collection!r}, no paths.")
        expected |= {variables.tensor_name(collection, path) for path in paths}
    for path, said in index["adapters"].items():
        where = f"{file}: {path!r}"
        _check_types(said, _FIELDS, where)
        if said["variant"] not in VARIANTS:
            raise ValueError(f"{where}: there is no variant {said['variant']!r}.")
        expected |= {f"{path}.{name}" for name in _names(said["variant"])}
    for name in sorted(expected - set(tensors)):
        raise ValueError(f"{tensors.path} lacks {name!r}, which {file} describes.")
    for name in sorted(set(tensors) - expected):
        raise ValueError(f"{tensors.path} has {name!r}, of which {file} says nothing.")
    adapters: dict[str, Any] = {}
    for path, said in index["adapters"].items():
        arrays = {name: tensors[f"{path}.{name}"] for name in _names(said["variant"])}
        adapters[path] = _adapter(said, arrays, path, f"{file}: {path!r}")
    for path, dtype in index["whole"].items():
        array = tensors[path]
        adapters[path] = array if array.dtype.name == dtype else FullyTrained(array, dtype)
    for path, s in shifts.items():
        adapters[path] = _shift(s, tensors[path], path, f"{file}: {path!r}", adapters)
    collections: dict[str, dict[str, np.ndarray]] = {}
    for collection, paths in others.items():
        collections[collection] = {p: tensors[variables.tensor_name(collection, p)] for p in paths}
    for path in adapters:
        check_name(path, str(file))
        parents = path.split("/")[:-1]
        for i in range(len(parents)):
            if "/".join(parents[: i + 1]) in adapters:
                raise ValueError(f"{file}: {path!r} is inside of another leaf.")
    return Stored(adapters, index["base"], index["metadata"], index["library"], collections)


def _adapter(
    said: Mapping[str, Any], arrays: Mapping[str, np.ndarray], path: str, where: str
) -> Adapter:
    """An adapter, when what is said of it makes sense and its arrays are of one piece."""
    axes = said["axes"]
    if set(axes) != set(_AXES) or type(axes.get("fused")) is not int:
        raise ValueError(f"{where}: axes must have {list(_AXES)}, got {axes}.")
    for name in _AXES:
        if name != "fused" and not is_ints(axes[name]):
            raise ValueError(f"{where}: axes: {name!r} must be integers, got {axes[name]!r}.")
    if not axes["parts"]:  # by default all are, but who says that there are not 10**12?
        raise ValueError(f"{where}: axes: of fused={axes['fused']} kernels no parts are named.")
    products = {there: here for here, there in _PRODUCTS_IN_FILES.items()}
    fields = {_name_here(name): said[name] for name in _FIELDS if name != "axes"}
    fields["product"] = products.get(said["product"], said["product"])
    options = {name: fields[name] for name in fields if name not in ("rank", "untied")}
    try:
        Rule(re.escape(path), said["rank"], **options)
        kernel_axes = KernelAxes(**{_name_here(name): value for name, value in axes.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    if said["untied"] and said["substitute"]:
        raise ValueError(f"{where} is both untied and materialized.")
    adapter = Adapter(**(fields | dict(arrays)), axes=kernel_axes)
    _check_arrays(adapter, where)
    return adapter


def _shift(
    s: object, array: np.ndarray, path: str, where: str, others: Mapping[str, Any]
) -> LoraBias:
    """A shift, when what is said of it makes sense."""
    if type(s) is not float or not (math.isfinite(s) and s > 0):
        raise ValueError(f"{where}: the scale of a shift must be a positive number, got {s!r}.")
    if not is_floating(array):
        raise ValueError(f"{where}: a shift is of dtype {array.dtype}.")
    if path in others:
        raise ValueError(f"{where} is described twice.")
    return LoraBias(array, s)


def _check_arrays(adapter: Adapter, where: str) -> None:
    """Errors where U, V and m are not those of one rank and one stack of matrices."""
    axes, U, V = adapter.axes, adapter.U, adapter.V
    stacks = len(axes.batch) + (axes.fused > 1)
    shapes = {name: getattr(adapter, name).shape for name in _names(adapter.variant)}
    fits = (
        U.ndim == V.ndim == stacks + 2
        and U.shape[:stacks] == V.shape[:stacks]
        and U.shape[-1] == V.shape[-2] == adapter.rank
        and (axes.fused == 1 or U.shape[stacks - 1] == len(axes.parts))
        and (adapter.m is None or adapter.m.shape == (*V.shape[:stacks], V.shape[-1]))
    )
    if not fits:
        raise ValueError(
            f"{where}: the shapes {shapes} are not those of an adapter of rank {adapter.rank} for "
            f"{axes}."
        )
    for name, shape in shapes.items():
        if 0 in shape:
            raise ValueError(f"{where}: {name} is {shape}, in which there are no numbers.")
        if not jnp.issubdtype(getattr(adapter, name).dtype, jnp.floating):
            raise ValueError(f"{where}: {name} is of dtype {getattr(adapter, name).dtype}.")


def whole_leaf(path: str, node: Any, leaf: Any, file: str) -> Any:
    """A leaf that was fully trained, in the box of the model's leaf."""
    check_floating(path, leaf, "params has")
    array = unbox(leaf)
    value, dtype = (
        (node.value, node.dtype) if isinstance(node, FullyTrained) else (node, node.dtype.name)
    )
    if tuple(array.shape) != value.shape or jnp.dtype(array.dtype).name != dtype:
        raise ValueError(
            f"{file} has {path!r} fully trained as {dtype} {value.shape}, but params has "
            f"{jnp.dtype(array.dtype).name} {tuple(array.shape)} there. Is it of another model?"
        )
    boxed = rebox(leaf, _to_jax(value, file))
    return FullyTrained(boxed, dtype) if isinstance(node, FullyTrained) else boxed


def _to_jax(array: np.ndarray, file: str) -> jax.Array:
    out = jnp.asarray(array)
    if out.dtype != array.dtype:
        raise ValueError(
            f"{file} has arrays of dtype {array.dtype}: set jax.config.update('jax_enable_x64', "
            "True)."
        )
    return out


def _verify(base: Mapping[str, str], leaves: Mapping[str, Any], path: StrPath) -> None:
    """Errors where the base is not the one of which hashes were saved."""
    if leaves and not base:
        raise ValueError(
            f"{path} has no hashes of its base to verify: pass frozen=... to lora_jax.save."
        )
    problems = [f"{p!r} is missing" for p in base if p not in leaves]
    problems += [f"{p!r} was not there" for p in leaves if p not in base]
    problems += [
        f"{p!r} has other values"
        for p, leaf in leaves.items()
        if p in base and fingerprint(leaf, p) != base[p]
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(
            f"params is not the base that {path} was trained on: {'; '.join(problems[:4])}{more}."
        )
