"""Hugging Face folders of a Llama model: config.json, safetensors, tokenizer, generation_config.json.

`config.json` says rope_theta twice: by itself, as transformers 4 reads it, and inside
`rope_parameters`, as transformers 5 does.

Source: huggingface/transformers, models/llama/configuration_llama.py and modeling_rope_utils.py;
sharding: docs/source/en/models.md (`model.safetensors.index.json`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.bundle import Arrays, Bundle, make_layout
from convert.checks import listed, parse_json, shown
from convert.hugging_face_tokenizer import (
    read_hugging_face_tokenizer,
    write_hugging_face_tokenizer,
)
from convert.names import foreign_model
from convert.setting_values import check_held, check_values
from convert.tensor_file import read_tensors, write_tensors
from tinyllm_jax.config import ModelConfig
from tinyllm_jax.errors import InputError

NAME = "hf"
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
# Folders of these types compute what a Llama does, once the settings below hold.
LLAMA_TYPES = {"llama", "mistral", "minimind", "Tiny-K", "Tiny-k", "tiny-k"}
# transformers' own defaults, for what a config.json leaves out.
LLAMA_DEFAULTS = {
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": LLAMA_DEFAULTS,
    "mistral": LLAMA_DEFAULTS | {"max_position_embeddings": 131072},
}
MISTRAL_WINDOW = {"sliding_window": 4096, "max_position_embeddings": 131072}
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip
NUMBERS = ("rms_norm_eps", "rope_theta", "partial_rotary_factor")
SWITCHES = ("tie_word_embeddings", "use_sliding_window")
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
        InputError: it is no Llama, scales its rotary positions, or its tensors do not fit.
    """
    table, notes = with_defaults(read_config(path / CONFIG))
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


def with_defaults(table: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Complete a config.json as transformers does, and say which settings that were."""
    defaults = DEFAULTS.get(table.get("model_type", "llama"), {})
    absent = {key: value for key, value in defaults.items() if table.get(key) is None}
    if not absent:
        return dict(table), []
    said = ", ".join(f"{key}={str(value).lower()}" for key, value in absent.items())
    note = f"{CONFIG} does not say, so Hugging Face's defaults were taken: {said}"
    return table | absent, [note]


def read_config(file: Path) -> dict[str, Any]:
    """Read a config.json, and refuse what this model does not compute.

    Raises:
        InputError: every such thing, by name.
    """
    table = _read_table(file)
    kind = table.get("model_type", "llama")
    if not isinstance(kind, str) or kind not in LLAMA_TYPES:
        raise InputError(
            f"{file}: model_type={shown(kind)} is not computed as a Llama is. Give a folder of one of "
            f"{', '.join(sorted(LLAMA_TYPES))}."
        )
    if kind in DEFAULTS:
        # Others write 0 for what follows from the rest.
        sizes: dict[str, int] = dict.fromkeys(SIZES, 1)
        check_values(table, whole=sizes, numbers=(), switches=(), origin=str(file))
    if kind == "mistral":  # where it says nothing, transformers computes with a window
        check_config(MISTRAL_WINDOW | table, origin=str(file))
    return check_config(table, origin=str(file))


def check_config(table: Mapping[str, Any], *, origin: str) -> dict[str, Any]:
    """Refuse settings that this model does not compute, and bring `rope_theta` to one place.

    Raises:
        InputError: every such thing, by name.
    """
    table = dict(table)
    sizes: dict[str, int] = dict.fromkeys((*SIZES, "head_dim", "sliding_window"), 0)
    check_values(table, whole=sizes, numbers=NUMBERS, switches=SWITCHES, origin=origin)
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(table.get(key) or {}, Mapping):
            raise InputError(
                f"{origin}: {key}={shown(table[key])} is no table. Get the file again."
            )
    rope = dict(table.get("rope_parameters") or {})
    scaling = table.get("rope_scaling") or {}
    check_values(rope, whole={}, numbers=NUMBERS, switches=(), origin=f"{origin}, rope_parameters")
    problems = []
    for where, values in (("rope_parameters", rope), ("rope_scaling", scaling)):
        word = values.get("rope_type", values.get("type", "default"))
        if word != "default":
            problems.append(f"rotary positions scaled by {shown(word)} ({where})")
    for key, plain in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if table.get(key, plain) not in (plain, None):
            problems.append(f"{key}={shown(table[key])}")
    for values in (table, rope):
        if values.get("partial_rotary_factor", 1.0) not in (1.0, None):
            problems.append(f"partial_rotary_factor={values['partial_rotary_factor']}")
    window, longest = table.get("sliding_window"), table.get("max_position_embeddings") or 0
    if window is not None and window < longest and table.get("use_sliding_window") is not False:
        problems.append(f"sliding_window={window}")
    if problems:
        raise InputError(
            f"{origin}: {', '.join(problems)}: not supported. Give a model without it."
        )
    if rope.get("rope_theta") is not None:
        table["rope_theta"] = rope["rope_theta"]
    return table


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
    homes = _read_table(index).get("weight_map")
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


def _read_table(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds a table."""
    table = parse_json(file.read_bytes(), origin=str(file))
    if not isinstance(table, dict):
        raise InputError(f"{file}: not a table of settings. Get the file again.")
    return table


def write(bundle: Bundle, path: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer` read offline."""
    check_held(bundle.model, to=NAME)
    path.mkdir()
    weights = {hugging_face_name(name): array for name, array in bundle.weights.items()}
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
    _write_json(path / "generation_config.json", {**_token_ids(bundle), "do_sample": False})


def hugging_face_name(name: str) -> str:
    """Give a weight's name in a Hugging Face file."""
    return name if name.startswith("lm_head") else f"model.{name}"


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


def config_table(bundle: Bundle) -> dict[str, Any]:
    """Write config.json for both versions of transformers."""
    model = bundle.model
    dtype = next(iter(bundle.weights.values())).dtype.name
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tie_word_embeddings,
        "initializer_range": model.initializer_range,
        "attention_bias": False,
        "attention_dropout": model.attention_dropout,
        "mlp_bias": False,
        "hidden_act": "silu",
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        **_token_ids(bundle),
    }


def _token_ids(bundle: Bundle) -> dict[str, int | None]:
    """Name the control tokens, and say null where no tokenizer does: the defaults are 1 and 2."""
    tokenizer = bundle.tokenizer
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


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
