"""PyTorch files (`.pt`, `.pth`, `.ckpt`): this project's own, and those of other projects.

A file is read with `weights_only=True` always: tensors and plain values come in, anything that
would run code is refused.

Ours is a dict of tensors and plain values: `format` ("tinyllm"), `weights`, `first_moments`,
`second_moments`, `meta` (JSON), `tokenizer_file`, `tokenizer` (its bytes).
"""

import json
import pickle
import re
import warnings
import zipfile
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
from convert.formats.huggingface import check_config, read_config
from convert.formats.safetensors import tokenizer_from_bytes
from convert.layout import INTERLEAVED, half_split
from convert.names import bundle_name, foreign_model, plain_names
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
    return start == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05")


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
    if content.get("format") == "tinyllm":
        return _read_own(content, path)
    return _read_foreign(content, path, settings=settings)


def load(path: Path) -> Any:
    """Read a file with every tensor as a NumPy array, most of them maps of the file.

    Raises:
        InputError: it is damaged, no PyTorch file, or would run code.
    """
    import torch

    archive = zipfile.is_zipfile(path)
    if archive or _starts_like_zip(path):
        _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it cannot read it raises as well
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        raise InputError(_refusal(path, str(error))) from None
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise InputError(f"{path}: no whole PyTorch file ({first}). Get the file again.") from None
    return _as_numpy(content, torch)


def write(bundle: Bundle, path: Path) -> None:
    """Write everything into one file that `torch.load(weights_only=True)` reads."""
    import torch

    training, tokenizer = bundle.training, bundle.tokenizer
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
    stored = content.get("tokenizer")
    tokenizer = None
    if stored is not None:
        name = content["tokenizer_file"]
        tokenizer = tokenizer_from_bytes(stored.tobytes(), name=name, origin=str(path))
    try:
        arrays = [dict(content[key]) for key in ("weights", "first_moments", "second_moments")]
        text = content["meta"]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path}: a checkpoint of tinyllm without {error}. Convert the source again."
        ) from None
    return from_meta_table(
        text,
        weights=arrays[0],
        first=arrays[1],
        second=arrays[2],
        tokenizer=tokenizer,
        format=NAME,
        origin=str(path),
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
    bundle = Bundle(model, weights, None, None, layout)
    if found["swapped"]:
        bundle.note("feed_forward.w2 and w3 were swapped in the source; their shapes told")
    if "preset" in found:
        bundle.note(
            f"the file holds no settings; those of the preset {found['preset']} were taken, whose "
            "shapes it has (--config NAME or FILE.toml for others)"
        )
    _take_training(bundle, content, arrays, rope=found["rope"], path=path)
    return bundle


def _table_of(content: Mapping[str, Any], path: Path) -> Mapping[str, Any] | None:
    """Find the settings of the model: in the file, or in a config.json beside it."""
    for key in CONFIG_KEYS:
        table = content.get(key)
        if isinstance(table, Mapping):
            table = table["model"] if isinstance(table.get("model"), Mapping) else table
            return check_config(table, origin=f"{path}, {key}")
    beside = path.with_name("config.json")
    return read_config(beside) if beside.is_file() else None


def _take_training(
    bundle: Bundle, content: Mapping[str, Any], arrays: Arrays, *, rope: str, path: Path
) -> None:
    """Take the moments of AdamW along where they can be given names."""
    state = next((content[key] for key in OPTIMIZER_KEYS if content.get(key)), None)
    if not isinstance(state, Mapping):
        return
    plain = plain_names(arrays, origin=str(path))
    names = [bundle_name(name) for name in plain.values()]
    names = [name for name in names if name in bundle.weights]
    moments = adamw_moments(state, names, {name: bundle.weights[name].shape for name in names})
    if moments is None:
        bundle.note("the optimizer's state was left out: its tensors are not those of the weights")
        return
    count, first, second = moments
    if rope == INTERLEAVED:
        first = {name: half_split(name, array, bundle.model) for name, array in first.items()}
        second = {name: half_split(name, array, bundle.model) for name, array in second.items()}
    check_tensors(first, bundle.model, origin=f"{path} (moments)")
    run_table = content["config"] if isinstance(content.get("config"), Mapping) else {}
    step = next((content[key] for key in STEP_KEYS if content.get(key) is not None), count)
    loss = content.get("best_val_loss")
    # llama2.c saves a checkpoint when it is the best so far, unless told to save them all.
    is_best = loss is not None and not run_table.get("always_save_checkpoint")
    bundle.training = foreign_training(
        foreign_run(run_table, bundle.model, origin=str(path)),
        step=int(np.asarray(step)),
        moments=(count, first, second),
        best_loss=float(np.asarray(loss)) if is_best else None,
    )
    bundle.note("the optimizer's state came along; which data it was trained on is not known")


def _as_numpy(value: Any, torch: Any) -> Any:
    """Turn tensors, wherever they stand, into arrays on the same memory."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        if value.layout != torch.strided or value.is_quantized:
            raise InputError("It holds sparse or quantized tensors. Save them dense first.")
        if value.dtype == torch.bfloat16:
            return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return value.numpy()
    if isinstance(value, Mapping):
        return {key: _as_numpy(item, torch) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_numpy(item, torch) for item in value]
    return value


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


def _starts_like_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _check_archive(path: Path) -> None:
    """Refuse archives that PyTorch did not write, before PyTorch words it its way."""
    try:
        entries = zipfile.ZipFile(path).infolist()
    except (zipfile.BadZipFile, ValueError) as error:
        raise InputError(f"{path}: cut short or damaged ({error}). Get the file again.") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise InputError(
            f"{path}: a compressed archive, which PyTorch never writes. Give the file that "
            "torch.save made."
        )
    names = [entry.filename for entry in entries]
    if any(name.endswith("/constants.pkl") or name == "constants.pkl" for name in names):
        raise InputError(
            f"{path}: a TorchScript program, which holds code. Save its state dict instead."
        )
    if not any(re.search(r"(^|/)data\.pkl$", name) for name in names):
        raise InputError(
            f"{path}: a zip archive, and no checkpoint of PyTorch. Give a .pt or .pth file."
        )


def _refusal(path: Path, message: str) -> str:
    """Say which object a pickle would have built."""
    found = re.search(r"GLOBAL ([\w.]+)", message) or re.search(
        r"Unsupported (?:class|global) ([\w.]+)", message
    )
    what = f" ({found[1]})" if found else ""
    return (
        f"{path}: holds Python objects that would run code when read{what}. Only tensors and plain "
        "values are read; save the state dict and a plain dict of settings."
    )
