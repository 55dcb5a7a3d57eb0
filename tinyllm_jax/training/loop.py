"""The one training loop: every objective brings batches and a loss, `fit` does the rest."""

import itertools
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from tinyllm_jax.config import Config
from tinyllm_jax.data.batches import prefetch
from tinyllm_jax.data.files import replacing
from tinyllm_jax.data.tokenizer import Tokenizer
from tinyllm_jax.model.weights import Weights, flops_per_token
from tinyllm_jax.training.checkpoint import mark_best, prune_checkpoints, save_checkpoint
from tinyllm_jax.training.devices import peak_flops
from tinyllm_jax.training.metrics import MetricsFile
from tinyllm_jax.training.progress import Progress
from tinyllm_jax.training.report import write_report
from tinyllm_jax.training.signals import stop_on_signals
from tinyllm_jax.training.step import (
    LossSum,
    LossWeight,
    TrainState,
    make_evaluation_step,
    make_train_step,
)

HostBatch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Objective:
    """What a run learns: its batches and its loss."""

    loss_sum: LossSum
    loss_weight: LossWeight
    train_batch: Callable[[int], HostBatch]  # batch number, from 0; a pure function
    evaluation_batches: Callable[[], Iterable[HostBatch]]  # always the same
    describe_loss: Callable[[float], dict[str, float]]  # other ways to say a validation loss


@dataclass(frozen=True)
class Identity:
    """What a checkpoint must say about where its numbers come from."""

    tokenizer: Tokenizer
    dataset_hash: str


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    state: TrainState
    best: dict[str, Any] | None  # {"step", "loss"} of the lowest validation loss
    stopped_by: signal.Signals | None
    nonfinite: str  # why the run stopped early, if losses or gradients were not finite


class _Run:
    """The state of one call of `fit` that its stages share: files, clock and numbers not yet
    written."""

    def __init__(self, folder: Path, config: Config, first_step: int):
        self.folder, self.config = folder, config
        self.metrics = MetricsFile(folder / "metrics.jsonl", resume_step=first_step)
        self.progress = Progress(first_step=first_step, max_steps=config.train.max_steps)
        self.peak, self.peak_source = peak_flops()
        self.pending: list[tuple[int, dict[str, jax.Array]]] = []
        self.waited_seconds = 0.0
        self.restart_clock()
        self.streak = 0

    def restart_clock(self) -> None:
        """Start a new stretch of steps, for speeds that leave compiling and evaluating out."""
        self.clock, self.clock_steps, self.waited_seconds = time.perf_counter(), 0, 0.0

    def write_steps(self, *, leave: int, train_batch: Callable[[int], HostBatch]) -> None:
        """Fetch and write the numbers of finished steps.

        Args:
            leave: Newest steps left for later, so that the device is not waited for while it
                works on them.
            train_batch: Gives a batch again, to be kept where its numbers are not finite.
        """
        ready = self.pending[: len(self.pending) - leave]
        if not ready:
            return
        self.pending = self.pending[len(ready) :]
        rows: list[dict[str, Any]] = []
        for (step, _), numbers in zip(
            ready, jax.device_get([numbers for _, numbers in ready]), strict=True
        ):
            plain = {name: float(value) for name, value in numbers.items()}
            self.streak = int(plain.pop("nonfinite_streak"))
            rows.append({"kind": "train", "step": step, **plain, "skipped": self.streak > 0})
            if self.streak:
                rows.append(self._keep_batch(step, train_batch(step - 1)))
        rows.append(self._speed(rows[-1 if not self.streak else -2]))
        self.metrics.write(rows)

    def _speed(self, last: Mapping[str, Any]) -> dict[str, Any]:
        config, seconds = self.config, max(time.perf_counter() - self.clock, 1e-9)
        tokens = self.clock_steps * config.rows_per_step * config.data.sequence_length
        speed = tokens / seconds
        per_token = flops_per_token(config.model, sequence_length=config.data.sequence_length)
        mfu = speed * per_token / self.peak
        left = config.train.max_steps - last["step"]
        step_seconds = seconds / max(self.clock_steps, 1)
        self.progress.show(
            step=last["step"],
            loss=last["loss"],
            learning_rate=last["learning_rate"],
            tokens_per_second=speed,
            mfu=mfu,
            seconds_left=left * step_seconds,
        )
        return {
            "kind": "speed",
            "step": last["step"],
            "time": time.time(),
            "tokens_per_second": speed,
            "mfu": mfu,
            "data_wait_share": self.waited_seconds / seconds,
        }

    def _keep_batch(self, step: int, batch: HostBatch) -> dict[str, Any]:
        """Save the batch of a step whose loss or gradient was not finite, and say where."""
        path = self.folder / "nonfinite" / f"step_{step}.npz"
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **batch)  # type: ignore[arg-type]
        self.progress.note(
            f"step {step}: loss or gradient not finite; weights left as they were, batch kept in "
            f"{path}"
        )
        return {"kind": "nonfinite", "step": step, "batch": step - 1, "file": path.name}


