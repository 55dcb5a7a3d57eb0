"""The one training loop: every objective brings batches and a loss, `fit` does the rest."""

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx

from tinyllm_jax.config import Config
from tinyllm_jax.data.batches import prefetch
from tinyllm_jax.data.files import sha256_of_file
from tinyllm_jax.data.tokenizer import Tokenizer
from tinyllm_jax.model.weights import Weights
from tinyllm_jax.training.adapters import make_whole, trained_structure
from tinyllm_jax.training.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from tinyllm_jax.training.distributed import Hosts, hosts, stop_together
from tinyllm_jax.training.figures import LOSS, Figure
from tinyllm_jax.training.layer_look import is_layer_look, make_layer_look
from tinyllm_jax.training.loggers import open_loggers
from tinyllm_jax.training.metrics import MetricsFile
from tinyllm_jax.training.monitor import Monitor, Trouble
from tinyllm_jax.training.parallel import Parallel
from tinyllm_jax.training.profile import Profile
from tinyllm_jax.training.progress import Progress, Silent
from tinyllm_jax.training.report import write_report
from tinyllm_jax.training.restored_state import restored_state
from tinyllm_jax.training.rewind import Course, describe_no_rewind, go_back
from tinyllm_jax.training.step import (
    Fixed,
    LossSums,
    LossWeight,
    ReadRows,
    TrainState,
    make_evaluation_step,
    make_train_step,
    scan_steps,
)
from tinyllm_jax.training.step_folders import mark_best, prune_checkpoints, step_folders
from tinyllm_jax.training.step_log import StepLog

HostBatch = dict[str, np.ndarray]
# Dispatches whose batches are made ahead of the one in hand.
PREFETCH_DEPTH = 2


@dataclass(frozen=True)
class Objective:
    """What a run learns: its batches and its loss."""

    loss_sums: LossSums
    loss_weight: LossWeight
    # Batch number, from 0, and the places of the rows to read (all, if None); a pure function.
    train_batch: Callable[..., HostBatch]
    evaluation_batches: Callable[..., Iterable[HostBatch]]  # of such rows; always the same
    describe_loss: Callable[[float], dict[str, float]]  # other ways to say a validation loss
    shown: tuple[str, ...] = ()  # what else an evaluation tells a person
    corpus: "DeviceCorpus | None" = None  # where the device reads the rows of training batches
    rollouts: "Rollouts | None" = None  # what makes batches and evaluations with the live weights
    figure: Figure = LOSS  # what evaluations are judged by
    # What follows from the numbers that a step told.
    describe_step: Callable[[Mapping[str, Any]], dict[str, float]] = lambda _: {}


@runtime_checkable
class Rollouts(Protocol):
    """Learning from what the model itself writes: its batches depend on the weights."""

    steps: int  # that learn from the same batch; checkpoints fall between these

    def batch(self, weights: Weights, number: int) -> tuple[HostBatch, dict[str, Any]]:
        """Make the batch of the steps after `number` steps, and what is told of it."""
        ...

    def evaluate(self, weights: Weights) -> tuple[dict[str, Any], str]:
        """Tell numbers, `loss` among them, and something to read."""
        ...


@dataclass(frozen=True)
class DeviceCorpus:
    """Token shards that lie on the device, in whose stead a batch names places in them."""

    arrays: HostBatch
    read_rows: ReadRows
    places: Callable[[int], HostBatch]  # batch number, from 0; a pure function


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
    evaluation_step: Callable[..., Any], weights: Weights, batches: Iterable[dict[str, Any]]
) -> dict[str, Any]:
    """Average what is told of each batch over all their targets; `loss` is in nats per target."""
    found = jax.device_get([evaluation_step(weights, batch) for batch in batches])
    sums, targets = zip(*found, strict=True)
    return {
        name: (
            np.sum([each[name] for each in sums], axis=0, dtype=np.float64) / sum(targets)
        ).tolist()
        for name in sums[0]
    }


