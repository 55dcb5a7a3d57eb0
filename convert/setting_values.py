"""Refuse settings: of a file, where they cannot be what they are called; of a model, where a format
has no place for them.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from convert.checks import LARGEST_SIZE, listed, shown
from tinyllm_jax.config import ModelConfig
from tinyllm_jax.errors import InputError

# Settings that every format holds.
SHARED_SETTINGS = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta", "rms_norm_eps",
    "tie_word_embeddings",
}  # fmt: skip
# Settings that Hugging Face folders hold as well, where an architecture of transformers has them.
HUGGING_FACE_SETTINGS = {
    "qk_norm", "score_head", "rope_type", "rope_factor", "rope_original_max_position_embeddings",
    "rope_low_freq_factor", "rope_high_freq_factor", "rope_beta_fast", "rope_beta_slow",
    "rope_attention_factor", "num_experts", "num_experts_per_tok", "num_shared_experts",
    "moe_intermediate_size", "norm_topk_prob",
}  # fmt: skip
# Settings that change no number of a forward pass: how it is computed, and how it is trained.
EXECUTION_SETTINGS = {
    "compute_dtype", "attention", "activation_checkpointing", "scan_layers", "initializer_range",
    "embedding_dropout", "attention_dropout", "residual_dropout", "mlp_dropout",
    "router_aux_loss_coef", "router_aux_loss_level", "router_z_loss_coef",
}  # fmt: skip
_EXPERT_SETTINGS = {
    "num_experts_per_tok", "num_shared_experts", "moe_intermediate_size", "norm_topk_prob",
}  # fmt: skip
_ROPE_SETTINGS = {
    "default": set(),
    "linear": {"rope_factor"},
    "llama3": {
        "rope_factor", "rope_original_max_position_embeddings", "rope_low_freq_factor",
        "rope_high_freq_factor",
    },
    "yarn": {
        "rope_factor", "rope_original_max_position_embeddings", "rope_beta_fast", "rope_beta_slow",
        "rope_attention_factor",
    },
}  # fmt: skip


def computed_settings(model: ModelConfig) -> dict[str, Any]:
    """List the settings that change this model's forward pass, those to come among them.

    Without those of what the model does not have: experts, an MLP, another stretching.
    """
    idle = {"intermediate_size"} if model.num_experts > 0 else _EXPERT_SETTINGS
    idle = idle | set().union(*_ROPE_SETTINGS.values()) - _ROPE_SETTINGS[model.rope_type]
    table = dataclasses.asdict(model)
    return {name: v for name, v in table.items() if name not in EXECUTION_SETTINGS | idle}


def check_values(
    table: Mapping[str, Any],
    *,
    whole: Mapping[str, int],
    numbers: Iterable[str],
    switches: Iterable[str],
    origin: str,
) -> None:
    """Check the type and size of every setting that is there; None is as good as absent.

    Args:
        whole: Settings that are whole numbers, with the smallest that each may be.
        numbers: Those that are numbers above 0.
        switches: Those that are true or false.

    Raises:
        InputError: every value that is none of these, in one line.
    """
    problems = []
    for key, least in whole.items():
        value = table.get(key)
        fits = (
            isinstance(value, int)
            and not isinstance(value, bool)
            and least <= value <= LARGEST_SIZE
        )
        if value is not None and not fits:
            problems.append(
                f"{key}={shown(value)} is no whole number from {least} to {LARGEST_SIZE}"
            )
    for key in numbers:
        if table.get(key) is not None and not _is_number(table[key]):
            problems.append(f"{key}={shown(table[key])} is no number above 0")
    for key in switches:
        if not isinstance(table.get(key), (bool, type(None))):
            problems.append(f"{key}={shown(table[key])} is neither true nor false")
    if problems:
        raise InputError(f"{origin}: {listed(problems)}. Correct it, or get the file again.")


def check_held(model: ModelConfig, *, to: str) -> None:
    """Refuse a model that is no plain Llama, before a format writes it that holds nothing else.

    Raises:
        InputError: every such setting, by name.
    """
    usual = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    others = [
        f"{name}={value}"
        for name, value in computed_settings(model).items()
        if name not in SHARED_SETTINGS and value != usual[name]
    ]
    if others:
        raise InputError(
            f"{to}: {', '.join(others)} is not held by this format. Use --to hf, orbax, torch or "
            "safetensors."
        )


def _is_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value) and value > 0
    except OverflowError:  # a whole number that no float holds
        return False
