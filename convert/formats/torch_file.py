"""PyTorch files (`.pt`, `.pth`, `.ckpt`): this project's own, and those of other projects.

A file is read with `weights_only=True` always: tensors and plain values come in, anything that
would run code is refused.

Ours is a dict of tensors and plain values: `format` ("tinyllm"), `weights`, `first_moments`,
`second_moments`, `meta` (JSON), `tokenizer_file`, `tokenizer` (its bytes).
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.bundle import (
    Arrays,
    Bundle,
    check_tensors,
    from_meta_table,
    make_layout,
    meta_table,
)
from convert.checks import finite_number, plain_table, read_count
from convert.formats.safetensors import tokenizer_from_bytes
from convert.hugging_face_config import check_config, read_config
from convert.layout import INTERLEAVED, half_split
from convert.names import bundle_name, foreign_model, plain_names
from convert.torch_archive import load
from convert.training_state import adamw_moments, foreign_run, foreign_training
from tinyllm_jax.config import ModelConfig
from tinyllm_jax.errors import InputError

NAME = "torch"
# Where projects keep the state dict, the settings of the model, the optimizer and the step.
STATE_KEYS = ("model_state_dict", "state_dict", "model")
CONFIG_KEYS = ("model_args", "model_config", "config", "args")
OPTIMIZER_KEYS = ("optimizer_state_dict", "optimizer")
STEP_KEYS = ("iter_num", "step", "global_step", "iteration")


def matches(path: Path) -> bool:
    """Tell a PyTorch archive, or the pickle that PyTorch wrote before version 1.6."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(4)
    return start == b"PK\x03\x04" or start[:2] in (
        b"\x80\x02",
        b"\x80\x03",
        b"\x80\x04",
        b"\x80\x05",
    )


def read(path: Path, *, settings: ModelConfig | None) -> Bundle:
    """Read a file of tensors and plain values, whoever wrote it.

    Args:
        settings: Settings of the model, where the file holds none.

    Raises:
        InputError: the file is no such file, is cut short, or holds what would run code.
    """
    content = load(path)
    if not isinstance(content, Mapping):
        raise InputError(
            f"{path}: holds a {type(content).__name__} where a checkpoint has a dict. Give a file "
            "that holds a state dict."
        )
    form = content.get("format")
    if isinstance(form, str) and form == "tinyllm":
        return _read_own(content, path)
    return _read_foreign(content, path, settings=settings)


def write(bundle: Bundle, path: Path) -> None:
    """Write everything into one file that `torch.load(weights_only=True)` reads."""
    import torch

    # Dicts of this function's own: it lets go of arrays, and the caller's dicts keep theirs.
    bundle.weights, training = dict(bundle.weights), bundle.training
    if training:
        first, second = dict(training.first), dict(training.second)
        bundle.training = training = dataclasses.replace(training, first=first, second=second)
    tokenizer = bundle.tokenizer
    content: dict[str, Any] = {
        "format": "tinyllm",
        "weights": _as_torch(bundle.weights, torch),
        "first_moments": _as_torch(training.first if training else {}, torch),
        "second_moments": _as_torch(training.second if training else {}, torch),
        "meta": json.dumps(meta_table(bundle)),
        "tokenizer_file": tokenizer.file_name if tokenizer else "",
        "tokenizer": torch.frombuffer(bytearray(tokenizer.to_bytes()), dtype=torch.uint8)
        if tokenizer
        else None,
    }
    torch.save(content, path)


def _read_own(content: Mapping[str, Any], path: Path) -> Bundle:
    keys = ("weights", "first_moments", "second_moments", "meta", "tokenizer", "tokenizer_file")
    parts: list[Any] = [content.get(key) for key in keys]
    weights, first, second, text, stored, name = parts
    tables = all(_is_table_of_arrays(each) for each in (weights, first, second))
    is_file = isinstance(stored, np.ndarray) and stored.dtype == np.uint8 and isinstance(name, str)
    if not tables or not isinstance(text, str) or not (stored is None or is_file):
        raise InputError(
            f"{path}: a checkpoint of tinyllm without its weights, first_moments, second_moments, "
            "meta or tokenizer_file. Convert the source again."
        )
    tokenizer = None
    if stored is not None:
        tokenizer = tokenizer_from_bytes(stored.tobytes(), name=name, origin=str(path))
    return from_meta_table(
        text,
        weights=dict(weights),
        first=dict(first),
        second=dict(second),
        tokenizer=tokenizer,
        format=NAME,
        origin=str(path),
    )