def fit(
    objective: Objective,
    state: TrainState,
    *,
    frozen: Weights,
    structure: nnx.GraphDef,
    config: Config,
    parallel: Parallel,
    folder: Path,
    identity: Identity,
    best: dict[str, Any] | None,
    sample: Callable[[Weights], str],
    look_first: bool,
) -> Outcome:
    """Train from `state` to `train.max_steps`, saving and looking on the way.

    Batch number s - 1 makes step s, unless some are left out, so a state and its step and the settings
    say everything about what comes next.

    Args:
        objective: Batches and loss.
        state: New, or from a checkpoint; its buffers are donated to the first step.
        frozen: The weights that are not trained, in their places: all but the adapters, or none.
        structure: Structure of the model.
        config: All settings.
        parallel: The devices, on which the state is.
        folder: The run folder; metrics after the state's step are dropped and come again.
        identity: Goes into every checkpoint.
        best: Lowest validation loss so far, from the checkpoint.
        sample: Writes a continuation with the weights, at each evaluation.
        look_first: Evaluate before the first step, too, to compare with what the weights came with.
    """
    here, corpus, first_step = hosts(), objective.corpus, int(state.step)
    sums = (objective.loss_sums, objective.loss_weight)
    read_rows = corpus.read_rows if corpus else None
    train_step = make_train_step(config, trained_structure(config), *sums, read_rows)
    train_steps = parallel.compile_train_steps(scan_steps(train_step))
    look_at_layers = parallel.compile_evaluation_step(make_layer_look(config, *sums, read_rows))
    evaluation_step = parallel.compile_evaluation_step(make_evaluation_step(structure, *sums))
    fixed = Fixed(frozen, parallel.place_corpus(corpus.arrays) if corpus else {})
    whole = make_whole(config, frozen, parallel)
    settings, nonfinite = config.train, ""
    shown = Progress if here.is_first else Silent
    with (
        here.first_writes(folder) as notes,
        MetricsFile(_same_rows(folder, notes, here), resume_step=first_step) as metrics,
        shown(first_step=first_step, max_steps=settings.max_steps) as progress,
        open_loggers(
            config, folder, past := metrics.rows(), writes=here.is_first, say=progress.note
        ) as loggers,
        stop_together() as wish,
        _Feed(objective, config, parallel, past, first_step=first_step) as feed,
    ):
        metrics.send_to(loggers)
        profile = Profile(notes, steps=config.run.profile, progress=progress)
        monitor = Monitor(config, past=past, note=progress.note)
        log = StepLog(
            notes,
            config=config,
            train_batch=feed.host_batch,
            describe_step=objective.describe_step,
            course=feed.course,
            monitor=monitor,
            devices=parallel.devices,
            metrics=metrics,
            progress=progress,
        )
        looks = _Looks(objective, evaluation_step, parallel, sample, metrics, progress)
        checkpoints = _Checkpoints(folder, config, identity, feed.course, metrics, best)
        if here.is_first:
            write_report(folder, goes_on=True)
        if look_first:
            looks.look(whole(state.weights), first_step)
        if config.monitor.rewinds > 0 and not step_folders(folder):
            checkpoints.save(state)  # so that there is one to go back to from the first
        for steps in feed:
            step, asked = steps[-1], time.perf_counter()
            if feed.is_rollout_due(steps):
                log.write(leave=0)
                metrics.write([feed.roll_out(steps, whole(state.weights))])
            batch = feed.take(steps)
            waited_seconds = time.perf_counter() - asked
            if is_layer_look(config, steps):
                log.add_look(steps[0], look_at_layers((state, fixed), batch))
            profile.before(compiled=log.has_compiled(steps))
            state, numbers = train_steps(state, batch, fixed)
            profile.after(steps, numbers)
            progress.advance(step)
            log.add(steps, numbers, waited_seconds=waited_seconds)
            log.write_due(steps)

            is_end = step == settings.max_steps
            is_look = is_end or step % settings.eval_interval_steps == 0
            is_save = is_end or step % config.checkpoint.interval_steps == 0
            is_stop = wish.reached() and feed.may_stop(step)
            if is_look or is_save or is_stop:
                log.write(leave=0)
            if trouble := monitor.trouble:
                earlier = checkpoints.go_back(trouble, monitor, progress)
                if earlier is None:
                    nonfinite = describe_no_rewind(config, trouble, rewinds=monitor.rewinds)
                    is_stop = True
                else:
                    state = restored_state(earlier, config, parallel)
                    feed.go_back(earlier.step)
                    log.forget()
                    loggers.begin(metrics.rows(), config)
                if here.is_first:
                    write_report(folder, goes_on=not is_stop)
                if is_stop:
                    break
                continue
            if log.longest_streak >= settings.max_nonfinite_steps and feed.may_stop(step):
                log.write(leave=0)
                nonfinite = describe_nonfinite(step, streak=log.longest_streak)
                is_stop = True
            if is_look or is_save or is_stop:
                loss = looks.look(whole(state.weights), step) if is_look else math.inf
                is_best = checkpoints.is_new_best(loss, step)
                if is_save or is_stop or is_best:
                    checkpoints.save(state, is_best=is_best)
                if here.is_first:
                    write_report(folder, goes_on=not (is_end or is_stop))
                log.restart_clock()
            if is_stop:
                break
        profile.close()
    return Outcome(state, checkpoints.best, wish.received, nonfinite)


