"""Safetensors files, read only after their header is checked, and written in the library's own layout.

The format (https://github.com/huggingface/safetensors): eight bytes, the header's size; the header, a JSON
object from tensor names to type, shape and place; then the tensors' bytes. Nothing here trusts a number of
the header: each is held against the file's size before anything of that size is made.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # numpy then knows bfloat16, which the library's reader asks it for
import numpy as np
from safetensors import SafetensorError, safe_open

from lm.config import ConfigError

# Largest first, as the library orders types of one size: it writes tensors by this order, then by name.
DTYPES: dict[str, np.dtype] = {
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
MAX_HEADER = 32 << 20  # bytes; the format allows 100 MB, and 50,000 tensors take a quarter of this
MAX_TENSORS = 50_000
MAX_AXES = 16


class Entry(NamedTuple):
    """Type, shape, and the first and last place after the header of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """What a file holds: entries by name, in the order of their bytes, and the text beside them."""

    entries: dict[str, Entry]
    metadata: dict[str, str] | None


def read_header(path: Path) -> Header:
    """Return the checked header of a file.

    Raises:
      ConfigError: the file is not whole, or not what its header says; what is wrong is named.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise _refused(path, f"{size} bytes are no safetensors file")
        (length,) = struct.unpack("<Q", start)
        if length > size - 8:
            raise _refused(
                path, f"its header would take {length:,} bytes, and the file has {size:,}"
            )
        if length > MAX_HEADER:
            raise _refused(
                path, f"its header takes {length:,} bytes; at most {MAX_HEADER:,} are read"
            )
        text = file.read(length)
    header = _parsed(path, text)
    _check_places(path, header.entries, size - 8 - length)
    return header


def _parsed(path: Path, text: bytes) -> Header:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError("a name comes twice")
        return values

    try:
        values = json.loads(text.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise _refused(path, f"its header is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise _refused(path, "its header is not a JSON object")
    if len(values) > MAX_TENSORS:
        raise _refused(path, f"it names {len(values):,} tensors; at most {MAX_TENSORS:,} are read")
    metadata = values.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())
    ):
        raise _refused(path, "its __metadata__ is not an object of texts")
    entries = {name: _entry(path, name, value) for name, value in values.items()}
    by_place = sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end))
    return Header(dict(by_place), metadata)


def _entry(path: Path, name: str, value: Any) -> Entry:
    """Return one entry, its type, shape and number of bytes checked against each other."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _refused(path, f"tensor {shown(name)} has not just dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise _refused(path, f"tensor {shown(name)} has the type {shown(dtype)}; known are {known}")
    if not _whole_numbers(shape) or len(shape) > MAX_AXES:
        raise _refused(path, f"tensor {shown(name)} has the shape {shown(shape)}")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _refused(path, f"tensor {shown(name)} has the data_offsets {shown(offsets)}")
    if math.prod(size or 1 for size in shape) * DTYPES[dtype].itemsize >= 1 << 63:
        raise _refused(
            path, f"tensor {shown(name)} has the shape {shown(shape)}, too large for any"
        )
    begin, end = offsets
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != wanted:
        raise _refused(
            path,
            f"tensor {shown(name)}, {dtype} {shape}, takes {wanted:,} bytes, not {end - begin:,}",
        )
    return Entry(dtype, tuple(shape), begin, end)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 1 << 63 for item in value
    )


def _check_places(path: Path, entries: Mapping[str, Entry], size: int) -> None:
    """Refuse tensors that overlap, leave a gap, or do not end where the file does."""
    at = 0
    for name, entry in entries.items():
        if entry.end > size:
            raise _refused(
                path, f"tensor {shown(name)} ends at {entry.end:,}, and the file's data at {size:,}"
            )
        if entry.begin != at:
            what = "overlaps the one before it" if entry.begin < at else "leaves a gap before it"
            raise _refused(path, f"tensor {shown(name)} {what} ({entry.begin:,}, not {at:,})")
        at = entry.end
    if at != size:
        raise _refused(path, f"its tensors end at {at:,}, and the file's data at {size:,}")


def shown(value: Any) -> str:
    """Return a value of somebody's file on one line, cut to a length that can be read."""
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _refused(path: Path, why: str) -> ConfigError:
    return ConfigError(f"{path}: {why}; get the file again from where it came from")


def read(path: Path, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, array) of tensors of a file whose header is checked, bit for bit as they are stored."""
    try:
        with safe_open(path, framework="np") as file:
            for name in names:
                yield name, file.get_tensor(name)
    except SafetensorError as error:  # Python's JSON took the header, and the library's does not
        raise _refused(path, shown(str(error))) from None


def dtype_name(array: np.ndarray) -> str:
    """Return the format's name of an array's type."""
    return next(name for name, dtype in DTYPES.items() if dtype == array.dtype)


def standard_order(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Return the names in the order in which the library writes them: by type, then by name."""
    ranks = {name: rank for rank, name in enumerate(DTYPES)}
    return sorted(arrays, key=lambda name: (ranks[dtype_name(arrays[name])], name.encode()))


def write(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    *,
    order: Sequence[str],
    metadata: Mapping[str, str] | None,
) -> None:
    """Write a file, the tensors in `order`, and bring it to the disk.

    The library itself writes metadata of several keys in an order that differs from run to run.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for name in order:
        array = arrays[name]
        header[name] = {
            "dtype": dtype_name(array),
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(np.ascontiguousarray(arrays[name]).tobytes())
        file.flush()
        os.fsync(file.fileno())
