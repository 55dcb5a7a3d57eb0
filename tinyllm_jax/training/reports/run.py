"""A run as its folder tells of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm_jax.errors import InputError
from tinyllm_jax.settings import flatten
from tinyllm_jax.training.environment import ENVIRONMENT, read_starts
from tinyllm_jax.training.metrics import is_deep, read_metrics
from tinyllm_jax.training.reports.page import show
from tinyllm_jax.training.reports.plot import LARGEST, Line
from tinyllm_jax.training.start_rules import SNAPSHOT, is_run

Row = Mapping[str, Any]
STATS = "dataset_stats.json"
# Kinds of rows that say what went wrong.
WARNINGS = ("warning", "rewind")


@dataclass(frozen=True)
class Run:
    """A run as its folder tells of it.

    Attributes:
        rows: Of `metrics.jsonl`.
        config: Settings under dotted keys.
        stats: Of its data.
        starts: What it was started with, each time.
    """

    folder: Path
    rows: list[dict[str, Any]]
    config: dict[str, Any]
    stats: dict[str, Any]
    starts: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """What people call it: the name of its folder."""
        return self.folder.resolve().name

    @property
    def step(self) -> int:
        """The newest step of which something is known."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def max_steps(self) -> int:
        """How long it is to be."""
        steps = self.config.get("train.max_steps")
        return steps if type(steps) is int else self.step

    @property
    def mode(self) -> str:
        """The way it learns."""
        return str(self.config.get("run.mode", "pretrain"))

    @cached_property
    def _by_kind(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            found.setdefault(row["kind"], []).append(row)
        return found

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """List the rows of a kind."""
        return self._by_kind.get(kind, [])

    def series(self, kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Give steps and finite numbers of one name."""
        found = [(row["step"], row[name]) for row in self.of_kind(kind) if name in row]
        found = [(step, value) for step, value in found if is_finite(value)]
        steps, values = np.array(found, np.float64).reshape(-1, 2).T
        return steps, values

    def line(self, kind: str, name: str, label: str, color: str, form: str) -> Line:
        """Draw numbers of one name; `{}` in the label is the last of them."""
        steps, values = self.series(kind, name)
        last = show(float(values[-1])) if len(values) else ""
        return Line(label.replace("{}", last), self.places(steps), values, color, form)

    def places(self, steps: np.ndarray) -> dict[str, np.ndarray]:
        """Give the places of steps on each axis that this run has."""
        found = {"step": steps}
        for axis, known in (("tokens", self.learnt), ("time", self.clock)):
            if known is not None:
                found[axis] = np.interp(steps, *known)
        return found

    @cached_property
    def learnt(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Tell how many targets the steps so far have learnt from, as steps and counts."""
        rows = self.of_kind("train")
        if not rows or not all(is_finite(row.get("targets")) for row in rows):
            return None
        steps = np.array([0, *(row["step"] for row in rows)], np.float64)
        return steps, np.cumsum([0.0, *(row["targets"] for row in rows)])

    @cached_property
    def clock(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Tell how many seconds the steps so far have taken, as steps and seconds.

        They count from the start of the process, data and compiling included; between the processes
        of a run that was resumed no time passes. Without word of its starts it passes there, too.
        """
        told = [
            (row["step"], row["time"])
            for row in self.of_kind("speed")
            if is_finite(row.get("time"))
        ]
        if not told:
            return None
        began = [start["time"] for start in self.starts]
        steps, seconds, before, stretch, origin = [], [], 0.0, -2, 0.0
        for step, moment in told:
            now = int(np.searchsorted(began, moment, "right")) - 1
            if now != stretch:
                before = seconds[-1] if seconds else 0.0
                stretch, origin = now, began[now] if now >= 0 else moment
                first = self.starts[now]["step"] if now >= 0 else 0
                steps.append(max(first, steps[-1] if steps else 0))
                seconds.append(before)
            steps.append(step)
            seconds.append(max(seconds[-1], before + moment - origin))
        return np.array(steps, np.float64), np.array(seconds)

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return float(self.clock[1][-1]) if self.clock else 0.0

    @property
    def unit(self) -> str:
        """What a target is."""
        return "pairs" if self.mode in ("dpo", "reward") else "tokens"

    @cached_property
    def lost_steps(self) -> np.ndarray:
        """List the steps whose loss or gradient was not finite."""
        lost = [
            row["step"]
            for row in self.of_kind("train")
            if row.get("skipped") is True or not is_finite(row.get("loss"))
        ]
        return np.array(lost, np.float64)


def read_run(folder: Path) -> Run:
    """Read what a run folder holds.

    Raises:
        InputError: it is none, or a file of it is damaged.
    """
    if not is_run(folder):
        raise InputError(
            f"{folder}: no run folder (it has no {SNAPSHOT}). Name one that train wrote, such as "
            "checkpoints/pretrain_tiny."
        )
    rows = read_metrics(folder / "metrics.jsonl")
    stats = read_object(folder / STATS) if (folder / STATS).is_file() else {}
    check_stats(stats, path=folder / STATS)
    config, starts = flatten(read_object(folder / SNAPSHOT)), read_starts(folder)
    if is_deep(starts):
        raise InputError(f"{folder / ENVIRONMENT}: damaged. Remove it; nothing else needs it.")
    return Run(folder, rows, config, stats, starts)


def check_stats(stats: Mapping[str, Any], *, path: Path) -> None:
    """Refuse an account of data whose parts are not what they are called.

    Raises:
        InputError: names the file.
    """
    splits, files = stats.get("splits", {}), stats.get("files", [])
    parts = [*splits.values()] if isinstance(splits, dict) else [None]
    parts += files if isinstance(files, list) else [None]
    hashes = [stats.get(name, "") for name in ("tokenizer_hash", "dataset_hash")]
    are_right = all(isinstance(part, dict) for part in parts)
    if not are_right or not all(isinstance(each, str) for each in hashes):
        raise InputError(
            f"{path}: no account of data. Bring back the file as it was, or remove it."
        )


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file holds something else.
    """
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}). Bring back the file as it was.") from None
    if not isinstance(found, dict) or is_deep(found):
        raise InputError(f"{path}: no JSON object. Bring back the file as it was.")
    return found


def is_finite(value: Any) -> bool:
    """Tell a number that can be drawn; one that was not finite is text in the metrics file."""
    return type(value) in (int, float) and -LARGEST < value < LARGEST
