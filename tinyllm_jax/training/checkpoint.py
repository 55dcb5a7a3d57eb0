"""Checkpoints: whole or not there, checked when read, newest good one first.

A step folder `checkpoints/<step>/` holds

    state/           weights, moments and counters, by Orbax, under their dotted names; of a run that
                     trains adapters only these, and `reference/` of the run folder holds the model
    meta.json        step, data position, seed, config, hashes of tokenizer and data, best so far
    tokenizer.*      the tokenizer, so that the folder stands alone
    checksums.json   SHA-256 of every file above

With several processes each writes what only its devices hold, and process 0 all else.

It is written under a hidden name and renamed when every byte is on the disk, so a process killed
during a save leaves the earlier checkpoints and nothing that looks like a new one.
"""

import contextlib
import dataclasses
import gc
import importlib
import json
import logging
import os
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from tinyllm_jax.config import Config, LoraConfig, config_from_table, config_to_table
from tinyllm_jax.data.files import write_file
from tinyllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from tinyllm_jax.errors import InputError
from tinyllm_jax.model.lora import merge_adapters
from tinyllm_jax.training.distributed import hosts
from tinyllm_jax.training.optim import Moments, read_moments
from tinyllm_jax.training.step import TrainState
from tinyllm_jax.training.step_folders import (
    REFERENCE,
    damage,
    find_checkpoint,
    finish_step_folder,
    remove_while_written,
    run_of,
)
from tinyllm_jax.training.weight_shapes import check_weights, trained_shapes

FORMAT = 1
# Orbax keeps a data file in memory until it has this size; by default 2 GB, a second checkpoint.
DATA_FILE_BYTES = 1 << 24
# Where its tasks complain, and what one says that outlives the failure of another.
_LIBRARIES_OF_ORBAX = ("asyncio", "concurrent.futures")
_CLOSED_LOOP = "Event loop is closed"
_NOT_BEGUN = (
    r"coroutine '(\w*Handler\.\w+|_?async_serialize\w*(\.<locals>\.\w+)?|"
    r"\S*_coro_with_registration)' was never awaited"
)
NO_MOMENTS: Any = Moments(np.int32(0), {}, {})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Checkpoint:
    """One step folder, read and checked; arrays are NumPy."""

    folder: Path
    step: int
    config: Config
    weights: dict[str, np.ndarray]
    moments: Moments
    nonfinite_streak: int
    tokenizer: Tokenizer
    tokenizer_hash: str
    dataset_hash: str  # "" where the source does not say which data it was
    best: dict[str, Any] | None  # {"step", "loss"} of the lowest validation loss so far


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
    return write_step_folder(
        run / "checkpoints" / str(int(state.step)),
        weights=state.weights,
        moments=read_moments(state.optimizer_state),
        step=state.step,
        nonfinite_streak=state.nonfinite_streak,
        config=config,
        tokenizer=tokenizer,
        dataset_hash=dataset_hash,
        best=best,
        remarks={},
    )


def write_step_folder(
    folder: Path,
    *,
    weights: Mapping[str, Any],
    moments: Moments,
    step: Any,
    nonfinite_streak: Any,
    config: Config,
    tokenizer: Tokenizer,
    dataset_hash: str,
    best: Mapping[str, Any] | None,
    remarks: Mapping[str, Any],
) -> Path:
    """Write a step folder from arrays of JAX or NumPy, whole or not at all, and give its path.

    Args:
        weights: The flat dictionary of `tinyllm_jax.model.weights`.
        moments: Of the same names; empty where only weights are known.
        step: Batches taken, int32 as the other counters.
        remarks: Further keys of `meta.json`, for people to read.
    """
    partial, here = folder.with_name(f".{folder.name}.partial"), hosts()

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    here.first(begin)
    try:
        tree = {
            "weights": dict(weights),
            "first_moments": dict(moments.first),
            "second_moments": dict(moments.second),
            "count": moments.count,
            "step": step,
            "nonfinite_streak": nonfinite_streak,
        }
        saving = _quiet_orbax(saves=True)
        with saving, ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            try:
                saved = ocp.args.PyTreeSave(tree, ocdbt_target_data_file_size=DATA_FILE_BYTES)
                checkpointer.save((partial / "state").absolute(), args=saved)
            except ValueError as error:
                raise _as_os_error(error, path=partial) from error
            except OSError as error:
                error.filename = error.filename or str(partial)
                raise
        meta = {
            "format": FORMAT,
            "step": int(step),
            "data_position": {"next_step": int(step), "rows_per_step": config.rows_per_step},
            "seed": config.train.seed,
            "config": config_to_table(config),
            "tokenizer_hash": tokenizer.hash,
            "dataset_hash": dataset_hash,
            "best": dict(best) if best else None,
            **remarks,
        }

        def finish() -> None:
            write_file(partial / "meta.json", json.dumps(meta, indent=1).encode())
            tokenizer.save(partial)
            finish_step_folder(partial, folder)

        here.meet()  # every process has written its part
        here.first(finish)
    except BaseException:
        if here.is_first:
            remove_while_written(partial)
        raise
    return folder


