"""Checkpoints: whole or not there, checked when read, newest good one first.

A step folder `checkpoints/<step>/` holds

    model.safetensors      weights, under their dotted names
    optimizer.safetensors  moments, as `first_moments.NAME` and `second_moments.NAME`
    meta.json              step, data position, seed, config, counters, hashes of tokenizer and
                           data, best so far
    tokenizer.*            the tokenizer, so that the folder stands alone
    checksums.json         SHA-256 of every file above

It is written under a hidden name and renamed when every byte is on the disk, so a process killed
during a save leaves the earlier checkpoints and nothing that looks like a new one. Nothing in it is
a pickle, so reading one never runs code.
"""

import importlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tinyllm_jax.config import Config, config_from_table, config_to_table
from tinyllm_jax.data.files import write_file
from tinyllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from tinyllm_jax.errors import InputError
from tinyllm_jax.training.step_folders import find_checkpoint, finish_step_folder, step_folders
from tinyllm_jax.training.weight_shapes import check_weights, weight_shapes
from tinyllm_torch.model.weights import Weights, as_tensors
from tinyllm_torch.training.optim import Moments
from tinyllm_torch.training.step import TrainState

FORMAT = 1
WEIGHTS, MOMENTS = "model.safetensors", "optimizer.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """One step folder, read and checked; tensors are on the CPU."""

    folder: Path
    is_own: bool  # written in this package's form, not read by `convert` from another
    step: int
    config: Config
    weights: Weights
    moments: Moments  # without tensors where only weights are known
    nonfinite_streak: int
    tokenizer: Tokenizer
    tokenizer_hash: str
    dataset_hash: str
    best: dict[str, Any] | None  # {"step", "loss"} of the lowest validation loss so far


def holds_checkpoint(path: Path) -> bool:
    """Tell whether a path is a run or step folder that this package wrote, damaged or not."""
    folders = [path, *(folder for _, folder in step_folders(path))]
    return any(
        (folder / WEIGHTS).exists() and (folder / "meta.json").exists() for folder in folders
    )


def save_checkpoint(
    run: Path,
    state: TrainState,
    *,
    config: Config,
    tokenizer: Tokenizer,
    dataset_hash: str,
    best: Mapping[str, Any] | None,
) -> Path:
    """Write `checkpoints/<step>/` of this state and give its path.

    A folder of the same step is replaced. When writing fails, nothing is left of the new one.
    """
    folder = run / "checkpoints" / str(state.step)
    partial = folder.with_name(f".{state.step}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        moments = state.optimizer_state
        named = {f"first_moments.{name}": value for name, value in moments.first.items()}
        named |= {f"second_moments.{name}": value for name, value in moments.second.items()}
        for file, tensors in ((WEIGHTS, state.weights), (MOMENTS, named)):
            save_file({name: value.contiguous() for name, value in tensors.items()}, partial / file)
        meta = {
            "format": FORMAT,
            "step": state.step,
            "data_position": {"next_step": state.step, "rows_per_step": config.rows_per_step},
            "seed": config.train.seed,
            "config": config_to_table(config),
            "tokenizer_hash": tokenizer.hash,
            "dataset_hash": dataset_hash,
            "best": dict(best) if best else None,
            "count": moments.count,
            "nonfinite_streak": state.nonfinite_streak,
        }
        write_file(partial / "meta.json", json.dumps(meta, indent=1).encode())
        tokenizer.save(partial)
        finish_step_folder(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def open_checkpoint(path: Path, *, on_damaged: Callable[[str], None]) -> Checkpoint:
    """Read the newest good checkpoint of a run or step folder, or of anything `convert` reads.

    Raises:
        InputError: there is none.
    """
    if holds_checkpoint(path) or not path.exists():
        return read_checkpoint(find_checkpoint(path, on_damaged=on_damaged))
    # By name: to read one's own, convert need not be there.
    convert = importlib.import_module("convert")
    bundle = convert.read(path, say=on_damaged)
    if bundle.tokenizer is None:
        raise InputError(
            f"{path}: holds no tokenizer. Convert it, with --tokenizer PATH, and give that."
        )
    training, model = bundle.training, bundle.model
    moments = Moments(0, {}, {})
    if training:
        both = (training.first, training.second)
        first, second = (as_tensors(each, model, device="cpu") for each in both)
        moments = Moments(training.count, first, second)
    return Checkpoint(
        folder=Path(bundle.layout["read_from"]),
        is_own=False,
        step=training.step if training else 0,
        config=importlib.import_module("convert.bundle").run_config(bundle),
        weights=as_tensors(bundle.weights, model, device="cpu"),
        moments=moments,
        nonfinite_streak=training.nonfinite_streak if training else 0,
        tokenizer=bundle.tokenizer,
        tokenizer_hash=bundle.tokenizer.hash,
        dataset_hash=training.dataset_hash if training else "",
        best=training.best if training else None,
    )


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a step folder that `find_checkpoint` has found good.

    Raises:
        InputError: another version wrote it, or its weights are not those of its settings.
    """
    meta = json.loads((folder / "meta.json").read_text())
    if meta["format"] != FORMAT:
        raise InputError(
            f"{folder}: checkpoint format {meta['format']}, this version reads {FORMAT}. Use the "
            "version of tinyllm that wrote it."
        )
    config = config_from_table(meta["config"], origin=str(folder / "meta.json"))
    weights = load_file(folder / WEIGHTS)
    check_weights(weights, weight_shapes(config.model), folder=folder)
    # convert writes none where it knows the weights only.
    moments = load_file(folder / MOMENTS) if (folder / MOMENTS).is_file() else {}
    first, second = (
        {
            name.removeprefix(prefix): value
            for name, value in moments.items()
            if name.startswith(prefix)
        }
        for prefix in ("first_moments.", "second_moments.")
    )
    return Checkpoint(
        folder=folder,
        is_own=True,
        step=meta["step"],
        config=config,
        weights=weights,
        moments=Moments(meta["count"], first, second),
        nonfinite_streak=meta["nonfinite_streak"],
        tokenizer=load_tokenizer(folder),
        tokenizer_hash=meta["tokenizer_hash"],
        dataset_hash=meta["dataset_hash"],
        best=meta["best"],
    )
