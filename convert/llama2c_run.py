"""The settings of a run of llama2.c's train.py, as its `ckpt.pt` holds them under `config`.

Source: karpathy/llama2.c, train.py (`config`, `get_lr`) and model.py (where dropout stands).
"""

from collections.abc import Mapping
from typing import Any

from tinyllm_jax.config import ModelConfig

# Its words, some of which others have too, and ours.
WORDS = {
    "learning_rate": ("optimizer", "learning_rate"),
    "min_lr": ("optimizer", "min_learning_rate"),
    "warmup_iters": ("optimizer", "warmup_steps"),
    "lr_decay_iters": ("optimizer", "decay_steps"),
    "weight_decay": ("optimizer", "weight_decay"),
    "beta1": ("optimizer", "beta1"),
    "beta2": ("optimizer", "beta2"),
    "grad_clip": ("optimizer", "max_grad_norm"),
    "max_iters": ("train", "max_steps"),
    "batch_size": ("train", "batch_size"),
    "gradient_accumulation_steps": ("train", "gradient_accumulation_steps"),
    "eval_interval": ("train", "eval_interval_steps"),
    "eval_iters": ("train", "eval_batches"),
    "seed": ("train", "seed"),
}
# It drops after the embedding, on attention weights, and on what either half of a block adds.
DROPOUTS = ("embedding_dropout", "attention_dropout", "residual_dropout")
SCHEDULE_NOTE = (
    "llama2.c counts updates from 0 for its learning rate and this project from 1, so the schedule "
    "goes on one update ahead"
)


def llama2c_settings(
    table: Mapping[str, Any], model: ModelConfig
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Bring its settings into our sections; what is no number is passed over.

    Args:
        model: The model of the run.

    Returns:
        Settings by section and name, and what a person should know of them.
    """
    found: dict[str, dict[str, Any]] = {
        name: {} for name in ("model", "data", "optimizer", "train")
    }
    for theirs, (section, ours) in WORDS.items():
        if _is_number(table.get(theirs)):
            found[section][ours] = table[theirs]
    optimizer = found["optimizer"]
    optimizer.setdefault("min_learning_rate", 0.0)
    if "warmup_iters" not in table:  # another project's
        return found, []
    if _is_number(table.get("max_seq_len")):
        longest = model.max_position_embeddings
        found["data"]["sequence_length"] = min(table["max_seq_len"], longest)
    if _is_number(table.get("dropout")) and table["dropout"]:
        found["model"] = dict.fromkeys(DROPOUTS, table["dropout"])
    if table.get("decay_lr", True):
        return found, [SCHEDULE_NOTE]
    # Without decay it has no warm-up either; a cosine from the peak to itself is constant.
    optimizer["warmup_steps"] = 0
    if "learning_rate" in optimizer:
        optimizer["min_learning_rate"] = optimizer["learning_rate"]
    return found, []


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
