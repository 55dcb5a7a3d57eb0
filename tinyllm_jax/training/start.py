"""Where a run lives and what it starts from: nothing, weights, or a checkpoint to go on with."""

import dataclasses
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from tinyllm_jax.config import (
    Config,
    LoraConfig,
    config_to_table,
    divisors,
    load_config,
    read_preset,
)
from tinyllm_jax.data.files import free_name, sha256_of_file, write_file
from tinyllm_jax.data.tokenizer import Tokenizer
from tinyllm_jax.errors import InputError
from tinyllm_jax.model.layers import parameter_dtype
from tinyllm_jax.model.lora import initial_adapters, is_adapter, trained_names
from tinyllm_jax.model.weights import Weights, initial_weights
from tinyllm_jax.settings import flatten
from tinyllm_jax.training.adaptation import for_conversations, model_table, needs_scores
from tinyllm_jax.training.checkpoint import (
    NO_MOMENTS,
    Checkpoint,
    find_adapted,
    open_checkpoint,
    open_to_resume,
    write_step_folder,
)
from tinyllm_jax.training.distributed import Hosts
from tinyllm_jax.training.environment import add_start, read_starts
from tinyllm_jax.training.metrics import read_metrics, write_metrics
from tinyllm_jax.training.optim import has_second_moment
from tinyllm_jax.training.parallel import Parallel
from tinyllm_jax.training.restored_state import restored_state
from tinyllm_jax.training.rewind import keep_left_out, rows_leading_to, still_there
from tinyllm_jax.training.start_rules import (
    SNAPSHOT,
    changes,
    check_adapters_stay,
    check_mode_stays,
    check_model,
    check_moments,
    check_tokenizer_stays,
    is_run,
    is_run_of,
    settings_of,
)
from tinyllm_jax.training.step import TrainState, new_state
from tinyllm_jax.training.step_folders import REFERENCE, damage, mark_best, run_of, step_folders

# Of each way to learn; all but the first take the model over from a checkpoint.
DEFAULT_PRESETS = {
    "pretrain": "tiny",
    "sft": "sft",
    "dpo": "dpo",
    "reward": "reward",
    "rlhf": "rlhf",
}
# Ways to learn in which a model is held to the one that it began as.
HELD = ("dpo", "rlhf")


