"""Stretched rotary positions in the words of a Hugging Face config.json, and back.

Transformers 4 has them as `rope_scaling`, with `rope_theta` beside it; transformers 5 as
`rope_parameters`, with `rope_theta` inside, and takes `rope_scaling` first where both are there.

Source: huggingface/transformers, modeling_rope_utils.py.
"""

from collections.abc import Mapping
from typing import Any

from convert.checks import listed, shown
from convert.setting_values import check_values
from tinyllm_jax.config import ModelConfig
from tinyllm_jax.errors import InputError

HOMES = ("rope_scaling", "rope_parameters")
NUMBERS = (
    "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
    "attention_factor", "partial_rotary_factor",
)  # fmt: skip
ORIGINAL = "original_max_position_embeddings"
# Their words and ours, those that must be there and those with a default of transformers.
_NEEDED = {
    "linear": {"factor": "rope_factor"},
    "llama3": {
        "factor": "rope_factor",
        "low_freq_factor": "rope_low_freq_factor",
        "high_freq_factor": "rope_high_freq_factor",
    },
    "yarn": {"factor": "rope_factor"},
}
_YARN = {"beta_fast": ("rope_beta_fast", 32.0), "beta_slow": ("rope_beta_slow", 1.0)}
# What changes the frequencies, or how much attention is sharpened, in a way of its own.
_UNKNOWN = ("mscale", "mscale_all_dim", "mrope_section", "short_factor", "long_factor")


def rope_words(model: ModelConfig) -> dict[str, Any]:
    """Say a model's rotary settings as the content of `rope_parameters`."""
    words: dict[str, Any] = {"rope_type": model.rope_type, "rope_theta": model.rope_theta}
    for theirs, ours in _NEEDED.get(model.rope_type, {}).items():
        words[theirs] = float(getattr(model, ours))
    if model.rope_type in ("llama3", "yarn"):
        words[ORIGINAL] = model.rope_original_max_position_embeddings
    if model.rope_type == "yarn":
        words |= {theirs: float(getattr(model, ours)) for theirs, (ours, _) in _YARN.items()}
        if model.rope_attention_factor > 0:
            words["attention_factor"] = float(model.rope_attention_factor)
    return words


def read_rope(table: Mapping[str, Any], *, origin: str) -> tuple[dict[str, Any], list[str]]:
    """Read the rotary settings of a config.json under our names; what is absent is left out.

    Returns:
        The settings, and what this model does not compute, in words.

    Raises:
        InputError: a value is none of what it is called.
    """
    problems: list[str] = []
    found: dict[str, dict[str, Any]] = {}
    for home in HOMES:
        if not isinstance(table.get(home) or {}, Mapping):
            raise InputError(
                f"{origin}: {home}={shown(table[home])} is no table. Get the file again."
            )
        if table.get(home):
            found[home] = _read_one(table[home], problems, home=home, origin=origin)
    settings = dict(next(iter(found.values()), {}))
    for other in list(found.values())[1:]:
        # What the first leaves out stands beside it.
        beside = {"rope_theta": table["rope_theta"]} if table.get("rope_theta") else {}
        known = beside | settings
        differ = [name for name, value in other.items() if known.get(name, value) != value]
        if differ and not problems:
            problems.append(f"rope_scaling and rope_parameters with different {listed(differ)}")
        settings = other | settings
    original = table.get(ORIGINAL)
    if original is not None and settings.get("rope_type") in ("llama3", "yarn"):
        settings["rope_original_max_position_embeddings"] = original
    return settings, problems


def _read_one(
    values: Mapping[str, Any], problems: list[str], *, home: str, origin: str
) -> dict[str, Any]:
    """Read one of the two tables."""
    nested = [key for key, value in values.items() if isinstance(value, Mapping)]
    if nested:
        problems.append(f"rotary positions of their own for {listed(nested)} ({home})")
        return {}
    word = values.get("rope_type", values.get("type")) or "default"
    if not isinstance(word, str) or word not in ("default", *_NEEDED):
        problems.append(f"rotary positions scaled by {shown(word)} ({home})")
        return {}
    check_values(
        values, whole={ORIGINAL: 1}, numbers=NUMBERS, switches=(), origin=f"{origin}, {home}"
    )
    theta = values.get("rope_theta")
    settings: dict[str, Any] = {"rope_type": word} | (
        {} if theta is None else {"rope_theta": theta}
    )
    if values.get("partial_rotary_factor", 1.0) not in (1.0, None):
        problems.append(f"partial_rotary_factor={values['partial_rotary_factor']} ({home})")
    if word == "default":
        return settings
    unknown = [key for key in _UNKNOWN if values.get(key) is not None]
    unknown += ["truncate=false"] if word == "yarn" and not values.get("truncate", True) else []
    missing = [key for key in _NEEDED[word] if values.get(key) is None]
    problems += [f"rotary positions scaled by {word} with {key} ({home})" for key in unknown]
    problems += [f"rotary positions scaled by {word} without {key} ({home})" for key in missing]
    for theirs, ours in _NEEDED[word].items():
        settings[ours] = values.get(theirs)
    if word in ("llama3", "yarn") and values.get(ORIGINAL) is not None:
        settings["rope_original_max_position_embeddings"] = values[ORIGINAL]
    if word == "yarn":
        for theirs, (ours, default) in _YARN.items():
            settings[ours] = values.get(theirs) or default
        if values.get("attention_factor") is not None:
            settings["rope_attention_factor"] = values["attention_factor"]
    return settings
