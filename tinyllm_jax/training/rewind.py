"""Which batch each step takes, and how a run goes back to an earlier checkpoint by itself.

Batch number s - 1 makes step s, unless some are left out: then the numbers close up, so that a step and
the list of those left out still say everything about what comes next. The list is a setting
(`monitor.skip_batches`), which every checkpoint holds, converted or not; this module imports no framework.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tinyllm_jax.config import Config
from tinyllm_jax.data.files import free_name
from tinyllm_jax.errors import InputError
from tinyllm_jax.training.metrics import MetricsFile
from tinyllm_jax.training.monitor import Monitor, Trouble
from tinyllm_jax.training.progress import Progress
from tinyllm_jax.training.spans import Span, merge_spans, span_as_text
from tinyllm_jax.training.step_folders import damage, mark_best, step_folders


class Course:
    """The batches of a run: all in order, but those that are left out.

    Args:
        config: Names batches that are.
        past: The rows of metrics so far; rewinds among them name more.
    """

    def __init__(self, config: Config, *, past: Iterable[Mapping[str, Any]]):
        spans = [*config.monitor.skip_batches]
        spans += [row["batches"] for row in past if row["kind"] == "rewind"]
        self._spans: list[Span] = merge_spans(spans)

    def batch(self, step: int) -> int:
        """Give the number, from 0, of the batch of a step, from 1."""
        number = step - 1
        for first, last in self._spans:
            if number < first:
                break
            number += last - first + 1
        return number

    def leave_out(self, first: int, last: int) -> str:
        """Leave out the batches of some steps, which are taken again with others, and name them."""
        span = span_as_text((self.batch(first), self.batch(last)))
        self._spans = merge_spans([*map(span_as_text, self._spans), span])
        return span

    def write_into(self, config: Config) -> Config:
        """Give the settings with all that is left out."""
        spans = tuple(map(span_as_text, self._spans))
        return dataclasses.replace(
            config, monitor=dataclasses.replace(config.monitor, skip_batches=spans)
        )


def keep_left_out(config: Config, earlier: Config, *, step: int) -> Config:
    """Leave out in a resumed run, besides, what its checkpoint's settings do.

    Args:
        earlier: Those settings.
        step: Of the checkpoint.

    Raises:
        InputError: a batch that the checkpoint has learned from is to be left out. Numbers close up, so
            that in its stead one that is wanted would be missing.
    """
    missing = [
        span for span in earlier.monitor.skip_batches if span not in config.monitor.skip_batches
    ]
    if missing:
        spans = (*config.monitor.skip_batches, *missing)
        config = dataclasses.replace(
            config, monitor=dataclasses.replace(config.monitor, skip_batches=spans)
        )
    newest = Course(earlier, past=[]).batch(step)
    if Course(config, past=[]).batch(step) != newest:
        raise InputError(
            f"monitor.skip_batches={' '.join(config.monitor.skip_batches)}: the checkpoint of step {step} "
            f"has learned from batches up to {newest} already. Name batches from {newest + 1} on, or go "
            "on from an earlier checkpoint."
        )
    return config


def rows_leading_to(
    rows: list[dict[str, Any]], earlier: Config, *, step: int
) -> tuple[list[dict[str, Any]], str]:
    """Give the rows of metrics that a checkpoint comes from, and what to say where some do not.

    One that a rewind has set aside has learned from batches which that rewind left out. With the row that
    tells of it, those would be left out once more, and as many others be missing.

    Args:
        rows: Of the checkpoint's run, as it went on.
        earlier: The checkpoint's settings.
        step: Of the checkpoint.
    """
    newest = Course(earlier, past=[]).batch(step)
    known = [*earlier.monitor.skip_batches]
    for place, row in enumerate(rows):
        if row["kind"] != "rewind":
            continue
        first, _ = merge_spans([row["batches"]])[0]
        if first <= newest and merge_spans([*known, row["batches"]]) != merge_spans(known):
            return rows[:place], (
                f"The checkpoint of step {step} is from before the rewind to step {row['step']}, so batches "
                f"{row['batches']} are not left out; what metrics said of the steps between is gone."
            )
    return rows, ""


def go_back(
    folder: Path,
    config: Config,
    trouble: Trouble,
    course: Course,
    monitor: Monitor,
    metrics: MetricsFile,
    progress: Progress,
    *,
    once: Callable[[Callable[[], str]], str],
) -> tuple[Path, dict[str, Any] | None] | None:
    """Take a run, but its weights, back to before some trouble.

    None where that may not be done again, or cannot.

    Args:
        once: Does what only one process of the run does, before the others go on, and gives all what it says.

    Returns:
        The checkpoint to read then, and step and loss of the best one that is left.
    """
    if monitor.rewinds >= config.monitor.rewinds:
        return None

    def choose() -> str:
        found = checkpoint_before(folder, config, trouble, note=progress.note)
        if found is None:
            return json.dumps(None)
        step, path = found
        best = still_there(folder, json.loads((path / "meta.json").read_text())["best"])
        # First: a run that is killed here goes on from that checkpoint, and comes here again.
        set_aside_later(folder, step=step, best=best)
        return json.dumps([step, best])

    chosen = json.loads(once(choose))
    if chosen is None:
        return None
    step, best = chosen
    first = max(first_left_out(config, trouble), step + 1)
    batches = course.leave_out(first, trouble.last)
    row = rewind_row(step, trouble, first=first, batches=batches, number=monitor.rewinds + 1)
    metrics.go_back(step, row)
    monitor.go_back(metrics.rows())
    progress.note(row["text"])
    progress.advance(step)
    return folder / "checkpoints" / str(step), best


def still_there(folder: Path, best: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Give step and loss of the best checkpoint, if the run folder has it; else the next look is the best."""
    if best and (folder / "checkpoints" / str(best["step"])).is_dir():
        return dict(best)
    return None