@runtime_checkable
class RunData(Protocol):
    """What a run folder keeps of the data of a run."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def stats(self) -> dict[str, Any]: ...


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

    @property
    def reference(self) -> Checkpoint | None:
        """The checkpoint that the run began with, which a resumed one keeps in its folder."""
        if self.resumed is None:
            return self.initial
        path = self.resumed.folder.parents[1] / REFERENCE
        return open_checkpoint(path, on_damaged=_refuse_damaged) if path.is_dir() else None


def find_folder(preset: str | None, overrides: Mapping[str, Any]) -> Path:
    """Name the run folder that a command line asks for, from the names in it alone.

    `--out` names it; a resumed run goes on in its own; the default is `checkpoints/<mode>_<config>`.

    Raises:
        InputError: the checkpoint to resume, or the preset, is not there.
    """
    run = {key: value for key, value in overrides.items() if key.startswith("run.")}
    if preset is not None:
        run = read_preset(preset)[1] | run
    # What is no text is told of with the other settings.
    run = {key: value for key, value in run.items() if isinstance(value, str)}
    if run.get("run.out"):
        if "\0" in run["run.out"]:
            raise InputError("run.out has a NUL character, which no folder has. Leave it out.")
        folder = Path(run["run.out"])
        # A link, or `.`, is another name of the folder, which must have one name to be locked.
        return folder.resolve() if folder.is_symlink() or not folder.name else folder
    resume = run.get("run.resume", "none") or "none"
    if resume != "none":
        path = Path(resume)
        if not path.exists():
            raise InputError(
                f"{path}: no such folder. Name a run folder or one of its checkpoints."
            )
        if path.resolve().parent.name == "checkpoints":
            return path.resolve().parents[1]
        if is_run(path) or (path / "checkpoints").is_dir():
            return path
        preset = preset or path.stem  # from elsewhere, and no place to go on in
    mode = run.get("run.mode", "")
    mode = mode if mode in DEFAULT_PRESETS else Config().run.mode
    name = Path(preset or DEFAULT_PRESETS["pretrain"]).stem
    if preset is None and mode != "pretrain" and run.get("run.init_from"):
        name = run_name(Path(run["run.init_from"]))
    return Path("checkpoints") / f"{mode}_{name}"


def run_name(path: Path) -> str:
    """Name the run that a checkpoint is of, without its mode: `tiny` for `pretrain_tiny/best`."""
    path = path.absolute()
    if path.parent.name == "checkpoints" and path.name.isdigit():
        path = path.parents[1]
    elif path.name == "best":
        path = path.parent
    mode, _, name = path.stem.partition("_")
    return name if mode in DEFAULT_PRESETS and name else path.stem


def find_mode(preset: str | None, overrides: Mapping[str, Any]) -> str:
    """Name the way to learn that a command line asks for; settings are not checked yet."""
    table = read_preset(preset)[1] if preset else {}
    mode = {**table, **overrides}.get("run.mode")
    return mode if isinstance(mode, str) else Config().run.mode


def find_start(
    preset: str | None,
    overrides: Mapping[str, Any],
    problems: Sequence[str],
    folder: Path,
    *,
    say: Callable[[str], None],
) -> Start:
    """Find the settings of a run and the checkpoint that it starts from.

    The run folder must be locked, so that no other process adds or removes checkpoints.

    Args:
        preset: What `--config` names. Without it, a resumed run keeps its own settings.
        overrides: Settings of the command line, under dotted keys.
        problems: What is already known to be wrong with the command line.
        folder: The run folder.
        say: Tells the person something.

    Raises:
        InputError: settings break rules, or do not fit the checkpoint.
    """
    resumed, initial, is_grown = None, None, False
    if preset is None and (path := path_to_resume(overrides, folder)):
        resumed = open_to_resume(path, on_damaged=say)
        config = settings_of(resumed, overrides, problems)
    else:
        mode, below = find_mode(preset, overrides), ("", {})
        if mode in DEFAULT_PRESETS and mode != "pretrain":
            initial, is_grown = begin_conversations(mode, preset, overrides, say=say)
            below = (str(initial.folder), model_table(initial.config))
        preset_name = preset or DEFAULT_PRESETS.get(mode, "tiny")
        config = load_config(preset_name, {"run.mode": mode, **overrides}, problems, below)
    run = config.run
    if resumed is None and run.resume not in ("", "none"):
        resumed = open_to_resume(Path(run.resume), on_damaged=say)
    elif resumed is None and run.auto_resume and run.resume == "" and step_folders(folder):
        resumed = open_to_resume(folder, on_damaged=say)
        if preset is None:
            config = settings_of(resumed, overrides, problems)
    if resumed:
        initial = None
    elif run.init_from and initial is None:
        initial = open_checkpoint(Path(run.init_from), on_damaged=say)
    if initial:
        check_model(initial, config, goes_on=False)
        check_new_tokens(initial, config, is_grown=is_grown)
    if config.lora.rank > 0 and not (resumed or initial):
        raise InputError(
            f"lora.rank={config.lora.rank}: adapters are of a model that is there. Name it with "
            "--init-from: a run folder, or anything that convert reads."
        )
    if resumed:
        config = keep_left_out(config, resumed.config, step=resumed.step)
        check_model(resumed, config, goes_on=True)
        check_resume(resumed, config, folder)
        for key, (old, new) in changes(resumed, config).items():
            say(f"note: {key} was {old} and is {new} from step {resumed.step} on.")
    usual = None if resumed else DEFAULT_PRESETS.get(run.mode, "tiny")
    return Start(config, folder, resumed, initial, preset or usual)


def path_to_resume(overrides: Mapping[str, Any], folder: Path) -> Path | None:
    """Name what a command line without a preset goes on with, if anything."""
    resume = overrides.get("run.resume", "")
    wants_newest = str(overrides.get("run.auto_resume", False)).lower() == "true"
    if resume == "" and wants_newest and step_folders(folder):
        return folder
    return Path(resume) if resume not in ("", "none") else None


def begin_conversations(
    mode: str,
    preset: str | None,
    overrides: Mapping[str, Any],
    *,
    say: Callable[[str], None],
) -> tuple[Checkpoint, bool]:
    """Open what a run of any mode but pretraining begins with, made ready for it.

    Returns:
        The checkpoint, and whether its tokenizer has got new tokens.

    Raises:
        InputError: nothing is named.
    """
    table = {**(read_preset(preset)[1] if preset else {}), **overrides}
    resume = table.get("run.resume", "")
    path = table.get("run.init_from") or (resume if resume != "none" else "")
    if not path:
        raise InputError(
            f"--mode {mode} goes on from a model. Name it with --init-from: a run folder, or anything "
            "that convert reads."
        )
    seed = str(table.get("train.seed", ""))
    seed = int(seed) if seed.isdecimal() else Config().train.seed  # what is none is refused later
    algorithm = str(table.get("rlhf.algorithm", Config().rlhf.algorithm))
    checkpoint = open_checkpoint(Path(path), on_damaged=say)
    ready = for_conversations(checkpoint, scores=needs_scores(mode, algorithm), seed=seed)
    return ready, ready.tokenizer_hash != checkpoint.tokenizer_hash


def check_new_tokens(initial: Checkpoint, config: Config, *, is_grown: bool) -> None:
    """Refuse to leave the rows of new tokens as they begin: as likely as any token, for ever."""
    if is_grown and config.lora.rank > 0 and not config.lora.embeddings:
        raise InputError(
            f"{initial.folder}: this model knows no turns, and adapters alone cannot teach it the two "
            "new tokens that an answer ends with. Add --lora.embeddings true, or fine-tune it once "
            "without --lora.rank."
        )


def _refuse_damaged(text: str) -> None:
    raise InputError(text)


def check_resume(checkpoint: Checkpoint, config: Config, folder: Path) -> None:
    """Refuse to go on where something would be lost or forgotten."""
    check_mode_stays(checkpoint, config)
    if needs_scores(config.run.mode, config.rlhf.algorithm) and not config.model.score_head:
        raise InputError(
            f"{checkpoint.folder}: has no head for scores, which rlhf.algorithm=ppo needs. Start a new "
            "run from its weights with --init-from."
        )
    updates = config.rlhf.updates_per_rollout
    if config.run.mode == "rlhf" and checkpoint.step % updates:
        raise InputError(
            f"{checkpoint.folder}: step {checkpoint.step} would fall between the rlhf."
            f"updates_per_rollout={updates} steps that learn from the same answers. Use one of "
            f"{divisors(checkpoint.step)}."
        )
    check_adapters_stay(checkpoint, config)
    if config.lora.rank > 0:
        find_adapted(checkpoint.folder)
    check_tokenizer_stays(checkpoint, config)
    second = [name for name in checkpoint.weights if has_second_moment(name, config)]
    check_moments(checkpoint, config, second=second)
    if not is_run_of(checkpoint, folder):
        return
    later = [path for step, path in step_folders(folder) if step > checkpoint.step]
    good = [path for path in later if damage(path) is None]
    if good:
        raise InputError(
            f"{checkpoint.folder}: {good[-1]} is newer, and going on from here in the same folder "
            f"would overwrite it. Use --resume {shlex.quote(str(folder))} to go on from the newest, or add --out "
            "NEW to branch off."
        )


def check_folder(folder: Path) -> None:
    """Refuse a run folder that holds something else.

    Raises:
        InputError: the folder is a file, or holds files that are no run.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file. Name a folder with --out.")
    if folder.is_dir() and any(folder.iterdir()) and not is_run(folder):
        raise InputError(
            f"{folder}: holds files that are no run. Name an empty or new folder with --out."
        )