def open_checkpoint(
    path: Path, *, on_damaged: Callable[[str], None], prefer_best: bool = False
) -> Checkpoint:
    """Read the newest good checkpoint of a run or step folder, or of anything `convert` reads.

    Adapters are merged into the model that they adapt.

    Args:
        on_damaged: Told of each checkpoint that is passed over.
        prefer_best: Of a run folder, `best` is taken where it is good.

    Raises:
        InputError: there is none, or it has no tokenizer.
    """
    return merged(open_to_resume(path, on_damaged=on_damaged, prefer_best=prefer_best))


def merged(checkpoint: Checkpoint) -> Checkpoint:
    """Give the whole model of a checkpoint that may hold adapters, then without their moments.

    Raises:
        InputError: the model that they adapt is not in the run folder.
    """
    if checkpoint.config.lora.rank == 0:
        return checkpoint
    frozen = read_checkpoint(find_adapted(checkpoint.folder)).weights
    config = dataclasses.replace(checkpoint.config, lora=LoraConfig())
    return dataclasses.replace(
        checkpoint,
        config=config,
        weights=merge_adapters(frozen, checkpoint.weights, lora=checkpoint.config.lora),
        moments=NO_MOMENTS,
    )


def find_adapted(folder: Path) -> Path:
    """Find the model that the adapters of a step folder adapt.

    Raises:
        InputError: it is not in the run folder, or damaged.
    """
    run = run_of(folder) or folder
    problem = damage(run / REFERENCE) if (run / REFERENCE).is_dir() else "it is not there"
    if problem:
        raise InputError(
            f"{folder}: holds adapters of the model in {run / REFERENCE}, and that cannot be read "
            f"({problem}). Put the whole run folder back."
        )
    return run / REFERENCE


def open_to_resume(
    path: Path, *, on_damaged: Callable[[str], None], prefer_best: bool = False
) -> Checkpoint:
    """Read a checkpoint as `open_checkpoint` does, but adapters as they are, with their moments."""
    signs = ["checkpoints", "meta.json", "checksums.json"]
    if prefer_best:
        signs.append("best/checksums.json")
    if any((path / sign).exists() for sign in signs) or not path.exists():
        path = find_checkpoint(path, on_damaged=on_damaged, prefer_best=prefer_best)
        if (path / "state").is_dir():
            with _refusing_what_others_wrote(path):
                return read_checkpoint(path)
    # By name, since convert reads step folders through this module.
    bundles = importlib.import_module("convert.bundle")
    bundle = importlib.import_module("convert").read(path, say=on_damaged)
    if bundle.tokenizer is None:
        raise InputError(
            f"{path}: holds no tokenizer. Convert it with python -m convert and --tokenizer PATH, "
            "and give that."
        )
    training = bundle.training
    count: Any = np.int32(training.count if training else 0)
    first, second = (training.first, training.second) if training else ({}, {})
    return Checkpoint(
        folder=Path(bundle.layout["read_from"]),
        step=training.step if training else 0,
        config=bundles.run_config(bundle),
        weights=bundles.to_jax(bundle.weights),
        moments=Moments(count, bundles.to_jax(first), bundles.to_jax(second)),
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
    reading = _quiet_orbax(saves=False)
    with reading, ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = _restore_as_numpy(checkpointer, (folder / "state").absolute())
    check_weights(tree["weights"], trained_shapes(config), folder=folder)
    return Checkpoint(
        folder=folder,
        step=int(tree["step"]),
        config=config,
        weights=tree["weights"],
        moments=Moments(tree["count"], tree["first_moments"], tree["second_moments"]),
        nonfinite_streak=int(tree["nonfinite_streak"]),
        tokenizer=load_tokenizer(folder),
        tokenizer_hash=meta["tokenizer_hash"],
        dataset_hash=meta["dataset_hash"],
        best=meta["best"],
    )


@contextlib.contextmanager
def _refusing_what_others_wrote(folder: Path) -> Iterator[None]:
    """Turn what goes wrong with a checkpoint whose checksums are right into one line.

    Checksums tell damage; they do not tell who wrote what they are of.
    """
    try:
        yield
    except InputError:
        raise
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        FileNotFoundError,
    ) as error:
        reason = " ".join(repr(error).split())
        raise InputError(
            f"{folder}: no checkpoint that this version writes ({reason[:300]}). Give another one."
        ) from None


