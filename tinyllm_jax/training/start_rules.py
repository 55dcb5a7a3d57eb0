"""What the settings and data of a run must have in common with the checkpoint it starts from.

Shared with the twin: imports no framework.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tinyllm_jax.config import Config, config_to_table, merge_settings
from tinyllm_jax.data.tokenizer import Tokenizer, check_tokenizer_hash
from tinyllm_jax.errors import InputError
from tinyllm_jax.settings import flatten

SNAPSHOT = "training_config_snapshot.json"
# Settings of the model that its weights do not depend on: any run may change them...
FREE_MODEL_SETTINGS = {
    f"model.{name}"
    for name in (
        *("attention", "compute_dtype", "activation_checkpointing", "scan_layers"),
        *("embedding_dropout", "attention_dropout", "residual_dropout", "mlp_dropout"),
        *("router_aux_loss_coef", "router_aux_loss_level", "router_z_loss_coef"),
        *("initializer_range", "max_position_embeddings"),
    )
}
# ... and a new run from old weights may stretch their positions, too.
STRETCHING = "model.rope_"
NEVER_STRETCHED = "model.rope_theta"
# Where text is prepared changes no byte of it.
HOW_PREPARED = ("data.workers", "data.runner", "data.ray_address")


@runtime_checkable
class Saved(Protocol):
    """What is asked of a checkpoint here, in either framework."""

    @property
    def folder(self) -> Path: ...
    @property
    def config(self) -> Config: ...
    @property
    def weights(self) -> Mapping[str, Any]: ...
    @property
    def moments(self) -> Any: ...
    @property
    def tokenizer_hash(self) -> str: ...
    @property
    def dataset_hash(self) -> str: ...


@runtime_checkable
class Prepared(Protocol):
    """What is asked of the data of a run here."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def dataset_hash(self) -> str: ...


def settings_of(checkpoint: Saved, overrides: Mapping[str, Any], problems: Sequence[str]) -> Config:
    """Take the settings that a checkpoint was trained with, but where it lay, and put others over.

    Raises:
        InputError: every problem found, one a line.
    """
    kept = flatten(config_to_table(checkpoint.config))
    once = ("run.", "distributed.", "tokenizer.retrain")  # said of one command, not of the run
    kept = {
        key: value for key, value in kept.items() if key == "run.mode" or not key.startswith(once)
    }
    return merge_settings([(str(checkpoint.folder), kept)], [("", overrides)], problems)


def changes(checkpoint: Saved, config: Config) -> dict[str, tuple[Any, Any]]:
    """List the settings that differ as (checkpoint's value, config's value)."""
    before = flatten(config_to_table(checkpoint.config))
    after = flatten(config_to_table(config))
    ignored = ("run.", "distributed.", "tokenizer.retrain", "tokenizer.path", *HOW_PREPARED)
    return {
        key: (before[key], after[key])
        for key in after
        if before[key] != after[key] and not key.startswith(ignored)
    }


def check_model(checkpoint: Saved, config: Config, *, goes_on: bool) -> None:
    """Refuse settings that would make another model of the checkpoint's weights.

    Args:
        goes_on: The run is that of the checkpoint; a new one may stretch positions.
    """

    def is_free(key: str) -> bool:
        stretches = key.startswith(STRETCHING) and key != NEVER_STRETCHED
        return key in FREE_MODEL_SETTINGS or (stretches and not goes_on)

    differ = {
        key: values
        for key, values in changes(checkpoint, config).items()
        if key.startswith("model.") and not is_free(key)
    }
    if differ:
        shown = ", ".join(f"{key}={old} (this run has {new})" for key, (old, new) in differ.items())
        flags = " ".join(f"--{key} {old}" for key, (old, _) in differ.items())
        raise InputError(
            f"{checkpoint.folder}: written with {shown}. Use {flags}, or train a new model with "
            "--out NEW and no --resume, --auto-resume or --init-from."
        )


def check_moments(checkpoint: Saved, config: Config, *, second: Iterable[str]) -> None:
    """Refuse to go on without moments, or with those of another optimizer.

    Args:
        second: The weights of which the optimizer of this run keeps a second moment.
    """
    if not checkpoint.moments.first:
        raise InputError(
            f"{checkpoint.folder}: holds weights only, no optimizer state to go on with. Start a "
            "new run from them with --init-from."
        )
    before, now = checkpoint.config.optimizer.name, config.optimizer.name
    if before != now:
        raise InputError(
            f"{checkpoint.folder}: holds moments of optimizer.name={before}, and this run has {now}. "
            f"Use --optimizer.name {before}, or start a new run from its weights with --init-from."
        )
    moments = checkpoint.moments
    if moments.first.keys() != checkpoint.weights.keys() or moments.second.keys() != set(second):
        raise InputError(
            f"{checkpoint.folder}: its moments are not those of optimizer.name={now}. Start a new "
            "run from its weights with --init-from."
        )


def check_mode_stays(checkpoint: Saved, config: Config) -> None:
    """Refuse to go on with a run in another way to learn."""
    before, now = checkpoint.config.run.mode, config.run.mode
    if before != now:
        raise InputError(
            f"{checkpoint.folder}: a run of --mode {before}, and this one is of {now}. Start a new run "
            "from its weights with --init-from."
        )


def check_adapters_stay(checkpoint: Saved, config: Config) -> None:
    """Refuse to go on with other adapters than a run has, or with some where it has none."""
    before, now = checkpoint.config.lora, config.lora
    for name in ("rank", "alpha", "targets"):
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            words = " ".join(old) if name == "targets" else f"{old:g}"
            given = " ".join(new) if name == "targets" else f"{new:g}"
            raise InputError(
                f"{checkpoint.folder}: trained with lora.{name}={words}, and this run has {given}. Use "
                f"--lora.{name} {words}, or start a new run from its weights with --init-from."
            )


def check_tokenizer_stays(checkpoint: Saved, config: Config) -> None:
    """Refuse to train the tokenizer of a run that goes on again."""
    if config.tokenizer.retrain:
        raise InputError(
            f"{checkpoint.folder}: --retrain-tokenizer would change what its ids mean. Leave it "
            "out, or start a new run with --out NEW."
        )


def check_data(source: Saved | None, resumed: Saved | None, prepared: Prepared) -> None:
    """Refuse to go on with other data, or with another tokenizer.

    Args:
        source: The checkpoint that the weights come from.
        resumed: The same where the run goes on from it.

    Raises:
        InputError: names both hashes.
    """
    if source:
        origin = str(source.folder)
        check_tokenizer_hash(prepared.tokenizer, expected=source.tokenizer_hash, origin=origin)
    # Checkpoints of other projects do not say which data they saw.
    if resumed and resumed.dataset_hash not in ("", prepared.dataset_hash):
        raise InputError(
            f"{resumed.folder}: trained on the data {resumed.dataset_hash}, and these are "
            f"{prepared.dataset_hash}. Give the data it was trained on, or start a new run from its "
            "weights with --init-from and --out NEW."
        )


def is_run_of(checkpoint: Saved, folder: Path) -> bool:
    """Tell whether a checkpoint lies in this run folder."""
    return checkpoint.folder.resolve().parent == (folder / "checkpoints").resolve()


def is_run(folder: Path) -> bool:
    """Tell a run folder from any other."""
    return (folder / SNAPSHOT).is_file()
