"""Safetensors files from strangers, read strictly, and written one array at a time.

Whatever is read is bounded by the file's own size, before anything is allocated. The errors name
the file and the tensor.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from lora_jax.files._bytes import StrPath, open_regular, replacing
from lora_jax.files._json import MAX_JSON, parse_json

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


class Info(NamedTuple):
    """What the header says of a tensor."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class Tensors(Mapping[str, np.ndarray]):
    """The arrays of a safetensors file by their names; each is read when it is asked for.

    Attributes:
      path: the file.
      info: dtype and shape of every tensor, without reading it.
      metadata: the strings in the header.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not what safetensors says it should be, or if a tensor that is
        asked for has NaN or infinite values. The message names the file and the tensor.

    Example:
      >>> import tempfile, numpy as np
      >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
      >>> _ = path.write_bytes(encode({"x": np.ones((2, 3), np.float32)}))
      >>> tensors = Tensors(path)
      >>> tensors.info["x"].shape, float(tensors["x"].sum())
      ((2, 3), 6.0)
    """

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)
        self._file: Any
        with open_regular(self.path) as file:
            self.info, self.metadata = _header(file, self.path)
            # While this file is open, its inode is not given to another one.
            try:
                self._file = safetensors.safe_open(self.path, framework="numpy")
            except safetensors.SafetensorError as error:
                raise ValueError(f"{self.path} is not a safetensors file: {error}.") from error
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                raise FileNotFoundError(f"{self.path} was replaced while it was read.")

    def __getitem__(self, name: str) -> np.ndarray:
        """The array."""
        info = self.info[name]
        try:
            array = self._file.get_tensor(name)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{self.path}: {name!r} cannot be read: {error}.") from error
        if array.dtype != info.dtype or array.shape != info.shape:
            raise ValueError(f"{self.path} changed while it was read.")
        check_finite(array, f"{self.path}: {name!r}")
        return array  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self.info)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self.info)


def check_finite(array: np.ndarray, where: str) -> None:
    """Raises ValueError if an array has NaN or infinite values."""
    if is_floating(array) and not np.isfinite(array).all():
        raise ValueError(f"{where} has NaN or infinite values.")


def is_floating(array: np.ndarray) -> bool:
    """Whether an array holds floating-point numbers, bfloat16 among them."""
    return floats(array.dtype)


def floats(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype is of floating-point numbers, as bfloat16 is."""
    return dtype.kind == "f" or dtype == ml_dtypes.bfloat16


def _header(file: Any, path: Path) -> tuple[dict[str, Info], dict[str, str]]:
    """Every tensor's dtype and shape, after a look for all that can be wrong with a header."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ValueError(
            f"{path} is not a safetensors file: it has {size} bytes only. Is it truncated?"
        )
    (length,) = struct.unpack("<Q", prefix)
    if length > size - 8:
        raise ValueError(
            f"{path} is truncated or not a safetensors file: its header should have {length} "
            f"bytes, but the file has {size}."
        )
    if length > MAX_JSON:
        raise ValueError(f"{path}: its header has {length} bytes, more than {MAX_JSON}.")
    header = parse_json(file.read(length), f"the header of {path}")
    if not isinstance(header, dict):
        raise ValueError(f"The header of {path} is not a JSON object.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"The header of {path}: '__metadata__' must map strings to strings.")
    spans = []
    info: dict[str, Info] = {}
    for name, entry in header.items():
        where = f"{path}: {name!r}"
        check_name(name, str(path))
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{where} must have dtype, shape and data_offsets in the header.")
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{where} is of dtype {entry['dtype']!r}, which is not read; those that are: "
                f"{', '.join(DTYPES)}."
            )
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not (is_ints(shape) and is_ints(offsets) and len(offsets) == 2):
            raise ValueError(
                f"{where}: shape and data_offsets must be lists of integers from 0 on."
            )
        if len(shape) > 32:
            raise ValueError(f"{where} has {len(shape)} axes.")
        # Beside a size of 0 there may be any other one, and no byte says otherwise.
        largest = math.prod(filter(None, shape)) * DTYPES[entry["dtype"]].itemsize
        if 0 in shape and largest > sys.maxsize:
            raise ValueError(f"{where} is {tuple(shape)}, which is larger than an array may be.")
        info[name] = Info(DTYPES[entry["dtype"]], tuple(shape))
        begin, end = offsets
        if end - begin != info[name].nbytes:
            raise ValueError(
                f"{where}: {entry['dtype']} {tuple(shape)} are {info[name].nbytes} bytes, but its "
                f"offsets say {end - begin}."
            )
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise ValueError(
                f"{path}: {name!r} begins at byte {begin} of the data, where {position} is next: "
                f"tensors must neither overlap nor leave a gap."
            )
        position = end
    if position != size - 8 - length:
        raise ValueError(
            f"{path} has {size - 8 - length} bytes of data, but its header says {position}. Is it "
            f"truncated?"
        )
    return info, metadata


def is_ints(value: object) -> bool:
    """Whether it is a list of integers from 0 on."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def check_name(name: str, where: str) -> None:
    """Raises ValueError if a name is empty, or one that a terminal would not show as it is."""
    if not name or not name.isprintable():
        raise ValueError(f"{where}: {name!a} is not a name for a tensor.")


def encode(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """Arrays as the content of a safetensors file."""
    for name, array in arrays.items():
        check_finite(array, repr(name))
    ordered = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    return safetensors.numpy.save(ordered, dict(metadata) if metadata else None)


def write_tensors(
    path: Path,
    info: Mapping[str, Info],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file one array at a time, whole or not at all.

    Args:
      path: the file.
      info: what will be in it.
      read: gives an array when it is its turn: larger dtypes first, else in the order of ``info``.
      metadata: strings for the header.

    Raises:
      ValueError: if an array is not as ``info`` says, or not finite.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    names = sorted(info, key=lambda name: -info[name].dtype.itemsize)
    position = 0
    for name in names:
        check_name(name, str(path))
        one = info[name]
        if one.dtype not in codes:
            raise ValueError(f"{path}: {name!r} is {one.dtype}, which safetensors does not have.")
        end = position + one.nbytes
        header[name] = {"dtype": codes[one.dtype], "shape": one.shape}
        header[name]["data_offsets"] = [position, end]
        position = end
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(content)) + content)
        for name in names:
            array = np.asarray(read(name), order="C")
            if Info(array.dtype, array.shape) != info[name]:
                raise ValueError(
                    f"{path}: {name!r} is {array.dtype} {array.shape}, not {info[name]}."
                )
            check_finite(array, f"{path}: {name!r}")
            file.write(array.reshape(-1).view(np.uint8).data)
