"""The one training loop: every objective brings batches and a loss, `fit` does the rest."""

import itertools
import math
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinyllm_jax.config import Config
from tinyllm_jax.data.batches import prefetch
from tinyllm_jax.data.tokenizer import Tokenizer
from tinyllm_jax.training.figures import LOSS
from tinyllm_jax.training.loggers import open_loggers
from tinyllm_jax.training.metrics import MetricsFile
from tinyllm_jax.training.monitor import Monitor
from tinyllm_jax.training.progress import Progress
from tinyllm_jax.training.report import write_report
from tinyllm_jax.training.rewind import Course, describe_no_rewind, go_back
from tinyllm_jax.training.signals import stop_on_signals
from tinyllm_jax.training.step_folders import mark_best, prune_checkpoints, step_folders
from tinyllm_torch.model.transformer import Transformer
from tinyllm_torch.model.weights import Weights
from tinyllm_torch.training.checkpoint import read_checkpoint, save_checkpoint
from tinyllm_torch.training.start import restored_state
from tinyllm_torch.training.step import (
    LossSums,
    LossWeight,
    TrainState,
    make_evaluation_step,
    make_train_step,
)
from tinyllm_torch.training.step_log import StepLog

HostBatch = dict[str, np.ndarray]
# Batches that are made ahead of the step in hand.
PREFETCH_DEPTH = 2


@dataclass(frozen=True)
class Objective:
    """What a run learns: its batches and its loss."""

    loss_sums: LossSums
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
    nonfinite: str  # why the run stopped early, if its numbers made it


def evaluate(
    evaluation_step: Callable[..., Any], weights: Weights, batches: Iterable[HostBatch]
) -> dict[str, Any]:
    """Average what is told of each batch over all their targets; `loss` is in nats per target."""
    found = [evaluation_step(weights, batch) for batch in batches]
    sums, targets = zip(*found, strict=True)
    return {
        name: (torch.stack([each[name] for each in sums]).double().sum(0) / sum(targets)).tolist()
        for name in sums[0]
    }


