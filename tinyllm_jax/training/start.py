"""Where a run lives and what it starts from: nothing, weights, or a checkpoint to go on with."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from tinyllm_jax.config import Config, config_to_table, load_config
from tinyllm_jax.data.files import write_file
from tinyllm_jax.data.prepare import PreparedData
from tinyllm_jax.data.tokenizer import check_tokenizer_hash
from tinyllm_jax.errors import InputError
from tinyllm_jax.model.weights import Weights, initial_weights
from tinyllm_jax.settings import build, flatten
from tinyllm_jax.training.checkpoint import (
    Checkpoint,
    damage,
    find_checkpoint,
    mark_best,
    read_checkpoint,
    step_folders,
)
from tinyllm_jax.training.optim import write_moments
from tinyllm_jax.training.step import TrainState, new_state

DEFAULT_PRESET = "tiny"
SNAPSHOT = "training_config_snapshot.json"
# Settings of the model that a checkpoint's weights do not depend on.
FREE_MODEL_SETTINGS = {
    "model.attention",
    "model.attention_dropout",
    "model.compute_dtype",
    "model.embedding_dropout",
    "model.initializer_range",
    "model.max_position_embeddings",
    "model.mlp_dropout",
    "model.residual_dropout",
}


@dataclass(frozen=True)
class Start:
    """What a command line asks for."""

    config: Config
    folder: Path  # the run folder
    resumed: Checkpoint | None  # goes on exactly from here
    initial: Checkpoint | None  # takes the weights and the tokenizer from here

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
        resumed = read_checkpoint(find_checkpoint(Path(resume), on_damaged=say))
        config = settings_of(resumed, overrides, problems)
    else:
        resumed = None
        config = load_config(preset or DEFAULT_PRESET, overrides, problems)
    run = config.run
    name = Path(preset or DEFAULT_PRESET).stem
    folder = Path(run.out) if run.out else Path("checkpoints") / f"{run.mode}_{name}"
    if run.resume not in ("", "none"):
        resumed = resumed or read_checkpoint(find_checkpoint(Path(run.resume), on_damaged=say))
        if not run.out and resumed.folder.parent.name == "checkpoints":
            folder = resumed.folder.parents[1]
    elif run.auto_resume and run.resume != "none" and step_folders(folder):
        resumed = read_checkpoint(find_checkpoint(folder, on_damaged=say))
    initial = None
    if run.init_from and not resumed:
        initial = read_checkpoint(find_checkpoint(Path(run.init_from), on_damaged=say))
    for checkpoint in (resumed, initial):
        if checkpoint:
            check_model(checkpoint, config)
    if resumed:
        check_resume(resumed, config, folder)
        say_changes(resumed, config, say=say)
    return Start(config, folder, resumed, initial)


def settings_of(
    checkpoint: Checkpoint, overrides: Mapping[str, Any], problems: Sequence[str]
) -> Config:
    """Take the settings that a checkpoint was trained with, but where it lay, and put others over.

    Raises:
        InputError: every problem found, one a line.
    """
    kept = flatten(config_to_table(checkpoint.config))
    kept = {key: value for key, value in kept.items() if not key.startswith("run.")}
    return build(Config, [(str(checkpoint.folder), kept), ("", overrides)], problems)


def changes(checkpoint: Checkpoint, config: Config) -> dict[str, tuple[Any, Any]]:
    """List the settings that differ as (checkpoint's value, config's value)."""
    before = flatten(config_to_table(checkpoint.config))
    after = flatten(config_to_table(config))
    ignored = ("run.", "tokenizer.retrain", "tokenizer.path", "data.workers")
    return {
        key: (before[key], after[key])
        for key in after
        if before[key] != after[key] and not key.startswith(ignored)
    }


def check_model(checkpoint: Checkpoint, config: Config) -> None:
    """Refuse settings that would make another model of the checkpoint's weights."""
    differ = {
        key: values
        for key, values in changes(checkpoint, config).items()
        if key.startswith("model.") and key not in FREE_MODEL_SETTINGS
    }
    if differ:
        shown = ", ".join(f"{key}={old} (this run has {new})" for key, (old, new) in differ.items())
        flags = " ".join(f"--{key} {old}" for key, (old, _) in differ.items())
        raise InputError(
            f"{checkpoint.folder}: written with {shown}. Use {flags}, or train a new model with "
            "--out NEW and no --resume, --auto-resume or --init-from."
        )