class _Feed:
    """Hands over the batches of each dispatch: read ahead, or made with the weights in training."""

    def __init__(
        self,
        objective: Objective,
        config: Config,
        parallel: Parallel,
        past: Iterable[Mapping[str, Any]],
        *,
        first_step: int,
    ):
        self._objective, self._rollouts, self._parallel = objective, objective.rollouts, parallel
        self._config, self._passes = config, config.train.gradient_accumulation_steps
        self._own_rows = parallel.own_rows(passes=self._passes)
        self._rolled: HostBatch = {}
        self.course = Course(config, past=past)
        self._begin(first_step)

    def _begin(self, first_step: int) -> None:
        self._left = dispatches(self._config, first_step=first_step)
        steps = () if self._rollouts else dispatches(self._config, first_step=first_step)
        self._reading = prefetch(self._read, steps, depth=PREFETCH_DEPTH)

    def __enter__(self) -> "_Feed":
        self._ahead = self._reading.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._reading.__exit__(*error)

    def __iter__(self) -> Iterator[range]:
        """Give the steps of each dispatch, also after going back."""
        while steps := next(self._left, None):
            yield steps

    def go_back(self, step: int) -> None:
        """Go on after an earlier step, with the batches that its course has by now."""
        self.__exit__(None, None, None)
        self._begin(step)
        self.__enter__()

    def _read(self, steps: range) -> dict[str, Any]:
        numbers, corpus = [*map(self.course.batch, steps)], self._objective.corpus
        if corpus:
            batches = [*map(corpus.places, numbers)]
        else:
            batches = [self._objective.train_batch(number, self._own_rows) for number in numbers]
        return self._parallel.place_steps(batches, passes=self._passes)

    def may_stop(self, step: int) -> bool:
        """Tell whether a run may end after a step.

        A checkpoint between the steps that learn from the same answers would lose these.
        """
        return self._rollouts is None or step % self._rollouts.steps == 0

    def is_rollout_due(self, steps: range) -> bool:
        """Tell whether these steps are the first to learn from new answers."""
        return self._rollouts is not None and self.may_stop(steps[0] - 1)

    def roll_out(self, steps: range, weights: Weights) -> dict[str, Any]:
        """Make the batch of these and the next steps, and give the row that tells of it."""
        assert self._rollouts is not None
        self._rolled, told = self._rollouts.batch(self._parallel.one_copy(weights), steps[0] - 1)
        return {"kind": "rollout", "step": steps[0], **told}

    def take(self, steps: range) -> dict[str, Any]:
        """Give the batches of the next dispatch, on the devices."""
        if self._rollouts is None:
            return next(self._ahead)
        return self._parallel.place_steps([self._rolled] * len(steps), passes=self._passes)

    def host_batch(self, number: int) -> HostBatch:
        """Give the whole batch of a step that was just taken once more."""
        return self._rolled if self._rollouts else self._objective.train_batch(number)


class _Looks:
    """Evaluates and samples."""

    def __init__(
        self,
        objective: Objective,
        evaluation_step: Callable[..., Any],
        parallel: Parallel,
        sample: Callable[[Weights], str],
        metrics: MetricsFile,
        progress: Progress,
    ):
        self._objective, self._evaluation_step = objective, evaluation_step
        self._parallel, self._sample = parallel, sample
        self._metrics, self._progress = metrics, progress

    def look(self, weights: Weights, step: int) -> float:
        """Evaluate and sample, tell what was found, and give the loss."""
        means, text = self._measure(weights)
        loss = means["loss"]
        described = self._objective.describe_loss(loss)
        described |= {name: means[name] for name in self._objective.shown}
        self._metrics.write(
            [
                {"kind": "eval", "step": step, **means, **described},
                {"kind": "sample", "step": step, "text": text},
            ]
        )
        figure = self._objective.figure.say(loss)
        self._progress.show_evaluation(step=step, figure=figure, described=described, text=text)
        return loss

    def _measure(self, weights: Weights) -> tuple[dict[str, Any], str]:
        objective, parallel = self._objective, self._parallel
        if objective.rollouts:
            return objective.rollouts.evaluate(parallel.one_copy(weights))
        rows = objective.evaluation_batches(parallel.own_rows(passes=1))
        means = evaluate(self._evaluation_step, weights, map(parallel.place_batch, rows))
        return means, self._sample(parallel.one_copy(weights))