def open_folder(start: Start, prepared: RunData, *, say: Callable[[str], None]) -> None:
    """Make the run folder ready: an older run is set aside, a resumed one goes on."""
    folder, resumed = start.folder, start.resumed
    metrics, remark, starts = [], "", []
    if resumed and (run := run_of(resumed.folder)):
        starts, metrics = read_starts(run), read_metrics(run / "metrics.jsonl")
        metrics, remark = rows_leading_to(metrics, resumed.config, step=resumed.step)
    if remark:
        say(remark)
    goes_on = resumed is not None and is_run_of(resumed, folder)
    if resumed and goes_on:
        for step, path in step_folders(folder):
            if step > resumed.step:  # damaged, or check_resume would have refused
                path.rename(free_name(path.with_name(f"{step}.damaged")))
    else:
        if is_run(folder):
            aside = free_name(folder)
            folder.rename(aside)
            say(f"An earlier run was in {folder}: it is in {aside} now.")
        folder.mkdir(parents=True, exist_ok=True)
    # First, since it is what a run folder is known by.
    snapshot = json.dumps(config_to_table(start.config), indent=1)
    write_file(folder / SNAPSHOT, snapshot.encode())
    stats = json.dumps(prepared.stats, indent=1)
    write_file(folder / "dataset_stats.json", stats.encode())
    prepared.tokenizer.save(folder)
    if remark or (metrics and not goes_on):
        write_metrics(folder / "metrics.jsonl", metrics)
    add_start(
        folder,
        earlier=starts,
        step=resumed.step if resumed else 0,
        preset=usual_settings(start),
        device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        packages=("jax", "jaxlib", "flax", "optax", "orbax-checkpoint"),
    )
    if best := best_so_far(start):
        mark_best(folder, best["step"])


