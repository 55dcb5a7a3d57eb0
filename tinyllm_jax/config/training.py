"""Settings of training: the optimizer, the loop, checkpoints, and what is watched and told."""

from dataclasses import dataclass

from tinyllm_jax.settings import setting

# What the numbers of a run can be sent to.
LOGGERS = ("tensorboard", "wandb", "swanlab", "trackio")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon, with linear warm-up, then a way down to a floor, constant after."""

    name: str = setting(
        "adamw",
        "adamw: for every weight; muon: for the matrices inside the blocks, adamw for embedding, "
        "head, routers and norms, at the same learning rate",
        choices=("adamw", "muon"),
    )
    learning_rate: float = setting(5e-4, "peak of the schedule", above=0.0, flag="--learning-rate")
    min_learning_rate: float = setting(
        5e-5, "floor of the schedule; minimind_cosine has its own", minimum=0.0
    )
    schedule: str = setting(
        "cosine",
        "after warm-up: cosine to the floor; wsd: the peak, then linearly to the floor over the last "
        "wsd_decay_share; minimind_cosine: a tenth of the peak more than a cosine to 0, so without "
        "warm-up it starts at 1.1 of the peak, and it ends at 0.1",
        choices=("cosine", "wsd", "minimind_cosine"),
    )
    wsd_decay_share: float = setting(
        0.2,
        "wsd: share of decay_steps that goes down, or all that warm-up leaves",
        above=0.0,
        maximum=1.0,
    )
    warmup_steps: int = setting(
        100,
        "steps from 0 to the peak; the first step already has peak / warmup_steps; a run shorter "
        "than this only warms up",
        unit="steps",
        minimum=0,
        flag="--warmup-steps",
    )
    decay_steps: int = setting(
        0,
        "step at which the floor is reached, warm-up included; 0 is train.max_steps",
        unit="steps",
        minimum=0,
    )
    weight_decay: float = setting(0.1, "decay of matrices; norms have none", minimum=0.0)
    beta1: float = setting(0.9, "adamw: decay of the first moment", minimum=0.0, maximum=0.9999)
    beta2: float = setting(0.95, "adamw: decay of the second moment", minimum=0.0, maximum=0.999999)
    epsilon: float = setting(1e-8, "adamw: added to the root of the second moment", above=0.0)
    muon_momentum: float = setting(
        0.95, "muon: decay of its first moment", minimum=0.0, maximum=0.9999
    )
    max_grad_norm: float = setting(
        1.0, "gradients are scaled down to this global norm; 0 leaves them", minimum=0.0
    )


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, how many rows a step, when to look."""

    max_steps: int = setting(
        300, "optimizer steps of the whole run", unit="steps", minimum=1, flag="--max-steps"
    )
    batch_size: int = setting(
        32, "rows of one forward and backward pass", unit="rows", minimum=1, flag="--batch-size"
    )
    gradient_accumulation_steps: int = setting(
        1, "passes whose gradients make one step", unit="passes", minimum=1
    )
    seed: int = setting(
        42, "seed of weights, batches and dropout", minimum=0, maximum=2**32 - 1, flag="--seed"
    )
    eval_interval_steps: int = setting(
        500, "steps between looks at the validation set", unit="steps", minimum=1
    )
    eval_batches: int = setting(
        100,
        "batches of one look, always the same rows; 0 is the whole validation set",
        unit="batches",
        minimum=0,
    )
    steps_per_dispatch: int = setting(
        1,
        "steps that a device takes without the host between evaluations and checkpoints; more hide "
        "the host's work behind small models",
        unit="steps",
        minimum=1,
    )
    corpus_on_device: str = setting(
        "auto",
        "token shards lie in the memory of each device, which reads its rows there; auto is always "
        "on a GPU or TPU where they take an eighth of its memory at most, and never elsewhere",
        choices=("auto", "always", "never"),
    )
    log_interval_steps: int = setting(
        10, "steps between writes of the metrics file", unit="steps", minimum=1
    )
    max_nonfinite_steps: int = setting(
        10,
        "steps in a row with a loss or gradient that is no number before the run stops; their "
        "updates are never applied",
        unit="steps",
        minimum=1,
    )
    compilation_cache: bool = setting(True, "keep compiled programs on disk between runs")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved and what is kept."""

    interval_steps: int = setting(500, "steps between checkpoints", unit="steps", minimum=1)
    keep: int = setting(
        3, "newest checkpoints kept; the best one is kept besides", unit="checkpoints", minimum=1
    )


@dataclass(frozen=True)
class MonitorConfig:
    """What is watched while a run trains, and what it does by itself when its loss jumps.

    docs/monitoring.md says more.
    """

    interval_steps: int = setting(
        0,
        "steps between looks at each layer: norms of gradient, weights and update, size of activations, "
        "largest attention logit; a look costs about as much as a step; 0 is never",
        unit="steps",
        minimum=0,
    )
    spike_z: float = setting(
        8.0,
        "a loss so many robust standard deviations above the median of the steps before is a spike; "
        "0 looks for none",
        minimum=0.0,
    )
    spike_window: int = setting(
        100,
        "steps before it that a loss is compared with; until there are half as many, or 20, none is",
        unit="steps",
        minimum=10,
    )
    rewinds: int = setting(
        0,
        "times that a run goes back to an earlier checkpoint by itself, after a spike or where losses "
        "are no numbers, and leaves those batches out; then it stops; 0 is never",
        unit="times",
        minimum=0,
    )
    rewind_batches: int = setting(
        10,
        "batches that a rewind leaves out: the one of the spike, and those before it",
        unit="batches",
        minimum=1,
    )
    skip_batches: tuple[str, ...] = setting(
        (),
        "batches that are not trained on, counted from 0: numbers, or spans such as 410-419; rewinds "
        "add theirs",
    )

    def problems(self, mode: str) -> list[str]:
        """List the rules between these settings, or with the mode, that are broken."""
        found = [
            f"monitor.skip_batches={span} is no number or span of batches. Use such as 419 or 410-419."
            for span in self.skip_batches
            if not is_span(span)
        ]
        if self.rewinds > 0 and mode == "rlhf":
            found.append(
                f"monitor.rewinds={self.rewinds}: a rewind leaves batches out, and --mode rlhf makes "
                "each of what the model has just written. Use --monitor.rewinds 0."
            )
        if self.skip_batches and mode == "rlhf":
            found.append(
                f"monitor.skip_batches={' '.join(self.skip_batches)}: --mode rlhf has no batches to "
                "leave out. Leave it out."
            )
        return found


@dataclass(frozen=True)
class LoggingConfig:
    """Where the numbers of a run go besides its metrics.jsonl; docs/monitoring.md says more."""

    to: tuple[str, ...] = setting(
        (), f"loggers, each an extra to install: some of {' '.join(LOGGERS)}"
    )
    project: str = setting("tinyllm", "wandb, swanlab, trackio: project that the run belongs to")
    name: str = setting("", "name of the run there; empty is that of the run folder")
    offline: bool = setting(
        False,
        "wandb, swanlab: send nothing, and keep what `wandb sync` or `swanlab sync` sends later",
    )

    def problems(self) -> list[str]:
        """List the rules between these settings that are broken."""
        unknown = [name for name in self.to if name not in LOGGERS]
        if unknown or len(set(self.to)) < len(self.to):
            return [
                f"logging.to={' '.join(self.to)} is no list of loggers. Use some of "
                f"{' '.join(LOGGERS)}, each once."
            ]
        return []


def is_span(text: str) -> bool:
    """Tell a number from 0, or a span of two such as 410-419, from any other text."""
    first, dash, last = text.partition("-")
    if len(text) > 40:  # no batch has such a number, and Python reads no number of any length
        return False
    if not (first.isdecimal() and first.isascii()):
        return False
    return not dash or (last.isdecimal() and last.isascii() and int(first) <= int(last))