def _restore_as_numpy(checkpointer: ocp.Checkpointer, state: Path) -> dict[str, Any]:
    """Restore without a target: one that carries shardings fails on another number of devices."""
    metadata: Any = checkpointer.metadata(state).item_metadata
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
        metadata.tree,
        is_leaf=lambda x: not isinstance(x, dict),
    )
    return checkpointer.restore(state, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


@contextlib.contextmanager
def _quiet_orbax(*, saves: bool) -> Iterator[None]:
    """Keep Orbax's lines and tracebacks off the terminal; its errors are raised, and told once.

    After an error its other tasks go on complaining when they end or are collected, at whatever moment.
    A save that fails ends the run, and they stay quiet for good; of a read, only threads of TensorStore.
    """
    hooks = sys.excepthook, sys.unraisablehook
    logger, *others = (logging.getLogger(name) for name in ("absl", *_LIBRARIES_OF_ORBAX))
    level, *levels = (each.level for each in (logger, *others))
    failed = False
    logger.setLevel(logging.CRITICAL + 1)

    def tell_exception(kind: Any, error: BaseException, trace: Any) -> None:
        if _CLOSED_LOOP not in str(error):
            hooks[0](kind, error, trace)

    def tell_unraisable(found: Any) -> None:
        if _CLOSED_LOOP not in str(found.exc_value):
            hooks[1](found)

    # TensorStore's threads print what they cannot hand to a task through these.
    sys.excepthook, sys.unraisablehook = tell_exception, tell_unraisable
    filters = contextlib.nullcontext() if saves else warnings.catch_warnings()
    try:
        with filters:
            if not saves:
                warnings.filterwarnings("ignore", message=_NOT_BEGUN, category=RuntimeWarning)
            try:
                yield
            except BaseException:
                failed = True
                for library in others:
                    library.setLevel(logging.CRITICAL)
                if saves:
                    logger.addFilter(_is_no_leftover)
                    warnings.filterwarnings("ignore", message=_NOT_BEGUN, category=RuntimeWarning)
                else:
                    gc.collect()  # what complains when it is collected does so now
                raise
    finally:
        logger.setLevel(level)
        if not (failed and saves):
            sys.excepthook, sys.unraisablehook = hooks
            for library, before in zip(others, levels, strict=True):
                library.setLevel(before)
        if failed and not saves and not isinstance(sys.unraisablehook, _TellAllButLateReads):
            sys.unraisablehook = _TellAllButLateReads(sys.unraisablehook)


class _TellAllButLateReads:
    """A hook that passes on all but what threads of TensorStore say of a loop that has ended.

    Reads that the failure of another has left without a task were seen to end a second later. Errors of
    threads that Python began are told, whatever they say.
    """

    def __init__(self, told: Callable[[Any], Any]):
        self._told = told

    def __call__(self, found: Any) -> None:
        of_python = not isinstance(threading.current_thread(), threading._DummyThread)
        if of_python or _CLOSED_LOOP not in str(found.exc_value):
            self._told(found)


def _is_no_leftover(record: logging.LogRecord) -> bool:
    """Tell records of others from those of threads that Orbax began for a save that failed."""
    in_background = threading.current_thread() is not threading.main_thread()
    return not (in_background and "orbax" in Path(record.pathname).parts)


def _as_os_error(error: ValueError, *, path: Path) -> Exception:
    """Turn TensorStore's words for a failure of the disk into the exception that Python has."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    if found is None:
        return error
    code = int(found[1])
    return OSError(code, os.strerror(code), str(path))