def usual_settings(start: Start) -> tuple[str, dict[str, Any]] | None:
    """Name the preset that a run begins with, and what it sets, the model it takes over included."""
    if start.preset is None:
        return None
    model = {}
    if start.initial and start.config.run.mode != "pretrain":
        model = model_table(start.initial.config)
    return start.preset, {**model, **read_preset(start.preset)[1]}


def keep_reference(start: Start) -> None:
    """Keep the model that the run began with beside it, whatever becomes of the original."""
    path = start.folder / REFERENCE
    adapts = start.config.lora.rank > 0
    if (start.config.run.mode not in HELD and not adapts) or path.is_dir():
        return
    reference = start.reference
    if reference is None:
        return
    write_step_folder(
        path,
        weights=reference.weights,
        moments=NO_MOMENTS,
        step=np.int32(reference.step),
        nonfinite_streak=np.int32(0),
        config=dataclasses.replace(start.config, lora=LoraConfig()),
        tokenizer=reference.tokenizer,
        dataset_hash=reference.dataset_hash,
        best=None,
        remarks={"origin": str(reference.folder)},
    )


def open_together(start: Start, data: RunData, here: Hosts, *, say: Callable[[str], None]) -> None:
    """Let process 0 make the run folder ready, and make sure that all see the same one.

    Raises:
        InputError: the folder is not on a file system that all share.
    """
    here.first(lambda: open_folder(start, data, say=say))
    keep_reference(start)  # as every step folder, by all
    snapshot = start.folder / SNAPSHOT
    seen = sha256_of_file(snapshot) if snapshot.is_file() else "not there"
    here.agree(
        {str(snapshot): seen},
        advice="Checkpoints are written by all: name a folder with --out that all hosts share.",
    )


def facts_of(start: Start) -> dict[str, Any]:
    """Say what a run starts from and with: its settings, but how its processes meet."""
    settings = flatten(config_to_table(start.config))
    facts = {key: value for key, value in settings.items() if not key.startswith("distributed.")}
    source = start.source
    return facts | {
        "run folder": str(start.folder),
        "step": start.resumed.step if start.resumed else 0,
        "checkpoint": sha256_of_file(source.folder / "checksums.json")
        if source and (source.folder / "checksums.json").is_file()
        else "",
    }


def best_so_far(start: Start) -> dict[str, Any] | None:
    """Give step and loss of the best checkpoint that a resumed run still has in its folder."""
    return still_there(start.folder, start.resumed.best) if start.resumed else None


def frozen_weights(start: Start, parallel: Parallel) -> Weights:
    """Read the weights that a run with adapters does not train, into their places on the devices."""
    config = start.config
    if config.lora.rank == 0:
        return {}
    reference = start.reference
    assert reference is not None, "check_resume asks for it"
    trained = trained_names(config.model, config.lora)
    kept = {name: array for name, array in reference.weights.items() if name not in trained}
    return parallel.place_weights(kept, parameter_dtype(config.model))


def first_adapters(start: Start, parallel: Parallel) -> TrainState:
    """Make the state in which a run begins to train adapters."""
    config = start.config
    assert start.initial is not None
    trained = trained_names(config.model, config.lora)
    others = {name: start.initial.weights[name] for name in trained if not is_adapter(name)}

    def build(others: Weights) -> TrainState:
        adapters = initial_adapters(config.model, config.lora, seed=config.train.seed)
        return new_state(config, {**adapters, **others})

    return parallel.make_state(build, parallel.place_weights(others, parameter_dtype(config.model)))


def first_state(start: Start, parallel: Parallel) -> TrainState:
    """Make the state that training begins with, in its places on the devices."""
    config, dtype = start.config, parameter_dtype(start.config.model)

    def untrained() -> TrainState:
        return new_state(config, initial_weights(config.model, seed=config.train.seed))

    if start.source is None:
        return parallel.make_state(untrained)
    if start.resumed is None and config.lora.rank > 0:
        return first_adapters(start, parallel)
    if start.resumed:
        return restored_state(start.resumed, config, parallel)
    weights = parallel.place_weights(start.source.weights, dtype)
    return parallel.make_state(lambda weights: new_state(config, weights), weights)
