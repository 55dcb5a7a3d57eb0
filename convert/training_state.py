"""The state of torch.optim.AdamW in other projects' checkpoints, and the settings of their runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convert.bundle import Arrays, Training, default_run
from tinyllm_jax.config import Config, ModelConfig, config_from_table, config_to_table
from tinyllm_jax.errors import InputError

# llama2.c's words for the settings of a run, and ours.
_RUN_WORDS = {
    "learning_rate": ("optimizer", "learning_rate"),
    "min_lr": ("optimizer", "min_learning_rate"),
    "warmup_iters": ("optimizer", "warmup_steps"),
    "weight_decay": ("optimizer", "weight_decay"),
    "beta1": ("optimizer", "beta1"),
    "beta2": ("optimizer", "beta2"),
    "grad_clip": ("optimizer", "max_grad_norm"),
    "max_iters": ("train", "max_steps"),
    "batch_size": ("train", "batch_size"),
    "gradient_accumulation_steps": ("train", "gradient_accumulation_steps"),
    "eval_interval": ("train", "eval_interval_steps"),
    "seed": ("train", "seed"),
}


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
    numbers = [number for group in groups for number in group.get("params", ())]
    matrices = [name for name in names if len(shapes[name]) >= 2]
    others = [name for name in names if len(shapes[name]) < 2]
    sizes = [len(group.get("params", ())) for group in groups]
    if sizes == [len(matrices), len(others)]:
        order = [*matrices, *others]
    elif sizes == [len(names)]:
        order = list(names)
    else:
        return None
    count, first, second = 0, {}, {}
    for number, name in zip(numbers, order, strict=True):
        row = moments.get(number)
        if row is None or "exp_avg" not in row or "exp_avg_sq" not in row:
            return None
        if row["exp_avg"].shape != shapes[name] or row["exp_avg_sq"].shape != shapes[name]:
            return None
        first[name], second[name] = row["exp_avg"], row["exp_avg_sq"]
        count = int(np.asarray(row["step"]))
    return count, first, second


def foreign_run(table: Mapping[str, Any], model: ModelConfig, *, origin: str) -> Config:
    """Make the settings of a run from llama2.c's, as far as they are the same thing."""
    run = config_to_table(default_run(_fields(model), origin=origin))
    for theirs, (section, ours) in _RUN_WORDS.items():
        if isinstance(table.get(theirs), (int, float)):
            run[section][ours] = table[theirs]
    if "min_lr" not in table:
        run["optimizer"]["min_learning_rate"] = 0.0
    try:
        return config_from_table(run, origin=origin)
    except InputError as error:
        raise InputError(
            f"{origin}: the settings of its run are out of range: {error} Convert the weights of "
            "its model.bin or state dict alone."
        ) from None


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
