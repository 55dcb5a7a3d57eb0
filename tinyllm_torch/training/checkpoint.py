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
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tinyllm_jax.config import Config, config_from_table, config_to_table
from tinyllm_jax.data.files import sha256_of_file, write_file
from tinyllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from tinyllm_jax.errors import InputError
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


def step_folders(run: Path) -> list[tuple[int, Path]]:
    """List the finished checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    names = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return sorted((int(path.name), path) for path in names)


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
        sums = {name: sha256_of_file(partial / name) for name in _files_below(partial)}
        write_file(partial / "checksums.json", json.dumps(sums, indent=1).encode())
        for path in [*partial.iterdir(), partial]:
            _flush_to_disk(path)
        if folder.exists():
            _remove(folder)
        partial.rename(folder)
        _flush_to_disk(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def mark_best(run: Path, step: int) -> None:
    """Let `best` point at `checkpoints/<step>`, without a moment in which there is none."""
    pointer = run / ".best.new"
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(Path("checkpoints") / str(step), target_is_directory=True)
    pointer.replace(run / "best")


def prune_checkpoints(run: Path, *, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one, and leftovers of crashes."""
    for step, folder in step_folders(run)[:-keep]:
        if step != best_step:
            _remove(folder)
    for pattern in (".*.partial", ".*.removed"):
        for leftover in (run / "checkpoints").glob(pattern):
            shutil.rmtree(leftover)


def damage(folder: Path) -> str | None:
    """Say what is wrong with a step folder's files, or None when every checksum holds."""
    try:
        sums = json.loads((folder / "checksums.json").read_text())
        for name, expected in dict(sums).items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if sha256_of_file(folder / name) != expected:
                return f"{name} does not have its checksum"
    except (OSError, ValueError, TypeError) as error:
        return f"its files cannot be read and compared with checksums.json ({error})"
    unknown = set(_files_below(folder)) - set(sums) - {"checksums.json"}
    if unknown:
        return f"{sorted(unknown)[0]} was not there when it was written"
    return None


def find_checkpoint(path: Path, *, on_damaged: Callable[[str], None]) -> Path:
    """Turn a run or step folder into a step folder whose checksums hold.

    Of a run the newest good checkpoint is taken; each damaged newer one is named through
    `on_damaged`.

    Raises:
        InputError: the path is no run or step folder, or everything in it is damaged.
    """
    if (path / "meta.json").is_file() or (path / "checksums.json").is_file():
        problem = damage(path)
        if problem:
            raise InputError(
                f"{path}: damaged checkpoint ({problem}). Name the run folder to take the newest "
                "good one."
            )
        return path.resolve()  # `best` is another name for a step
    if not path.exists():
        raise InputError(f"{path}: no such folder. Name a run folder or one of its checkpoints.")
    folders = step_folders(path)
    for _, folder in reversed(folders):
        problem = damage(folder)
        if problem is None:
            return folder
        on_damaged(f"{folder}: damaged checkpoint ({problem}); the one before it is used.")
    if folders:
        raise InputError(f"{path}: every checkpoint in it is damaged. Start again with --out NEW.")
    raise InputError(
        f"{path}: neither a run folder nor a checkpoint. Name a folder that holds checkpoints/."
    )


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
        InputError: another version wrote it.
    """
    meta = json.loads((folder / "meta.json").read_text())
    if meta["format"] != FORMAT:
        raise InputError(
            f"{folder}: checkpoint format {meta['format']}, this version reads {FORMAT}. Use the "
            "version of tinyllm that wrote it."
        )
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
        config=config_from_table(meta["config"], origin=str(folder / "meta.json")),
        weights=load_file(folder / WEIGHTS),
        moments=Moments(meta["count"], first, second),
        nonfinite_streak=meta["nonfinite_streak"],
        tokenizer=load_tokenizer(folder),
        tokenizer_hash=meta["tokenizer_hash"],
        dataset_hash=meta["dataset_hash"],
        best=meta["best"],
    )


def _files_below(folder: Path) -> list[str]:
    """List the files of a step folder, but hidden ones, which file managers leave behind."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(p.relative_to(folder).as_posix() for p in paths if not p.name.startswith("."))


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    """Take a checkpoint's name away first, so that a half-removed one never looks whole."""
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)
