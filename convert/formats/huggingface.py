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

from convert.bundle import Arrays, Bundle, make_layout
from convert.names import foreign_model
from convert.tensor_file import read_tensors, write_tensors
from convert.tokenizer_files import read_hugging_face_tokenizer, write_hugging_face_tokenizer
from tinyllm_jax.config import ModelConfig
from tinyllm_jax.errors import InputError

NAME = "hf"
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
# Folders of these types compute what a Llama does, once the settings below hold.
LLAMA_TYPES = {"llama", "mistral", "minimind", "Tiny-K", "Tiny-k", "tiny-k"}
# transformers' own defaults, for what a config.json leaves out.
DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}
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
    table = read_config(path / CONFIG)
    arrays = read_weights(path)
    if table.get("model_type", "llama") in ("llama", "mistral"):
        table = DEFAULTS | table
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
    return Bundle(model, weights, tokenizer, None, layout)


def read_config(file: Path) -> dict[str, Any]:
    """Read a config.json, and refuse what this model does not compute.

    Raises:
        InputError: every such thing, by name.
    """
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({error}). Get the file again.") from None
    if not isinstance(table, dict):
        raise InputError(f"{file}: not a table of settings. Get the file again.")
    kind = table.get("model_type", "llama")
    if kind not in LLAMA_TYPES:
        raise InputError(
            f"{file}: model_type={kind} is not computed as a Llama is. Give a folder of one of "
            f"{', '.join(sorted(LLAMA_TYPES))}."
        )
    return check_config(table, origin=str(file))


def check_config(table: Mapping[str, Any], *, origin: str) -> dict[str, Any]:
    """Refuse settings that this model does not compute, and bring `rope_theta` to one place.

    Raises:
        InputError: every such thing, by name.
    """
    table = dict(table)
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(table.get(key) or {}, Mapping):
            raise InputError(f"{origin}: {key}={table[key]!r} is no table. Get the file again.")
    rope = dict(table.get("rope_parameters") or {})
    scaling = table.get("rope_scaling") or {}
    problems = []
    for where, values in (("rope_parameters", rope), ("rope_scaling", scaling)):
        word = values.get("rope_type", values.get("type", "default"))
        if word != "default":
            problems.append(f"rotary positions scaled by {word} ({where})")
    for key, plain in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if table.get(key, plain) not in (plain, None):
            problems.append(f"{key}={table[key]}")
    for values in (table, rope):
        if values.get("partial_rotary_factor", 1.0) not in (1.0, None):
            problems.append(f"partial_rotary_factor={values['partial_rotary_factor']}")
    window, longest = table.get("sliding_window"), table.get("max_position_embeddings", 0)
    if isinstance(window, int) and window < longest and table.get("use_sliding_window", True):
        problems.append(f"sliding_window={window}")
    if problems:
        raise InputError(
            f"{origin}: {', '.join(problems)}: not supported. Give a model without it."
        )
    if rope.get("rope_theta") is not None:
        table["rope_theta"] = rope["rope_theta"]
    return table


def read_weights(path: Path) -> Arrays:
    """Read all tensors of a folder.

    Raises:
        InputError: there are none, or a shard is missing.
    """
    for index in (INDEX, "pytorch_model.bin.index.json"):
        if (path / index).is_file():
            try:
                files = sorted(set(json.loads((path / index).read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{path / index}: no index of shards ({error!r}). Get the file again."
                ) from None
            return _read_files(path, files)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return _read_files(path, [name])
    raise InputError(
        f"{path}: a config.json, but neither model.safetensors nor pytorch_model.bin. Give the "
        "folder that holds the weights."
    )


def write(bundle: Bundle, path: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer` read offline."""
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
        write_hugging_face_tokenizer(
            bundle.tokenizer, path, longest=bundle.model.max_position_embeddings
        )
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
            found |= read_tensors(path / name)[0]
        else:
            from convert.formats import torch_file

            found |= torch_file.load(path / name)
    return found


def _write_json(path: Path, table: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
