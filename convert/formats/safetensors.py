"""Safetensors under this project's names: a step folder as tinyllm_torch writes it, or one file.

A folder holds `model.safetensors`, `optimizer.safetensors` (absent where only weights are known),
`meta.json`, the tokenizer and `checksums.json`. One file holds the same: the moments and the bytes
of the tokenizer as further tensors, `meta.json` as metadata.
"""

import json
from pathlib import Path

import numpy as np

from convert.bundle import Arrays, Bundle, from_meta_table, meta_table
from convert.tensor_file import looks_like_safetensors, read_tensors, write_tensors
from tinyllm_jax.data.files import sha256_of_file
from tinyllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from tinyllm_jax.errors import InputError
from tinyllm_jax.training.step_folders import damage

NAME = "safetensors"
MODEL, OPTIMIZER, META, SUMS = (
    "model.safetensors",
    "optimizer.safetensors",
    "meta.json",
    "checksums.json",
)
FIRST, SECOND, TOKENIZER = "first_moments.", "second_moments.", "tokenizer"


def matches(path: Path) -> bool:
    """Tell a step folder by its files, or one file by its metadata."""
    if path.is_dir():
        return (path / META).is_file() and (path / MODEL).is_file()
    return looks_like_safetensors(path) and "tinyllm" in read_tensors(path)[1]


def read(path: Path) -> Bundle:
    """Read a step folder whose checksums hold, or one file."""
    if path.is_file():
        return _read_file(path)
    problem = damage(path)
    if problem:
        raise InputError(f"{path}: damaged checkpoint ({problem}). Use another checkpoint.")
    weights, _ = read_tensors(path / MODEL)
    moments: Arrays = {}
    if (path / OPTIMIZER).is_file():
        moments, _ = read_tensors(path / OPTIMIZER)
    names = ("tokenizer.model", "tokenizer.json")
    has_tokenizer = any((path / name).is_file() for name in names)
    return from_meta_table(
        (path / META).read_bytes(),
        weights=weights,
        first=part_of(moments, FIRST),
        second=part_of(moments, SECOND),
        tokenizer=load_tokenizer(path) if has_tokenizer else None,
        format=NAME,
        origin=str(path),
    )


def write(bundle: Bundle, path: Path) -> None:
    """Write one file where the name ends in .safetensors, else a step folder."""
    if path.suffix == ".safetensors":
        _write_file(bundle, path)
        return
    path.mkdir()
    write_tensors(path / MODEL, bundle.weights, metadata={"format": "pt"})
    if bundle.training:
        write_tensors(path / OPTIMIZER, moments_of(bundle), metadata={"format": "pt"})
    (path / META).write_text(json.dumps(meta_table(bundle), indent=1))
    if bundle.tokenizer:
        bundle.tokenizer.save(path)
    sums = {file.name: sha256_of_file(file) for file in sorted(path.iterdir())}
    (path / SUMS).write_text(json.dumps(sums, indent=1))


def moments_of(bundle: Bundle) -> Arrays:
    """List the moments under prefixed names."""
    training = bundle.training
    if training is None:
        return {}
    first = {FIRST + name: array for name, array in training.first.items()}
    return first | {SECOND + name: array for name, array in training.second.items()}


def part_of(arrays: Arrays, prefix: str) -> Arrays:
    """Take the arrays whose names begin with a prefix, without it."""
    found = [name for name in arrays if name.startswith(prefix)]
    return {name.removeprefix(prefix): arrays[name] for name in found}


def tokenizer_from_bytes(content: bytes, *, name: str, origin: str) -> Tokenizer:
    """Make a tokenizer of a file's bytes."""
    from tinyllm_jax.data.bytelevel import ByteLevelTokenizer
    from tinyllm_jax.data.sentencepiece_bpe import SentencePieceTokenizer

    kind = ByteLevelTokenizer if name.endswith(".json") else SentencePieceTokenizer
    return kind(content, origin=origin)


def _read_file(path: Path) -> Bundle:
    tensors, metadata = read_tensors(path)
    stored = tensors.pop(TOKENIZER, None)
    name = metadata.get("tokenizer_file", "")
    tokenizer = None
    if stored is not None:
        tokenizer = tokenizer_from_bytes(stored.tobytes(), name=name, origin=str(path))
    moments = {name for name in tensors if name.startswith((FIRST, SECOND))}
    return from_meta_table(
        metadata["tinyllm"],
        weights={name: array for name, array in tensors.items() if name not in moments},
        first=part_of(tensors, FIRST),
        second=part_of(tensors, SECOND),
        tokenizer=tokenizer,
        format=NAME,
        origin=str(path),
    )


def _write_file(bundle: Bundle, path: Path) -> None:
    tensors = bundle.weights | moments_of(bundle)
    metadata = {"format": "pt", "tinyllm": json.dumps(meta_table(bundle))}
    if bundle.tokenizer:
        tensors[TOKENIZER] = np.frombuffer(bundle.tokenizer.to_bytes(), np.uint8)
        metadata["tokenizer_file"] = bundle.tokenizer.file_name
    write_tensors(path, tensors, metadata=metadata)
