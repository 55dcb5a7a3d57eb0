"""The safetensors file: a length, a JSON header, then the bytes of every tensor.

Read as a memory map, so that a tensor costs memory when it is looked at, and written one tensor at
a time, so that a transposed view is copied alone. bfloat16, which NumPy has no name for, is kept.

Source: huggingface/safetensors, README.md ("Format").
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tinyllm_jax.errors import InputError

# A longer header is no header; the reference reader has the same limit.
LARGEST_HEADER_BYTES = 100_000_000
TYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
NAMES = {dtype: name for name, dtype in TYPES.items()}


def looks_like_safetensors(path: Path) -> bool:
    """Tell by the first nine bytes: a sensible header length, and a header that is JSON."""
    with open(path, "rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return len(start) == 9 and start[8:] == b"{" and 2 <= length <= LARGEST_HEADER_BYTES


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Map a file's tensors into memory, and read its metadata.

    Raises:
        InputError: the file is cut short, or its header does not describe it.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= min(size, LARGEST_HEADER_BYTES) else b""
    if len(text) != length or size < 8 + length:
        raise _cut_short(path, size=size, expected=8 + length)
    try:
        header: dict[str, Any] = json.loads(text)
        metadata = header.pop("__metadata__", {})
        rows: dict[str, Any] = {
            name: (TYPES[row["dtype"]], tuple(row["shape"]), *row["data_offsets"])
            for name, row in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: its safetensors header cannot be read ({error!r}). Get the file again."
        ) from None
    end = max((row[3] for row in rows.values()), default=0)
    if size < 8 + length + end:
        raise _cut_short(path, size=size, expected=8 + length + end)
    # Copy-on-write: what is done to an array never reaches the file.
    content = np.asarray(np.memmap(path, mode="c"))
    found = {}
    for name, (dtype, shape, begin, stop) in rows.items():
        wanted = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if begin < 0 or stop - begin != wanted:
            raise InputError(
                f"{path}: {name} has {stop - begin} bytes and its shape {list(shape)} needs "
                f"{wanted}. Get the file again."
            )
        plain = content[8 + length + begin : 8 + length + stop]
        found[name] = plain.view(dtype).reshape(shape)
    return found, metadata


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
