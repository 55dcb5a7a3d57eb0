"""Safetensors headers: what the reference reader takes is read, all else is one line."""

import json
import math
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from convert.tensor_file import read_tensors
from tinyllm_jax.errors import InputError

TWO = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
ONE_BYTE = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}


def file_of(header: Any, content: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


HEADERS = {
    "plain": file_of({"a": TWO}),
    "no tensors": file_of({}, b""),
    "a number": file_of({"a": TWO | {"shape": [], "data_offsets": [0, 4]}}, b"\0" * 4),
    "no elements": file_of({"a": TWO | {"shape": [0], "data_offsets": [0, 0]}}, b""),
    "not aligned": file_of({"a": ONE_BYTE, "b": TWO | {"data_offsets": [1, 9]}}, b"\0" * 9),
    "out of order": file_of({"b": TWO | {"data_offsets": [8, 16]}, "a": TWO}, b"\0" * 16),
    "a further field": file_of({"a": TWO | {"author": "me"}}),
    "spaces round it": file_of(b"  " + json.dumps({"a": TWO}).encode() + b"   "),
    "metadata of null": file_of({"__metadata__": None, "a": TWO}),
    "unsigned": file_of({"a": TWO | {"dtype": "U16", "shape": [4]}}),
    "negative shape": file_of({"a": TWO | {"shape": [-2]}}),
    "two negative": file_of({"a": TWO | {"shape": [-1, -2]}}),
    "fraction": file_of({"a": TWO | {"shape": [2.0]}}),
    "text": file_of({"a": TWO | {"shape": ["2"]}}),
    "true": file_of({"a": TWO | {"shape": [2, True]}}),
    "overflow": file_of({"a": TWO | {"shape": [2**62, 4]}}),
    "beyond 64 bits": file_of({"a": TWO | {"shape": [2**70]}}),
    "no list": file_of({"a": TWO | {"shape": 2}}),
    "three offsets": file_of({"a": TWO | {"data_offsets": [0, 8, 8]}}),
    "negative offset": file_of({"a": TWO | {"data_offsets": [-8, 0]}}),
    "backwards": file_of({"a": TWO | {"data_offsets": [8, 0]}}),
    "overlap": file_of({"a": TWO, "b": TWO}),
    "hole": file_of({"a": TWO | {"data_offsets": [8, 16]}}, b"\0" * 16),
    "trailing": file_of({"a": TWO}, b"\0" * 9),
    "cut": file_of({"a": TWO}, b"\0" * 7),
    "metadata of a list": file_of({"__metadata__": ["x"], "a": TWO}),
    "metadata of numbers": file_of({"__metadata__": {"x": 1}, "a": TWO}),
    "unknown type": file_of({"a": TWO | {"dtype": "F33"}}),
    "type of a list": file_of({"a": TWO | {"dtype": ["F32"]}}),
    "no offsets": file_of({"a": {"dtype": "F32", "shape": [2]}}),
    "row of text": file_of({"a": "F32"}),
    "no table": file_of([]),
    "deep": file_of(b'{"a":' + b"[" * 100_000),
    "not a number": file_of(b'{"a": NaN}'),
    "not UTF-8": file_of(b'{"\xff": 1}'),
    "half a character": file_of(json.dumps({"\ud800": TWO}).encode()),
    "longer than the file": (2**63).to_bytes(8, "little") + b"{}",
    "empty": b"",
    "seven bytes": b"1234567",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_safetensors_header_is_taken_or_refused_as_the_reference_does(name, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(HEADERS[name])
    try:
        with safe_open(path, "np") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except SafetensorError:
        with pytest.raises(InputError, match="x.safetensors: ") as caught:
            read_tensors(path)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 600 + len(str(path))
    else:
        found = read_tensors(path)[0]
        assert {key: list(array.shape) for key, array in found.items()} == shapes


@pytest.mark.parametrize(
    ("shape", "message"), [([0, 2**62, 2**62], "cannot be right"), ([1] * 65, "of 65 dimensions")]
)
def test_a_shape_that_numpy_has_not_is_one_line(shape, message, tmp_path):
    size = 4 * math.prod(shape)
    header = {"a": TWO | {"shape": shape, "data_offsets": [0, size]}}
    (tmp_path / "x.safetensors").write_bytes(file_of(header, b"\0" * size))
    with pytest.raises(InputError, match=message):
        read_tensors(tmp_path / "x.safetensors")
