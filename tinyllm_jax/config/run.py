"""All settings of one run, and the rules between sections."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from tinyllm_jax.config.data import ChatConfig, DataConfig, TokenizerConfig
from tinyllm_jax.config.devices import DistributedConfig, ParallelConfig
from tinyllm_jax.config.model import ModelConfig, divisors
from tinyllm_jax.config.modes import LoraConfig, PreferenceConfig, RlhfConfig
from tinyllm_jax.config.serving import SamplingConfig
from tinyllm_jax.config.training import (
    CheckpointConfig,
    LoggingConfig,
    MonitorConfig,
    OptimizerConfig,
    TrainConfig,
)
from tinyllm_jax.settings import setting


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives and what it starts from."""

    mode: str = setting(
        "pretrain",
        "what is learnt: all text (pretrain), the answers of conversations (sft), to prefer one of "
        "two answers (dpo), to score answers (reward), or what brings rewards (rlhf); all but the "
        "first begin with --init-from",
        choices=("pretrain", "sft", "dpo", "reward", "rlhf"),
        flag="--mode",
    )
    out: str = setting(
        "",
        "run folder; default checkpoints/<mode>_<config>, or the name of the run in --init-from in "
        "place of <config>",
        flag="--out",
    )
    resume: str = setting(
        "", "go on from this run or step folder, exactly; none starts afresh", flag="--resume"
    )
    auto_resume: bool = setting(
        False, "go on from the run folder's newest checkpoint if it has one", flag="--auto-resume"
    )
    dry_run: bool = setting(
        False,
        "compile the step, print its memory and speed on made-up rows, and stop before any data is "
        "read or anything written",
        flag="--dry-run",
    )
    profile: int = setting(
        0,
        "steps, after those that compile, of which a trace for Perfetto and XProf is written to the "
        "run folder's profile/; 0 is none",
        unit="steps",
        minimum=0,
        flag="--profile",
    )
    init_from: str = setting(
        "", "start from the weights (only) of this run or step folder", flag="--init-from"
    )


