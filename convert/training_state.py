"""The state of torch.optim.AdamW in other projects' checkpoints, and the settings of their runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convert.bundle import Arrays, Training, default_run
from convert.checks import read_count, run_settings
from convert.llama2c_run import llama2c_settings
from tinyllm_jax.config import Config, ModelConfig, config_to_table
from tinyllm_jax.errors import InputError


def adamw_moments(
    state: Mapping[str, Any], names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, Arrays, Arrays] | None:
    """Read (updates, first moments, second moments) out of an AdamW state dict.

    PyTorch numbers parameters group by group. The usual two groups are the decayed matrices and
    the rest, each in the order of the model; one group is the order of the model.

    Args:
        state: `optimizer.state_dict()`, its tensors as NumPy arrays.
        names: The weights in the order of the model, each once.
        shapes: The shape of each.

    Returns:
        None where the numbers cannot be given names.
    """
    groups, moments = state.get("param_groups"), state.get("state")
    if not isinstance(groups, Sequence) or not isinstance(moments, Mapping):
        return None
    lists: list[Any] = [
        group.get("params") if isinstance(group, Mapping) else None for group in groups
    ]
    if not all(isinstance(each, Sequence) for each in lists):
        return None
    numbers = [number for each in lists for number in each]
    if not all(isinstance(n, (int, str)) for n in numbers) or len(set(numbers)) < len(numbers):
        return None
    matrices = [name for name in names if len(shapes[name]) >= 2]
    others = [name for name in names if len(shapes[name]) < 2]
    sizes = [len(each) for each in lists]
    if sizes == [len(matrices), len(others)]:
        order = [*matrices, *others]
    elif sizes == [len(names)]:
        order = list(names)
    else:
        return None
    counts, first, second = set(), {}, {}
    for number, name in zip(numbers, order, strict=True):
        row = moments.get(number)
        if not isinstance(row, Mapping):
            return None
        pair = first[name], second[name] = row.get("exp_avg"), row.get("exp_avg_sq")
        if not all(isinstance(m, np.ndarray) and m.shape == shapes[name] for m in pair):
            return None
        counts.add(_updates(row.get("step")))
    # One count is kept for all; a parameter that missed updates has another.
    if len(counts) != 1 or None in counts:
        return None
    return counts.pop(), first, second


def _updates(value: Any) -> int | None:
    try:
        return read_count(value, what="step", origin="")
    except InputError:
        return None


def foreign_run(
    table: Mapping[str, Any], model: ModelConfig, *, origin: str
) -> tuple[Config, list[str]]:
    """Make the settings of a run from llama2.c's, as far as they are the same thing.

    Returns:
        The settings, and what a person should know of them.
    """
    run = config_to_table(default_run(_fields(model), origin=origin))
    found, notes = llama2c_settings(table, model)
    for section, values in found.items():
        run[section] |= values
    return run_settings(run, origin=f"{origin}, its run"), notes


def foreign_training(
    config: Config,
    *,
    step: int,
    moments: tuple[int, Arrays, Arrays],
    best_loss: float | None,
) -> Training:
    """Put a foreign run together; which data it saw is not known."""
    count, first, second = moments
    return Training(
        config=config,
        step=step,
        count=count,
        first=first,
        second=second,
        nonfinite_streak=0,
        seed=config.train.seed,
        rows_per_step=config.rows_per_step,
        dataset_hash="",
        best=None if best_loss is None else {"step": step, "loss": best_loss},
    )


def _fields(model: ModelConfig) -> dict[str, Any]:
    return {name: getattr(model, name) for name in model.__dataclass_fields__}