def fit(
    objective: Objective,
    state: TrainState,
    *,
    structure: Transformer,
    config: Config,
    folder: Path,
    identity: Identity,
    best: dict[str, Any] | None,
    sample: Callable[[Weights], str],
) -> Outcome:
    """Train from `state` to `train.max_steps`, saving and looking on the way.

    Batch number s - 1 makes step s, unless some are left out, so a state and its step and the settings
    say everything about what comes next.

    Args:
        objective: Batches and loss.
        state: New, or from a checkpoint.
        structure: Structure of the model whose weights the state holds.
        config: All settings.
        folder: The run folder; metrics after the state's step are dropped and come again.
        identity: Goes into every checkpoint.
        best: Lowest validation loss so far, from the checkpoint.
        sample: Writes a continuation with the weights, at each evaluation.
    """
    train_step = make_train_step(config, structure, objective.loss_sums, objective.loss_weight)
    evaluation_step = make_evaluation_step(structure, objective.loss_sums, objective.loss_weight)
    settings, first_step = config.train, state.step
    nonfinite = ""
    with (
        MetricsFile(folder / "metrics.jsonl", resume_step=first_step) as metrics,
        Progress(first_step=first_step, max_steps=settings.max_steps) as progress,
        open_loggers(
            config, folder, past := metrics.rows(), writes=True, say=progress.note
        ) as loggers,
        stop_on_signals() as wish,
        _Batches(objective, Course(config, past=past), first_step=first_step) as batches,
    ):
        metrics.send_to(loggers)
        monitor, course = Monitor(config, past=past, note=progress.note), batches.course
        log = StepLog(
            folder,
            config=config,
            train_batch=objective.train_batch,
            course=course,
            monitor=monitor,
            metrics=metrics,
            progress=progress,
        )

        def look(step: int) -> bool:
            """Evaluate and sample; tell whether the loss is the lowest so far."""
            nonlocal best
            means = evaluate(evaluation_step, state.weights, objective.evaluation_batches())
            loss = means["loss"]
            described, text = objective.describe_loss(loss), sample(state.weights)
            metrics.write(
                [
                    {"kind": "eval", "step": step, **means, **described},
                    {"kind": "sample", "step": step, "text": text},
                ]
            )
            figure = LOSS.say(loss)
            progress.show_evaluation(step=step, figure=figure, described=described, text=text)
            if not math.isfinite(loss) or (best is not None and loss >= best["loss"]):
                return False
            best = {"step": step, "loss": loss}
            return True

        def save(*, is_best: bool) -> None:
            metrics.flush_to_disk()
            save_checkpoint(
                folder,
                state,
                config=course.write_into(config),
                tokenizer=identity.tokenizer,
                dataset_hash=identity.dataset_hash,
                best=best,
            )
            if is_best:
                mark_best(folder, state.step)
            best_step = best["step"] if best else None
            # While steps fail, the run may have to go back to before the first of them.
            if config.monitor.rewinds == 0 or state.nonfinite_streak == 0:
                prune_checkpoints(folder, keep=config.checkpoint.keep, best_step=best_step)

        write_report(folder, goes_on=True)
        if config.monitor.rewinds > 0 and not step_folders(folder):
            save(is_best=False)  # so that there is one to go back to from the first
        while state.step < settings.max_steps:
            step = state.step + 1
            asked = time.perf_counter()
            batch = next(batches.ahead)
            waited_seconds = time.perf_counter() - asked
            state, numbers = train_step(state, batch)
            log.add(step, numbers, waited_seconds=waited_seconds)
            progress.advance(step)
            if step == first_step + 1:
                log.restart_clock()  # the first step also warms up
            log.write_due(step)
            is_end = step == settings.max_steps
            is_look = is_end or step % settings.eval_interval_steps == 0
            is_save = is_end or step % config.checkpoint.interval_steps == 0
            is_stop = wish.received is not None
            if is_look or is_save or is_stop:
                log.write()
            if trouble := monitor.trouble:
                chosen = go_back(
                    *(folder, config, trouble, course, monitor, metrics, progress),
                    once=lambda work: work(),
                )
                if chosen is None:
                    nonfinite = describe_no_rewind(config, trouble, rewinds=monitor.rewinds)
                    is_stop = True
                else:
                    path, best = chosen
                    back = read_checkpoint(path)
                    state = restored_state(back, config)
                    batches.go_back(back.step)
                    log.forget()
                    loggers.begin(metrics.rows(), config)
                write_report(folder, goes_on=not is_stop)
                if is_stop:
                    break
                continue
            if log.longest_streak >= settings.max_nonfinite_steps:
                log.write()
                nonfinite = describe_nonfinite(step, streak=log.longest_streak)
                is_stop = True
            if is_look or is_save or is_stop:
                improved = is_look and look(step)
                if is_save or is_stop or improved:
                    save(is_best=improved)
                write_report(folder, goes_on=not (is_end or is_stop))
                log.restart_clock()
            if is_stop:
                break
    return Outcome(state, best, wish.received, nonfinite)


class _Batches:
    """The batches of each step, read ahead."""

    def __init__(self, objective: Objective, course: Course, *, first_step: int):
        self._objective, self.course = objective, course
        self._begin(first_step)

    def _begin(self, first_step: int) -> None:
        steps = itertools.count(first_step + 1)
        self._reading = prefetch(
            lambda step: self._objective.train_batch(self.course.batch(step)),
            steps,
            depth=PREFETCH_DEPTH,
        )

    def __enter__(self) -> "_Batches":
        self.ahead = self._reading.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._reading.__exit__(*error)

    def go_back(self, step: int) -> None:
        """Go on after an earlier step, with the batches that the course has by now."""
        self.__exit__(None, None, None)
        self._begin(step)
        self.__enter__()


def describe_nonfinite(step: int, *, streak: int) -> str:
    """Say why a run of steps that are no numbers ends, and what to try."""
    return (
        f"stopped at step {step}: {streak} steps in a row had a loss or gradient that is not "
        f"finite, and left the weights as they were. Their batches are kept in nonfinite/. Try a "
        "lower --learning-rate or a longer --warmup-steps."
    )
