"""Two runs of the same settings, compared bit by bit."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm_jax.config import config_to_table
from tinyllm_jax.training.checkpoint import Checkpoint, read_checkpoint
from tinyllm_jax.training.metrics import read_metrics
from tinyllm_jax.training.step_folders import damage, step_folders

# Rows of metrics.jsonl that hold times.
WITH_CLOCK = ("speed",)


@dataclass(frozen=True)
class Comparison:
    """What was compared, and every difference that was found."""

    steps: list[int]  # of the checkpoints that both runs have
    arrays: int
    numbers: int
    rows: int  # of metrics.jsonl
    differences: list[str]


def compare_runs(one: Path, other: Path) -> Comparison:
    """Compare all checkpoints that both run folders hold, and their metrics without the times."""
    folders = dict(step_folders(one)), dict(step_folders(other))
    steps = sorted(folders[0].keys() & folders[1].keys())
    found, arrays, numbers = [], 0, 0
    if folders[0].keys() != folders[1].keys() or not steps:
        found.append(f"checkpoints of steps {[*folders[0]]} and {[*folders[1]]}")
    best = [(run / "best").resolve().name for run in (one, other)]
    if best[0] != best[1]:
        found.append(f"best is {best[0]} and {best[1]}")
    for step in steps:
        damaged = [f"{run[step]}: {problem}" for run in folders if (problem := damage(run[step]))]
        found += damaged
        if damaged:
            continue
        left, right = (arrays_of(read_checkpoint(run[step])) for run in folders)
        arrays += len(left)
        numbers += sum(array.size for array in left.values())
        found += [f"step {step}: {name}" for name in differing(left, right)]
    rows = [
        [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] not in WITH_CLOCK]
        for run in (one, other)
    ]
    if len(rows[0]) != len(rows[1]):
        found.append(f"metrics.jsonl has {len(rows[0])} and {len(rows[1])} rows")
    for left, right in zip(*rows, strict=False):
        # As text, since a number that is none is not equal to itself.
        if repr(left) != repr(right):
            found.append(f"metrics.jsonl, step {left.get('step')}: {left} and {right}")
            break
    return Comparison(steps, arrays, numbers, len(rows[0]), found)


def arrays_of(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Name all of a checkpoint that a run goes on from; where it lies is left out."""
    moments = checkpoint.moments
    settings = {**config_to_table(checkpoint.config), "run": None}
    return {
        "settings": np.array(repr(settings)),
        "data": np.array(checkpoint.dataset_hash),
        "tokenizer": np.array(checkpoint.tokenizer_hash),
        "step": np.array(checkpoint.step),
        "count of updates": np.array(moments.count),
        "streak of steps without numbers": np.array(checkpoint.nonfinite_streak),
        "best loss": np.array(repr(checkpoint.best)),
        **{f"weight {name}": np.asarray(value) for name, value in checkpoint.weights.items()},
        **{f"first moment of {name}": np.asarray(value) for name, value in moments.first.items()},
        **{f"second moment of {name}": np.asarray(value) for name, value in moments.second.items()},
    }


def differing(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """List the arrays that are not the same bytes, type and shape."""
    names = [name for name in left if name not in right]
    names += [name for name in right if name not in left]
    for name in left.keys() & right.keys():
        one, other = left[name], right[name]
        same_form = (one.dtype, one.shape) == (other.dtype, other.shape)
        if not same_form or one.tobytes() != other.tobytes():
            names.append(name)
    return sorted(names)
