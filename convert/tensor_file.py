"""The safetensors file: a length, a JSON header, then the bytes of every tensor.

Read as a memory map, so that a tensor costs memory when it is looked at, and written one tensor at
a time, so that a transposed view is copied alone. bfloat16, which NumPy has no name for, is kept.

Source: huggingface/safetensors, README.md ("Format").
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from convert.checks import parse_json, shown
from tinyllm_jax.errors import InputError

# A longer header is no header; the reference reader has the same limit.
LARGEST_HEADER_BYTES = 100_000_000
TYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "C64": np.dtype("<c8"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
MOST_DIMENSIONS = 64  # NumPy's own limit
NAMES = {dtype: name for name, dtype in TYPES.items()}


def looks_like_safetensors(path: Path) -> bool:
    """Tell by the first nine bytes: a sensible header length, and a header that is JSON."""
    with open(path, "rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return len(start) == 9 and start[8:] == b"{" and 2 <= length <= LARGEST_HEADER_BYTES


class _Row(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int  # of its bytes, counted from the end of the header
    end: int


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Map a file's tensors into memory, and read its metadata.

    Raises:
        InputError: the file is cut short, or its header does not describe it.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= min(size, LARGEST_HEADER_BYTES) else b""
    start = 8 + length
    if len(text) != length or size < start:
        raise _cut_short(path, size=size, expected=start)
    try:
        rows, metadata = _read_header(parse_json(text, origin=f"{path}: its header"))
        end = _check_places(rows)
        if size < start + end:
            raise _cut_short(path, size=size, expected=start + end)
        if size > start + end:
            raise ValueError(f"it describes {start + end:,} of the file's {size:,} bytes")
        # Copy-on-write: what is done to an array never reaches the file.
        content = np.asarray(np.memmap(path, mode="c"))
        found = {
            name: content[start + row.begin : start + row.end].view(row.dtype).reshape(row.shape)
            for name, row in rows.items()
        }
    except InputError:
        raise
    except ValueError as error:
        raise InputError(
            f"{path}: its safetensors header cannot be right ({shown(str(error))}). Get the file "
            "again."
        ) from None
    return found, metadata


def _read_header(table: Any) -> tuple[dict[str, _Row], dict[str, str]]:
    """Take the header apart; the rules are those of the reference reader."""
    if not isinstance(table, dict):
        raise ValueError("it is no table")
    metadata = table.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its __metadata__ is no table of texts")
    rows = {}
    for name, row in table.items():
        match row:
            case {"dtype": str(word), "shape": [*shape], "data_offsets": [begin, end]}:
                numbers = (*shape, begin, end)
            case _:
                raise ValueError(f"{shown(name)} is {shown(row)}")
        name.encode()  # JSON can spell halves of a character, which no text holds
        if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"{shown(name)} has shape {shown(shape)} at {shown([begin, end])}")
        if word not in TYPES or len(shape) > MOST_DIMENSIONS:
            raise ValueError(
                f"{shown(name)} is {shown(word)} of {len(shape)} dimensions; read are "
                f"{', '.join(TYPES)} of at most {MOST_DIMENSIONS}"
            )
        rows[name] = _Row(TYPES[word], tuple(shape), begin, end)
    return rows, metadata


def _check_places(rows: Mapping[str, _Row]) -> int:
    """Check that each tensor has the bytes of its shape, and begins where another ends.

    Returns:
        The bytes of all tensors.
    """
    place = 0
    for name, row in sorted(rows.items(), key=lambda item: (item[1].begin, item[1].end)):
        if row.begin != place:
            raise ValueError(f"{shown(name)} begins at byte {row.begin:,}, and {place:,} is next")
        wanted = math.prod(row.shape) * row.dtype.itemsize
        if row.end - row.begin != wanted:
            raise ValueError(
                f"{shown(name)} has {row.end - row.begin:,} bytes, and its shape {list(row.shape)} needs "
                f"{shown(wanted)}"
            )
        place = row.end
    return place


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], *, metadata: Mapping[str, str]
) -> None:
    """Write tensors, in the order given, with metadata that is text."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    place = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.nbytes],
        }
        place += tensor.nbytes
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, so that maps are aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)


def _cut_short(path: Path, *, size: int, expected: int) -> InputError:
    return InputError(
        f"{path}: cut short; it has {size:,} bytes and says it has at least {expected:,}. Get the "
        "file again."
    )