def evaluate(
    evaluation_step: Callable[..., Any], weights: Weights, batches: Iterable[HostBatch]
) -> float:
    """Average the loss over all targets of the batches, in nats per target."""
    sums = [evaluation_step(weights, batch) for batch in batches]
    fetched = np.asarray(jax.device_get(sums), np.float64)
    return float(fetched[:, 0].sum() / fetched[:, 1].sum())


def fit(
    objective: Objective,
    state: TrainState,
    *,
    structure: nnx.GraphDef,
    config: Config,
    folder: Path,
    identity: Identity,
    best: dict[str, Any] | None,
    sample: Callable[[Weights], str],
) -> Outcome:
    """Train from `state` to `train.max_steps`, saving and looking on the way.

    Batch number s - 1 makes step s, so a state and its step say everything about what comes next.

    Args:
        objective: Batches and loss.
        state: New, or from a checkpoint; its buffers are donated to the first step.
        structure: Structure of the model whose weights the state holds.
        config: All settings.
        folder: The run folder; metrics after the state's step are dropped and come again.
        identity: Goes into every checkpoint.
        best: Lowest validation loss so far, from the checkpoint.
        sample: Writes a continuation with the weights, at each evaluation.
    """
    train_step = jax.jit(
        make_train_step(config, structure, objective.loss_sum, objective.loss_weight),
        donate_argnums=0,
    )
    evaluation_step = jax.jit(
        make_evaluation_step(structure, objective.loss_sum, objective.loss_weight)
    )
    settings, first_step = config.train, int(state.step)
    run = _Run(folder, config, first_step)
    nonfinite = ""

    def look(step: int) -> bool:
        """Evaluate and sample; tell whether the loss is the lowest so far."""
        nonlocal best
        loss = evaluate(evaluation_step, state.weights, objective.evaluation_batches())
        described = objective.describe_loss(loss)
        text = sample(state.weights)
        run.metrics.write(
            [
                {"kind": "eval", "step": step, "loss": loss, **described},
                {"kind": "sample", "step": step, "text": text},
            ]
        )
        details = ", ".join(f"{name.replace('_', ' ')} {x:.4g}" for name, x in described.items())
        run.progress.note(f"step {step}: validation loss {loss:.4f} ({details})\n  {text}\n")
        improved = best is None or loss < best["loss"]
        if improved:
            best = {"step": step, "loss": loss}
        return improved

    def save(*, is_best: bool) -> None:
        run.metrics.flush_to_disk()
        save_checkpoint(
            folder,
            state,
            config=config,
            tokenizer=identity.tokenizer,
            dataset_hash=identity.dataset_hash,
            best=best,
        )
        if is_best:
            mark_best(folder, int(state.step))
        best_step = best["step"] if best else None
        prune_checkpoints(folder, keep=config.checkpoint.keep, best_step=best_step)

    with (
        stop_on_signals() as wish,
        prefetch(objective.train_batch, start_step=first_step, depth=2) as batches,
    ):
        for step in range(first_step + 1, settings.max_steps + 1):
            asked = time.perf_counter()
            batch = next(batches)
            run.waited_seconds += time.perf_counter() - asked
            state, numbers = train_step(state, batch)
            run.pending.append((step, numbers))
            run.clock_steps += 1
            if step == first_step + 1:
                jax.block_until_ready(numbers)  # compiled: only now the clock means something
                run.restart_clock()
            is_last = step == settings.max_steps or wish.received is not None
            if step % settings.log_interval_steps == 0:
                run.write_steps(leave=1, train_batch=objective.train_batch)
            is_look = step % settings.eval_interval_steps == 0 or step == settings.max_steps
            is_save = is_last or step % config.checkpoint.interval_steps == 0
            if run.streak >= settings.max_nonfinite_steps:
                nonfinite = _nonfinite_message(step, run.streak)
                is_last, is_save, is_look = True, True, False
            run.progress.advance(step)
            if is_look or is_save:
                run.write_steps(leave=0, train_batch=objective.train_batch)
                improved = look(step) if is_look else False
                if is_save or improved:
                    save(is_best=improved)
                write_report(folder, config)
                run.restart_clock()
            if is_last:
                break
    run.progress.close()
    run.metrics.close()
    return Outcome(state, best, wish.received, nonfinite)


def _nonfinite_message(step: int, streak: int) -> str:
    return (
        f"stopped at step {step}: {streak} steps in a row had a loss or gradient that is not "
        f"finite. The weights are those of step {step - streak}; the batches are kept in "
        "nonfinite/. Try a lower --learning-rate or a longer --warmup-steps."
    )