def _is_table_of_arrays(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(array, np.ndarray) for name, array in value.items()
    )


def _read_foreign(
    content: Mapping[str, Any], path: Path, *, settings: ModelConfig | None
) -> Bundle:
    """Read what TinyLLM, Tiny-K, MiniMind, llama2.c and others save."""
    origin = str(path)
    key = next((key for key in STATE_KEYS if isinstance(content.get(key), Mapping)), None)
    state = content[key] if key else content
    arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
    if not arrays:
        raise InputError(
            f"{path}: holds no tensors under {', '.join(STATE_KEYS)} or by themselves. Give a "
            "file that holds a state dict."
        )
    table = _table_of(content, path)
    model, weights, found = foreign_model(
        arrays, table, settings=settings, certain="model_args" in content, origin=origin
    )
    layout = make_layout(
        format=NAME,
        rope=found["rope"],
        tied=model.tie_word_embeddings,
        transposed=False,
        weights=weights,
    )
    bundle = Bundle(model, weights, None, None, layout | {"notes": found["notes"]})
    _take_training(bundle, content, arrays, rope=found["rope"], path=path)
    return bundle


def _table_of(content: Mapping[str, Any], path: Path) -> Mapping[str, Any] | None:
    """Find the settings of the model: in the file, or in a config.json beside it."""
    for key in CONFIG_KEYS:
        table = content.get(key)
        if isinstance(table, Mapping):
            table = plain_table(
                table["model"] if isinstance(table.get("model"), Mapping) else table
            )
            return check_config(table, origin=f"{path}, {key}")
    beside = path.with_name("config.json")
    return read_config(beside) if beside.is_file() else None


def _take_training(
    bundle: Bundle, content: Mapping[str, Any], arrays: Arrays, *, rope: str, path: Path
) -> None:
    """Take the moments of AdamW along where they can be given names."""
    states = (content.get(key) for key in OPTIMIZER_KEYS)
    state = next((each for each in states if isinstance(each, Mapping) and each), None)
    if state is None:
        return
    origin = str(path)
    plain = plain_names(arrays, origin=origin)
    names = [bundle_name(name) for name in plain.values()]
    names = [name for name in names if name in bundle.weights]
    moments = adamw_moments(state, names, {name: bundle.weights[name].shape for name in names})
    if moments is None:
        bundle.note("the optimizer's state was left out: it is not AdamW's of these weights")
        return
    count, first, second = moments
    if rope == INTERLEAVED:
        first = {name: half_split(name, array, bundle.model) for name, array in first.items()}
        second = {name: half_split(name, array, bundle.model) for name, array in second.items()}
    for each in (first, second):
        check_tensors(each, bundle.model, origin=f"{path} (moments)")
    run_table = content.get("config")
    run_table = plain_table(run_table) if isinstance(run_table, Mapping) else {}
    word = next((key for key in STEP_KEYS if content.get(key) is not None), None)
    step = read_count(content[word], what=word, origin=origin) if word else count
    loss = finite_number(content.get("best_val_loss"))
    # llama2.c saves a checkpoint when it is the best so far, unless told to save them all.
    is_best = run_table.get("always_save_checkpoint") in (None, False, 0)
    config, notes = foreign_run(run_table, bundle.model, origin=origin)
    bundle.model = config.model  # with the dropout of the run
    bundle.training = foreign_training(
        config,
        step=step,
        moments=(count, first, second),
        best_loss=loss if is_best else None,
    )
    for note in notes:
        bundle.note(note)
    bundle.note("the optimizer's state came along; which data it was trained on is not known")


def _as_torch(arrays: Arrays, torch: Any) -> dict[str, Any]:
    """Turn arrays into tensors; transposed views give way to copies, one at a time.

    So the file is of plain tensors, and the model is not twice in memory.
    """
    found = {}
    for name in arrays:
        # torch warns of arrays that it may not write to.
        arrays[name] = plain = np.require(arrays[name], requirements=["C", "W"])
        if plain.dtype == ml_dtypes.bfloat16:
            found[name] = torch.from_numpy(plain.view(np.int16)).view(torch.bfloat16)
        else:
            found[name] = torch.from_numpy(plain)
    return found