def check_resume(checkpoint: Checkpoint, config: Config, folder: Path) -> None:
    """Refuse to go on where something would be lost or forgotten."""
    if config.tokenizer.retrain:
        raise InputError(
            f"{checkpoint.folder}: --retrain-tokenizer would change what its ids mean. Leave it "
            "out, or start a new run with --out NEW."
        )
    if not is_run_of(checkpoint, folder):
        return
    later = [path for step, path in step_folders(folder) if step > checkpoint.step]
    good = [path for path in later if damage(path) is None]
    if good:
        raise InputError(
            f"{checkpoint.folder}: {good[-1]} is newer, and going on from here in the same folder "
            f"would overwrite it. Use --resume {folder} to go on from the newest, or add --out "
            "NEW to branch off."
        )


def is_run_of(checkpoint: Checkpoint, folder: Path) -> bool:
    """Tell whether a checkpoint lies in this run folder."""
    return checkpoint.folder.resolve().parent == (folder / "checkpoints").resolve()


def say_changes(checkpoint: Checkpoint, config: Config, *, say: Callable[[str], None]) -> None:
    """Name the settings that are not what they were."""
    for key, (old, new) in changes(checkpoint, config).items():
        say(f"note: {key} was {old} and is {new} from step {checkpoint.step} on.")


def check_data(start: Start, prepared: PreparedData) -> None:
    """Refuse to go on with other data, or with another tokenizer.

    Raises:
        InputError: names both hashes.
    """
    if start.source:
        origin = str(start.source.folder)
        check_tokenizer_hash(
            prepared.tokenizer, expected=start.source.tokenizer_hash, origin=origin
        )
    if start.resumed and start.resumed.dataset_hash != prepared.dataset_hash:
        raise InputError(
            f"{start.resumed.folder}: trained on the data {start.resumed.dataset_hash}, and these "
            f"are {prepared.dataset_hash}. Give the data it was trained on, or start a new run "
            "from its weights with --init-from and --out NEW."
        )


def check_folder(folder: Path) -> None:
    """Refuse a run folder that holds something else.

    Raises:
        InputError: the folder is a file, or holds files that are no run.
    """
    if folder.is_dir() and any(folder.iterdir()) and not is_run(folder):
        raise InputError(
            f"{folder}: holds files that are no run. Name an empty or new folder with --out."
        )


def is_run(folder: Path) -> bool:
    """Tell a run folder from any other."""
    return (folder / SNAPSHOT).is_file()


def open_folder(start: Start, prepared: PreparedData, *, say: Callable[[str], None]) -> None:
    """Make the run folder ready: an older run is set aside, a resumed one goes on."""
    folder, resumed = start.folder, start.resumed
    if resumed and is_run_of(resumed, folder):
        for step, path in step_folders(folder):
            if step > resumed.step:  # damaged, or check_resume would have refused
                path.rename(path.with_name(f"{step}.damaged"))
        if resumed.best and (folder / "checkpoints" / str(resumed.best["step"])).is_dir():
            mark_best(folder, resumed.best["step"])
    else:
        if is_run(folder):
            aside = next(
                path for n in range(1, 10**6) if not (path := Path(f"{folder}.{n}")).exists()
            )
            folder.rename(aside)
            say(f"An earlier run was in {folder}: it is in {aside} now.")
        folder.mkdir(parents=True, exist_ok=True)
        if resumed and resumed.folder.parent.name == "checkpoints":
            metrics = resumed.folder.parents[1] / "metrics.jsonl"
            if metrics.is_file():
                write_file(folder / "metrics.jsonl", metrics.read_bytes())
    prepared.tokenizer.save(folder)
    stats = json.dumps(prepared.stats, indent=1)
    write_file(folder / "dataset_stats.json", stats.encode())
    snapshot = json.dumps(config_to_table(start.config), indent=1)
    write_file(folder / SNAPSHOT, snapshot.encode())


def first_state(start: Start) -> TrainState:
    """Make the state that training begins with."""
    config = start.config
    if start.source is None:
        return new_state(config, initial_weights(config.model, seed=config.train.seed))
    weights: Weights = {name: jnp.array(array) for name, array in start.source.weights.items()}
    state = new_state(config, weights)
    if start.resumed is None:
        return state
    streak = start.resumed.nonfinite_streak
    return TrainState(
        step=jnp.asarray(start.resumed.step, jnp.int32),
        weights=weights,
        optimizer_state=write_moments(state.optimizer_state, start.resumed.moments),
        # A run that stopped at the limit gets as many tries again.
        nonfinite_streak=jnp.asarray(streak % config.train.max_nonfinite_steps, jnp.int32),
    )
