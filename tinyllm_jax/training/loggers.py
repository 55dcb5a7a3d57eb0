"""Sends the numbers of a run to TensorBoard, Weights & Biases, SwanLab and trackio.

What a logger is told is what stands in `metrics.jsonl`, which is always written and is what counts: a run
that goes on, or goes back, brings every logger to those rows first. Both packages log through here; this
module imports no framework, and each library only where it is asked for.
"""

import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tinyllm_jax.config import Config, LoggingConfig, config_to_table
from tinyllm_jax.errors import InputError
from tinyllm_jax.settings import flatten
from tinyllm_jax.training.spans import merge_spans

Row = Mapping[str, Any]
# Settings that change no number of a run.
NOT_OF_NUMBERS = (
    "run.",
    "distributed.",
    "logging.",
    "data.workers",
    "data.runner",
    "data.ray_address",
)
NOT_FINITE = ("nan", "inf", "-inf")


@runtime_checkable
class Logger(Protocol):
    """One place that numbers are sent to."""

    name: str

    def begin(self, rows: Sequence[Row], config: Config, key: str) -> None:
        """Make the curves those of some rows, whatever there was before.

        Args:
            key: The same for the same numbers: what a logger has of them may stay.
        """
        ...

    def write(self, rows: Sequence[Row]) -> None:
        """Add rows."""
        ...

    def flush(self) -> None:
        """Hand over what is still held back."""
        ...

    def close(self) -> None:
        """Hand over everything and end."""
        ...


class Loggers:
    """All loggers of a run. One that fails is left out from then on, with one line that says so.

    Args:
        say: Tells the person something.
    """

    def __init__(self, loggers: Sequence[Logger], *, say: Callable[[str], None]):
        self._loggers, self._say = [*loggers], say
        self._failed: list[Logger] = []

    def begin(self, rows: Sequence[Row], config: Config) -> None:
        """Make all curves those of some rows of metrics."""
        key = key_of(config, rows)
        self._each(lambda logger: logger.begin(rows, config, key))

    def write(self, rows: Iterable[Row]) -> None:
        """Add rows to all curves."""
        rows = [*rows]
        self._each(lambda logger: logger.write(rows))

    def flush(self) -> None:
        """Hand over what is still held back."""
        self._each(lambda logger: logger.flush())

    def close(self) -> None:
        """End all of them, also what those that failed have open."""
        failed, self._failed = self._failed, []
        self._each(lambda logger: logger.close())
        for logger in failed:
            with contextlib.suppress(Exception):  # that it fails has been said
                logger.close()

    def _each(self, work: Callable[[Logger], None]) -> None:
        for logger in [*self._loggers]:
            try:
                work(logger)
            except Exception as error:  # of whatever type: training goes on
                self._loggers.remove(logger)
                self._failed.append(logger)
                what = " ".join(f"{type(error).__name__}: {error}".split())
                self._say(
                    f"warning: {logger.name} failed and gets no more numbers ({what}). metrics.jsonl "
                    "has them all; the next start of this run brings them there."
                )


NO_LOGGERS = Loggers([], say=lambda _: None)


def check_installed(settings: LoggingConfig) -> None:
    """Refuse loggers whose package is not there.

    Raises:
        InputError: names what to install.
    """
    missing = [name for name in settings.to if importlib.util.find_spec(name) is None]
    if missing:
        others = [name for name in settings.to if name not in missing]
        instead = f"--logging.to {' '.join(others)}" if others else "leave --logging.to out"
        raise InputError(
            f"logging.to={' '.join(settings.to)} needs {' and '.join(missing)}, not installed. Use pip "
            f"install 'tinyllm[{','.join(missing)}]', or {instead}."
        )


@contextlib.contextmanager
def open_loggers(
    config: Config, folder: Path, rows: Sequence[Row], *, writes: bool, say: Callable[[str], None]
) -> Iterator[Loggers]:
    """Start the loggers of a run, with all rows so far, and end them.

    Args:
        folder: The run folder.
        writes: False in processes beside the first.
        say: Tells the person something.
    """
    if not (writes and config.logging.to):
        yield NO_LOGGERS
        return
    from tinyllm_jax.training.trackers import make_logger

    loggers = Loggers([make_logger(name, config, folder) for name in config.logging.to], say=say)
    try:
        loggers.begin(rows, config)
        yield loggers
    finally:
        loggers.close()


def key_of(config: Config, rows: Sequence[Row]) -> str:
    """Name the numbers that a run computes: by its settings, and by the batches that rewinds left out."""
    settings = flatten(config_to_table(config))
    kept = {name: value for name, value in settings.items() if not name.startswith(NOT_OF_NUMBERS)}
    # A resumed run has those of earlier rewinds among its settings.
    left_out = [*kept.pop("monitor.skip_batches")]
    left_out += [row["batches"] for row in rows if row["kind"] == "rewind"]
    text = json.dumps([merge_spans(left_out), kept], sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()


def points(row: Row) -> tuple[dict[str, float], dict[str, str]]:
    """Turn a row of metrics into numbers and texts, each under `kind/name`.

    What is by layer or by expert has one number for each, under `kind/name/part`.
    """
    numbers: dict[str, float] = {}
    texts: dict[str, str] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for part, each in value.items():
                add(f"{name}/{part}", each)
        elif isinstance(value, (list, tuple)):
            for place, each in enumerate(value):
                add(f"{name}/{place}", each)
        elif isinstance(value, str) and value not in NOT_FINITE:
            texts[name] = value
        else:
            numbers[name] = float(value)

    for name, value in row.items():
        if name not in ("kind", "step", "time"):
            add(f"{row['kind']}/{name}", value)
    return numbers, texts