class _Checkpoints:
    """Those of a run: the newest, and the one with the lowest validation loss."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        identity: Identity,
        course: Course,
        metrics: MetricsFile,
        best: dict[str, Any] | None,
    ):
        self._folder, self._config, self._identity = folder, config, identity
        self._course, self._metrics = course, metrics
        self.best = best

    def is_new_best(self, loss: float, step: int) -> bool:
        """Tell whether a loss is the lowest so far, and remember it if so."""
        if not math.isfinite(loss) or (self.best is not None and loss >= self.best["loss"]):
            return False
        self.best = {"step": step, "loss": loss}
        return True

    def save(self, state: TrainState, *, is_best: bool = False) -> None:
        """Write a checkpoint, name it the best if it is, and remove those that are too many.

        While steps fail, none are removed in a run that may have to go back to before the first of
        them.
        """
        self._metrics.flush_to_disk()
        save_checkpoint(
            self._folder,
            state,
            config=self._course.write_into(self._config),
            tokenizer=self._identity.tokenizer,
            dataset_hash=self._identity.dataset_hash,
            best=self.best,
        )
        if not hosts().is_first:
            return
        if is_best:
            mark_best(self._folder, int(state.step))
        if self._config.monitor.rewinds == 0 or int(state.nonfinite_streak) == 0:
            best_step = self.best["step"] if self.best else None
            prune_checkpoints(self._folder, keep=self._config.checkpoint.keep, best_step=best_step)

    def go_back(self, trouble: Trouble, monitor: Monitor, progress: Progress) -> Checkpoint | None:
        """Take the run, but its state, back to a checkpoint from before some trouble, and read that.

        None where that may not be done again, or cannot.
        """
        chosen = go_back(
            *(self._folder, self._config, trouble, self._course, monitor, self._metrics, progress),
            once=hosts().first_tells,
        )
        if chosen is None:
            return None
        path, self.best = chosen
        return read_checkpoint(path)


def _same_rows(folder: Path, notes: Path, here: Hosts) -> Path:
    """Name the metrics file of this process, with the rows so far: from them follow batches and rewinds.

    Raises:
        InputError: processes do not see the same rows.
    """
    path, shared = notes / "metrics.jsonl", folder / "metrics.jsonl"
    if here.count > 1:
        if not here.is_first and shared.is_file():
            shutil.copyfile(shared, path)
        # Nobody goes on before all have read: process 0 is about to cut the file.
        here.agree(
            {str(shared): sha256_of_file(path) if path.is_file() else "not there"},
            advice="Name a folder with --out that all hosts share.",
        )
    return path


def dispatches(config: Config, *, first_step: int) -> Iterator[range]:
    """Cut the steps after `first_step` into those that a device takes without the host.

    Which steps go together depends on their numbers alone, so that a resumed run goes through the
    same programs, with the same rounding, as one that was never stopped: `train.steps_per_dispatch`
    of them from each of its multiples on, and single ones where an evaluation or a checkpoint comes
    before the next multiple.
    """
    settings, size = config.train, config.train.steps_per_dispatch
    intervals = (settings.eval_interval_steps, config.checkpoint.interval_steps)
    step = first_step
    while step < settings.max_steps:
        end = min(settings.max_steps, *(step - step % each + each for each in intervals))
        count = size if step % size == 0 and step + size <= end else 1
        yield range(step + 1, step + count + 1)
        step += count


def describe_nonfinite(step: int, *, streak: int) -> str:
    """Say why a run of steps that are no numbers ends, and what to try."""
    return (
        f"stopped at step {step}: {streak} steps in a row had a loss or gradient that is not "
        f"finite, and left the weights as they were. Their batches are kept in nonfinite/. Try a "
        "lower --learning-rate or a longer --warmup-steps."
    )
