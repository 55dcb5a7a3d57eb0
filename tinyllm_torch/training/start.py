"""Where a run lives and what it starts from: nothing, weights, or a checkpoint to go on with.

The small form of `tinyllm_jax.training.start`: fewer ways in, the same refusals.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllm_jax.config import Config, config_to_table, load_config, read_preset
from tinyllm_jax.data.files import write_file
from tinyllm_jax.data.prepare import PreparedData
from tinyllm_jax.errors import InputError
from tinyllm_jax.training.environment import add_start, read_starts
from tinyllm_jax.training.metrics import read_metrics, write_metrics
from tinyllm_jax.training.rewind import keep_left_out, rows_leading_to, still_there
from tinyllm_jax.training.start_rules import (
    SNAPSHOT,
    changes,
    check_model,
    check_moments,
    check_tokenizer_stays,
    is_run,
    is_run_of,
    settings_of,
)
from tinyllm_jax.training.step_folders import run_of, step_folders
from tinyllm_torch.model.weights import as_tensors, initial_weights
from tinyllm_torch.training.checkpoint import Checkpoint, open_checkpoint
from tinyllm_torch.training.devices import default_device, describe_device
from tinyllm_torch.training.optim import Moments, has_second_moment
from tinyllm_torch.training.step import TrainState, new_state

DEFAULT_PRESET = "tiny"


@dataclass(frozen=True)
class Start:
    """What a command line asks for."""

    config: Config
    folder: Path  # the run folder
    resumed: Checkpoint | None  # goes on exactly from here
    initial: Checkpoint | None  # takes the weights and the tokenizer from here
    preset: str | None = None  # whose settings it begins with, if not those of a checkpoint

    @property
    def source(self) -> Checkpoint | None:
        """The checkpoint that the weights come from."""
        return self.resumed or self.initial


def find_start(
    preset: str | None,
    overrides: Mapping[str, Any],
    problems: Sequence[str],
    *,
    say: Callable[[str], None],
) -> Start:
    """Find settings, folder and checkpoint of a run.

    Args:
        preset: What `--config` names. Without it, a resumed run keeps its own settings.
        overrides: Settings of the command line, under dotted keys.
        problems: What is already known to be wrong with the command line.
        say: Tells the person something.

    Raises:
        InputError: settings break rules, or do not fit the checkpoint.
    """
    resume = str(overrides.get("run.resume", ""))
    if preset is None and resume not in ("", "none"):
        resumed = open_checkpoint(Path(resume), on_damaged=say)
        config = settings_of(resumed, overrides, problems)
    else:
        resumed = None
        config = load_config(preset or DEFAULT_PRESET, overrides, problems)
    run = config.run
    name = Path(preset or DEFAULT_PRESET).stem
    # A name of its own, so that neither package sets the other's run aside.
    folder = Path(run.out) if run.out else Path("checkpoints") / f"{run.mode}_{name}_torch"
    if run.resume not in ("", "none"):
        resumed = resumed or open_checkpoint(Path(run.resume), on_damaged=say)
        if not run.out and resumed.is_own:
            folder = run_of(resumed.folder) or folder
    elif run.auto_resume and run.resume != "none" and step_folders(folder):
        resumed = open_checkpoint(folder, on_damaged=say)
    initial = None
    if run.init_from and not resumed:
        initial = open_checkpoint(Path(run.init_from), on_damaged=say)
    if initial:
        check_model(initial, config, goes_on=False)
    if resumed:
        config = keep_left_out(config, resumed.config, step=resumed.step)
        check_model(resumed, config, goes_on=True)
        check_resume(resumed, config, folder)
        for key, (old, new) in changes(resumed, config).items():
            say(f"note: {key} was {old} and is {new} from step {resumed.step} on.")
    return Start(config, folder, resumed, initial, preset or (None if resumed else DEFAULT_PRESET))


def check_resume(checkpoint: Checkpoint, config: Config, folder: Path) -> None:
    """Refuse to go on where something would be lost or forgotten."""
    check_tokenizer_stays(checkpoint, config)
    second = [name for name in checkpoint.weights if has_second_moment(name, config)]
    check_moments(checkpoint, config, second=second)
    later = [path for step, path in step_folders(folder) if step > checkpoint.step]
    if is_run_of(checkpoint, folder) and later:
        raise InputError(
            f"{checkpoint.folder}: {later[-1]} is newer, and going on from here in the same folder "
            f"would overwrite it. Use --resume {folder} to go on from the newest, add --out NEW to "
            "branch off, or remove it if it is damaged."
        )


def check_folder(start: Start) -> None:
    """Refuse a run folder that holds something else, or an earlier run.

    Raises:
        InputError: says which.
    """
    folder = start.folder
    if folder.is_dir() and any(folder.iterdir()) and not is_run(folder):
        raise InputError(
            f"{folder}: holds files that are no run. Name an empty or new folder with --out."
        )
    goes_on = start.resumed and start.resumed.is_own and is_run_of(start.resumed, folder)
    if is_run(folder) and not goes_on:
        raise InputError(
            f"{folder}: holds an earlier run. Go on with it by --resume {folder}, or name another "
            "folder with --out."
        )


def open_folder(start: Start, prepared: PreparedData, *, say: Callable[[str], None]) -> None:
    """Make the run folder ready."""
    folder, resumed = start.folder, start.resumed
    folder.mkdir(parents=True, exist_ok=True)
    starts = []
    if resumed and (run := run_of(resumed.folder)):
        starts, metrics = read_starts(run), read_metrics(run / "metrics.jsonl")
        metrics, remark = rows_leading_to(metrics, resumed.config, step=resumed.step)
        if remark or (metrics and not is_run_of(resumed, folder)):
            write_metrics(folder / "metrics.jsonl", metrics)
        if remark:
            say(remark)
    prepared.tokenizer.save(folder)
    stats = json.dumps(prepared.stats, indent=1)
    write_file(folder / "dataset_stats.json", stats.encode())
    snapshot = json.dumps(config_to_table(start.config), indent=1)
    write_file(folder / SNAPSHOT, snapshot.encode())
    add_start(
        folder,
        earlier=starts,
        step=resumed.step if resumed else 0,
        preset=(start.preset, read_preset(start.preset)[1]) if start.preset else None,
        device=describe_device(),
        packages=("torch",),
    )


def best_so_far(start: Start) -> dict[str, Any] | None:
    """Give step and loss of the best checkpoint that a resumed run still has in its folder."""
    return still_there(start.folder, start.resumed.best) if start.resumed else None


def first_state(start: Start) -> TrainState:
    """Make the state that training begins with."""
    config, device = start.config, default_device()
    if start.resumed:
        return restored_state(start.resumed, config)
    if start.source is None:
        weights = initial_weights(config.model, seed=config.train.seed)
    else:
        weights = start.source.weights
    return new_state(config, as_tensors(weights, config.model, device=device))


def restored_state(checkpoint: Checkpoint, config: Config) -> TrainState:
    """Make the state in which a run goes on exactly where a checkpoint was written."""
    device, (count, *moments) = default_device(), checkpoint.moments
    first, second = (as_tensors(each, config.model, device=device) for each in moments)
    return TrainState(
        step=checkpoint.step,
        weights=as_tensors(checkpoint.weights, config.model, device=device),
        optimizer_state=Moments(count, first, second),
        # A run that stopped at the limit gets as many tries again.
        nonfinite_streak=checkpoint.nonfinite_streak % config.train.max_nonfinite_steps,
    )