@dataclass(frozen=True)
class Config:
    """All settings of one run."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    chat: ChatConfig = dataclasses.field(default_factory=ChatConfig)
    dpo: PreferenceConfig = dataclasses.field(default_factory=PreferenceConfig)
    rlhf: RlhfConfig = dataclasses.field(default_factory=RlhfConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    monitor: MonitorConfig = dataclasses.field(default_factory=MonitorConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)

    def __post_init__(self):
        if self.data.packing == "auto":
            packing = "stream" if self.run.mode == "pretrain" else "packed"
            object.__setattr__(self, "data", dataclasses.replace(self.data, packing=packing))

    def problems(self) -> list[str]:
        """List every rule between settings that is broken."""
        found = self.model.problems() + self.parallel.problems() + self.distributed.problems()
        found += self.division_problems(
            {axis: max(size, 1) for axis, size in self.parallel.sizes().items()}
        )
        if self.run.dry_run and self.run.mode not in ("pretrain", "sft"):
            found.append(
                f"run.dry_run compiles the step of next tokens, and --mode {self.run.mode} has another. "
                "Leave it out, or look at --mode sft."
            )
        if self.data.runner == "ray" and self.run.mode != "pretrain":
            found.append(
                f"data.runner=ray prepares text, and what --mode {self.run.mode} reads is prepared on this "
                "machine. Use --data.runner local."
            )
        if self.run.mode == "dpo":
            found += self.dpo.problems()
        if self.run.mode == "rlhf":
            found += self.rlhf.problems() + self.rollout_problems()
        optimizer = self.optimizer
        found += self.lora.problems(self.model, optimizer.name)
        found += self.monitor.problems(self.run.mode) + self.logging.problems()
        if self.data.sequence_length > self.model.max_position_embeddings:
            found.append(
                f"data.sequence_length={self.data.sequence_length} is longer than "
                f"model.max_position_embeddings={self.model.max_position_embeddings}. Use "
                f"{self.model.max_position_embeddings} or less, or raise the other."
            )
        floored = optimizer.schedule != "minimind_cosine"
        if floored and optimizer.min_learning_rate > optimizer.learning_rate:
            found.append(
                f"optimizer.min_learning_rate={optimizer.min_learning_rate} is above "
                f"optimizer.learning_rate={optimizer.learning_rate}. Use "
                f"{optimizer.learning_rate / 10:g} or another number below it."
            )
        if not self.data.paths:
            found.append("data.paths is empty. Give --data NAME or PATH.")
        if self.run.resume not in ("", "none") and self.run.init_from:
            found.append(
                "run.resume and run.init_from are both set. Keep --resume to go on with a run, or "
                "--init-from to start a new one from its weights."
            )
        return found

    def rollout_problems(self) -> list[str]:
        """List what does not divide into rollouts."""
        found, size, rows = [], self.rlhf.group_size, self.rows_per_step
        if rows % size:
            found.append(
                f"rlhf.group_size={size} does not divide the {rows} answers of a step (train.batch_size "
                f"x gradient_accumulation_steps). Use one of {divisors(rows)}."
            )
        steps = self.rlhf.updates_per_rollout
        for name, number in (
            ("train.max_steps", self.train.max_steps),
            ("train.eval_interval_steps", self.train.eval_interval_steps),
            ("checkpoint.interval_steps", self.checkpoint.interval_steps),
        ):
            if number % steps:
                found.append(
                    f"{name}={number} falls between the rlhf.updates_per_rollout={steps} steps that "
                    f"learn from the same answers. Use {max(number // steps, 1) * steps}."
                )
        if steps % self.train.steps_per_dispatch:
            found.append(
                f"train.steps_per_dispatch={self.train.steps_per_dispatch} does not divide "
                f"rlhf.updates_per_rollout={steps}. Use one of {divisors(steps)}."
            )
        return found

    def division_problems(self, sizes: Mapping[str, int]) -> list[str]:
        """List what a grid of devices cannot divide evenly, each with the numbers that it could.

        Args:
            sizes: Devices along each axis, at least 1.
        """
        model, found = self.model, []
        inner = "moe_intermediate_size" if model.num_experts > 0 else "intermediate_size"
        divided = {
            "fsdp": ("hidden_size",),
            "tensor": ("num_attention_heads", "num_key_value_heads", inner, "vocab_size"),
            "expert": ("num_experts",),
        }
        for axis, names in divided.items():
            whole = [getattr(model, name) for name in names]
            for name, number in zip(names, whole, strict=True):
                if sizes[axis] > 1 and (number % sizes[axis] or number == 0):
                    fitting = divisors(math.gcd(*whole)) or [1]
                    found.append(
                        f"parallel.{axis}={sizes[axis]} does not divide model.{name}={number}. Use "
                        f"one of {fitting}."
                    )
                    break
        rows, devices = self.train.batch_size, sizes["data"] * sizes["fsdp"] * sizes["expert"]
        if rows % devices:
            below, above = rows // devices * devices, -(-rows // devices) * devices
            found.append(
                f"parallel.data x fsdp x expert = {devices} does not divide train.batch_size={rows} "
                f"(rows of a pass). Use --batch-size {f'{below} or ' if below else ''}{above}, or "
                f"sizes with a product of {divisors(rows)}."
            )
        if self.parallel.strategy == "pmap" and model.num_experts > 0:
            found.append(
                f"parallel.strategy=pmap trains no experts, and model.num_experts="
                f"{model.num_experts}: their load must be known over all rows. Use "
                "--parallel.strategy mesh."
            )
        return found

    @property
    def decay_steps(self) -> int:
        """Step at which the learning rate reaches its floor, warm-up included."""
        return self.optimizer.decay_steps or self.train.max_steps

    @property
    def rows_per_step(self) -> int:
        """Rows of tokens that one optimizer step sees."""
        return self.train.batch_size * self.train.gradient_accumulation_steps
