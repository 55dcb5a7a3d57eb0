"""Hugging Face folders of a Llama and its family: config.json, safetensors, tokenizer and more.

Source: huggingface/transformers, docs/source/en/models.md (`model.safetensors.index.json`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.architectures import architecture_of
from convert.bundle import Arrays, Bundle, make_layout
from convert.checks import listed, shown
from convert.expert_names import to_hugging_face
from convert.hugging_face_config import (
    CONFIG,
    config_table,
    read_table,
    read_whole_config,
    token_ids,
)
from convert.hugging_face_tokenizer import (
    end_ids,
    read_hugging_face_tokenizer,
    write_hugging_face_tokenizer,
)
from convert.names import foreign_model
from convert.tensor_file import read_tensors, write_tensors
from tinyllm_jax.config import ModelConfig
from tinyllm_jax.errors import InputError

NAME = "hf"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000


def matches(path: Path) -> bool:
    """Tell a folder by its config.json."""
    return path.is_dir() and (path / CONFIG).is_file()


def read(path: Path, *, settings: ModelConfig | None, with_tokenizer: bool) -> Bundle:
    """Read a folder: whole or sharded, safetensors or pytorch_model.bin, tied or not.

    Args:
        settings: Settings of the model instead of the folder's.
        with_tokenizer: Read the folder's tokenizer, where it has one.

    Raises:
        InputError: it computes what this model does not, or its tensors do not fit.
    """
    table, notes = read_whole_config(path / CONFIG)
    arrays = read_weights(path)
    # The settings are complete; shapes are only checked against them.
    model, weights, found = foreign_model(
        arrays, table, settings=settings, certain=False, origin=str(path)
    )
    layout = make_layout(
        format=NAME,
        rope=found["rope"],
        tied=model.tie_word_embeddings,
        transposed=False,
        weights=weights,
    )
    names = ("tokenizer.model", "tokenizer.json")
    has_tokenizer = with_tokenizer and any((path / name).is_file() for name in names)
    tokenizer = read_hugging_face_tokenizer(path) if has_tokenizer else None
    bundle = Bundle(model, weights, tokenizer, None, layout)
    if settings is None and table.get("num_key_value_heads") is None:
        notes.append(f"num_key_value_heads={model.num_key_value_heads} is told by the shapes")
    for note in [*(notes if settings is None else []), *found["notes"]]:
        bundle.note(note)
    return bundle


def read_weights(path: Path) -> Arrays:
    """Read all tensors of a folder, from the file that transformers would choose.

    Raises:
        InputError: there are none, or a shard is missing.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return _read_files(path, [name])
        index = path / f"{name}.index.json"
        if index.is_file():
            return _read_files(path, _shards(index))
    raise InputError(
        f"{path}: a config.json, but neither model.safetensors nor pytorch_model.bin. Give the "
        "folder that holds the weights."
    )


def _shards(index: Path) -> list[str]:
    """List the files of an index, each in the index's own folder."""
    homes = read_table(index).get("weight_map")
    if not isinstance(homes, Mapping) or not homes:
        raise InputError(f"{index}: no index of shards (no weight_map). Get the file again.")
    names = list(dict.fromkeys(name for name in homes.values() if isinstance(name, str)))
    plain = [name for name in names if Path(name).name == name and name.isprintable()]
    if len(plain) < len(names) or not all(isinstance(name, str) for name in homes.values()):
        strange = [name for name in homes.values() if name not in plain]
        raise InputError(
            f"{index}: {shown(strange[0])} is no name of a file in its folder. Get the file again."
        )
    return sorted(plain)


def write(bundle: Bundle, path: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer` read offline.

    A model with a score head is one for `AutoModelForSequenceClassification`, of one label.
    """
    kind = architecture_of(bundle.model).model_type
    path.mkdir()
    weights = {
        hugging_face_name(name): array
        for name, array in to_hugging_face(bundle.weights, kind=kind).items()
    }
    metadata = {"format": "pt", "tinyllm_layout": json.dumps(bundle.layout)}
    shards = cut_into_shards(weights, shard_bytes=shard_bytes)
    if len(shards) == 1:
        write_tensors(path / "model.safetensors", weights, metadata=metadata)
    else:
        names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
        homes = {}
        for name, shard in zip(names, shards, strict=True):
            part = {key: weights[key] for key in shard}
            write_tensors(path / name, part, metadata=metadata)
            homes |= dict.fromkeys(shard, name)
        total = sum(array.nbytes for array in weights.values())
        _write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": homes})
    _write_json(path / CONFIG, config_table(bundle))
    if bundle.tokenizer:
        longest = bundle.model.max_position_embeddings
        for note in write_hugging_face_tokenizer(bundle.tokenizer, path, longest=longest):
            bundle.note(note)
    ends = {"eos_token_id": end_ids(bundle.tokenizer)} if bundle.tokenizer else {}
    table = {**token_ids(bundle), **ends, "do_sample": False}
    _write_json(path / "generation_config.json", table)


def hugging_face_name(name: str) -> str:
    """Give a weight's name in a Hugging Face file."""
    return name if name.startswith(("lm_head", "score")) else f"model.{name}"


def cut_into_shards(weights: Arrays, *, shard_bytes: int) -> list[list[str]]:
    """Share tensors out over files of at most this size, in order; a larger tensor has its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, array in weights.items():
        if shards[-1] and filled + array.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += array.nbytes
    return shards


def _read_files(path: Path, files: list[str]) -> Arrays:
    found: Arrays = {}
    for name in files:
        if not (path / name).is_file():
            raise InputError(f"{path}: {name} is missing. Get the whole folder.")
        if name.endswith(".safetensors"):
            arrays = read_tensors(path / name)[0]
        else:
            arrays = _read_pickle(path / name)
        twice = [name for name in arrays if name in found]
        if twice:
            raise InputError(
                f"{path / name}: {listed(twice)} is in another shard as well. Get the folder again."
            )
        found |= arrays
    return found


def _read_pickle(file: Path) -> Arrays:
    from convert.formats import torch_file

    content = torch_file.load(file)
    if not isinstance(content, Mapping):
        content = {}
    arrays = {name: value for name, value in content.items() if isinstance(value, np.ndarray)}
    if not arrays or not all(isinstance(name, str) for name in arrays):
        raise InputError(f"{file}: no state dict of names and tensors. Get the file again.")
    return arrays


def _write_json(path: Path, table: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