def first_left_out(config: Config, trouble: Trouble) -> int:
    """Give the first step whose batch a rewind leaves out, if the run goes back that far."""
    return max(trouble.first - config.monitor.rewind_batches + 1, 1)


def checkpoint_before(
    folder: Path, config: Config, trouble: Trouble, *, note: Callable[[str], None]
) -> tuple[int, Path] | None:
    """Find the checkpoint to go back to, as its step and folder.

    It is the newest one from before all batches that are left out; where none is left from then, the
    oldest one from before the trouble.
    """
    wanted, good = first_left_out(config, trouble), []
    for step, path in reversed(step_folders(folder)):
        if step >= trouble.first:
            continue
        if problem := damage(path):
            note(f"{path}: damaged checkpoint ({problem}); the one before it is used.")
            continue
        good.append((step, path))
        if step < wanted:
            break
    return good[-1] if good else None


def set_aside_later(folder: Path, *, step: int, best: Mapping[str, Any] | None) -> None:
    """Take the checkpoints after a step out of the run, and let `best` point at the best that is left."""
    for later, path in step_folders(folder):
        if later > step:
            path.rename(free_name(path.with_name(f"{later}.rewound")))
    if best:
        mark_best(folder, best["step"])
    else:
        (folder / "best").unlink(missing_ok=True)


def rewind_row(
    step: int, trouble: Trouble, *, first: int, batches: str, number: int
) -> dict[str, Any]:
    """Make the row of metrics that tells of a rewind to a step; it stays however often that step comes.

    Args:
        first: First step whose batch is left out.
        batches: Their numbers.
        number: Of this rewind, from 1.
    """
    return {
        "kind": "rewind",
        "step": step,
        "number": number,
        "first_step": first,
        "last_step": trouble.last,
        "batches": batches,
        "text": f"step {trouble.last}: {trouble.what}. Back to step {step}; the batches of steps {first} "
        f"to {trouble.last} ({batches}) are left out.",
    }


def describe_no_rewind(config: Config, trouble: Trouble, *, rewinds: int) -> str:
    """Say why a run that cannot go back any more ends, and what to try."""
    reason = (
        f"all {config.monitor.rewinds} rewinds are used up"
        if rewinds >= config.monitor.rewinds
        else f"no good checkpoint from before step {trouble.first} is left to go back to"
    )
    return (
        f"stopped at step {trouble.last}: {trouble.what}, and {reason}. The newest checkpoint is from "
        f"before step {trouble.last}. Try a lower --learning-rate or a longer --warmup-steps."
    )
