"""The run and step folders of tinyllm_jax, by Orbax (`tinyllm_jax.training.checkpoint`)."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert.bundle import (
    Bundle,
    Training,
    check_moments,
    check_tensors,
    from_jax,
    make_layout,
    run_config,
    to_jax,
)
from convert.checks import shown
from tinyllm_jax.config import config_to_table
from tinyllm_jax.data.files import write_file
from tinyllm_jax.errors import InputError
from tinyllm_jax.training.start_rules import SNAPSHOT

NAME = "orbax"


def matches(path: Path) -> bool:
    """Tell a step folder, by its state."""
    return path.is_dir() and (path / "meta.json").is_file() and (path / "state").is_dir()


def read(path: Path, *, say: Callable[[str], None]) -> Bundle:
    """Read a step folder whose checksums hold.

    Raises:
        InputError: it is damaged, or was not written by this project.
    """
    from tinyllm_jax.training.checkpoint import find_adapted, merged, read_checkpoint
    from tinyllm_jax.training.step_folders import find_checkpoint

    folder = find_checkpoint(path, on_damaged=say)
    with _refusing_what_others_wrote(folder):
        checkpoint = read_checkpoint(folder)
    lora = checkpoint.config.lora
    if lora.rank > 0:
        find_adapted(folder)
    with _refusing_what_others_wrote(folder):
        checkpoint = merged(checkpoint)
        config, weights = checkpoint.config, from_jax(checkpoint.weights)
    check_tensors(weights, config.model, origin=str(path))
    training = None
    moments: Any = checkpoint.moments
    if moments.first or moments.second:
        first, second = from_jax(moments.first), from_jax(moments.second)
        check_moments(first, second, config, origin=str(path))
        training = Training(
            config=config,
            step=checkpoint.step,
            count=int(moments.count),
            first=first,
            second=second,
            nonfinite_streak=checkpoint.nonfinite_streak,
            seed=config.train.seed,
            rows_per_step=config.rows_per_step,
            dataset_hash=checkpoint.dataset_hash,
            best=checkpoint.best,
        )
    layout = make_layout(
        format=NAME,
        rope="half-split",
        tied=config.model.tie_word_embeddings,
        transposed=True,
        weights=weights,
    )
    bundle = Bundle(config.model, weights, checkpoint.tokenizer, training, layout, run=config)
    if lora.rank > 0:
        bundle.note(
            f"adapters of rank {lora.rank} were merged into the model that they adapt; their moments "
            "were left out"
        )
    return bundle


@contextlib.contextmanager
def _refusing_what_others_wrote(folder: Path) -> Iterator[None]:
    """Turn what goes wrong with a checkpoint whose checksums are right into one line."""
    try:
        yield
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
        FileNotFoundError,
    ) as error:
        reason = str(error) if isinstance(error, InputError) else repr(error)
        raise InputError(
            f"{folder}: no checkpoint that this version writes ({shown(reason)}). Give another one."
        ) from None


def write(bundle: Bundle, path: Path) -> None:
    """Write a run folder with one checkpoint, from which training can go on.

    Raises:
        InputError: there is no tokenizer, which every run folder has.
    """
    from tinyllm_jax.training.checkpoint import write_step_folder
    from tinyllm_jax.training.optim import Moments

    if bundle.tokenizer is None:
        raise InputError(
            f"{bundle.layout['format']}: the source has no tokenizer, and a run folder needs one. "
            "Add --tokenizer PATH."
        )
    training, config = bundle.training, run_config(bundle)
    count = np.asarray(training.count if training else 0, np.int32)
    step = np.asarray(training.step if training else 0, np.int32)
    write_step_folder(
        path / "checkpoints" / str(int(step)),
        weights=to_jax(bundle.weights),
        moments=Moments(
            count,  # type: ignore[arg-type]
            to_jax(training.first) if training else {},  # type: ignore[arg-type]
            to_jax(training.second) if training else {},  # type: ignore[arg-type]
        ),
        step=step,
        nonfinite_streak=np.asarray(training.nonfinite_streak if training else 0, np.int32),
        config=config,
        tokenizer=bundle.tokenizer,
        dataset_hash=training.dataset_hash if training else "",
        best=training.best if training else None,
        remarks={"layout": bundle.layout},
    )
    bundle.tokenizer.save(path)
    write_file(path / SNAPSHOT, json.dumps(config_to_table(config), indent=1).encode())
