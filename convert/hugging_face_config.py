"""The config.json of Hugging Face: what it says, what it leaves out, and what is not computed here.

It says rope_theta twice: by itself, as transformers 4 reads it, and inside `rope_parameters`, as
transformers 5 does; stretched positions as well, in `rope_scaling`.

Source: huggingface/transformers, models/llama/configuration_llama.py and modeling_rope_utils.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.architectures import (
    ARCHITECTURES,
    EXPERT_SIZES,
    EXPERT_SWITCHES,
    MULTIPLIERS,
    architecture_of,
    architecture_words,
    family_settings,
    kind_of,
    unlike,
)
from convert.bundle import Bundle
from convert.checks import parse_json, shown
from convert.rope_words import HOMES, ORIGINAL, read_rope, rope_words
from convert.setting_values import check_values
from tinyllm_jax.errors import InputError

CONFIG = "config.json"
# Folders of these types are read once the settings below hold; the last ones are no transformers.
KNOWN_TYPES = {*ARCHITECTURES, "minimind", "Tiny-K", "Tiny-k", "tiny-k"}
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip
NUMBERS = (
    "rms_norm_eps", "rope_theta", "partial_rotary_factor", "attention_multiplier", *MULTIPLIERS,
)  # fmt: skip
SWITCHES = ("tie_word_embeddings", "use_sliding_window", *EXPERT_SWITCHES)


def read_table(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds a table."""
    table = parse_json(file.read_bytes(), origin=str(file))
    if not isinstance(table, dict):
        raise InputError(f"{file}: not a table of settings. Get the file again.")
    return table


def read_config(file: Path) -> dict[str, Any]:
    """Read a config.json that lies beside weights; what it leaves out stays so.

    Raises:
        InputError: every setting that this model does not compute, by name.
    """
    return _known(read_table(file), origin=str(file))


def read_whole_config(file: Path) -> tuple[dict[str, Any], list[str]]:
    """Read the config.json of a folder, complete as transformers completes it.

    Returns:
        The settings, and a sentence about those that the file leaves out, or none.
    """
    table = read_table(file)
    checked = _known(table, origin=str(file))
    kind = table.get("model_type", "llama")
    # What others leave out is for their own defaults.
    defaults = ARCHITECTURES[kind].defaults if kind in ARCHITECTURES else {}
    absent = {
        key: value
        for key, value in defaults.items()
        if table.get(key) is None
        and not key.endswith("sliding_window")
        and not (key == "rope_theta" and checked.get(key) is not None)
    }
    if not absent:
        return checked, []
    said = ", ".join(f"{key}={str(value).lower()}" for key, value in absent.items())
    note = f"{CONFIG} does not say, so Hugging Face's defaults were taken: {said}"
    # An architecture's own words are in what was checked already.
    return checked | {key: absent[key] for key in absent if key not in checked}, [note]


def _known(table: dict[str, Any], *, origin: str) -> dict[str, Any]:
    kind = table.get("model_type", "llama")
    if not isinstance(kind, str) or kind not in KNOWN_TYPES:
        raise InputError(
            f"{origin}: model_type={shown(kind)} is not computed as a Llama is. Give a folder of one "
            f"of {', '.join(sorted(KNOWN_TYPES))}."
        )
    if kind in ARCHITECTURES:
        # Others write 0 for what follows from the rest.
        sizes: dict[str, int] = dict.fromkeys(SIZES, 1)
        check_values(table, whole=sizes, numbers=(), switches=(), origin=origin)
    return check_config(table, origin=origin)


def check_config(table: Mapping[str, Any], *, origin: str) -> dict[str, Any]:
    """Refuse settings that this model does not compute; say rotary positions and experts our way.

    Raises:
        InputError: every such thing, by name.
    """
    table = dict(table)
    sizes: dict[str, int] = dict.fromkeys(
        (*SIZES, "head_dim", "sliding_window", "n_group", *EXPERT_SIZES), 0
    )
    check_values(
        table,
        whole=sizes | {ORIGINAL: 1},
        numbers=NUMBERS,
        switches=SWITCHES,
        origin=origin,
    )
    kind = kind_of(table)
    rope, problems = read_rope(table, origin=origin)
    problems += unlike(table, kind)
    if table.get("partial_rotary_factor", 1.0) not in (1.0, None):
        problems.append(f"partial_rotary_factor={table['partial_rotary_factor']}")
    if problems:
        raise InputError(
            f"{origin}: {', '.join(problems)}: not supported. Give a model without it."
        )
    family = family_settings(table, kind)
    for word in (*HOMES, *EXPERT_SIZES, *EXPERT_SWITCHES):
        table.pop(word, None)
    return table | family | rope


def config_table(bundle: Bundle) -> dict[str, Any]:
    """Write config.json for both versions of transformers."""
    model, rope = bundle.model, rope_words(bundle.model)
    architecture, class_name = architecture_of(model), architecture_of(model).class_name
    labels: dict[str, Any] = {}
    if model.score_head:
        class_name = class_name.replace("ForCausalLM", "ForSequenceClassification")
        labels = {"num_labels": 1, "id2label": {"0": "REWARD"}, "label2id": {"REWARD": 0}}
    dtype = next(iter(bundle.weights.values())).dtype.name
    stretched = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "architectures": [class_name],
        "model_type": architecture.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": None if model.rope_type == "default" else stretched,
        "rope_parameters": rope,
        "tie_word_embeddings": model.tie_word_embeddings,
        "initializer_range": model.initializer_range,
        "attention_dropout": model.attention_dropout,
        "hidden_act": "silu",
        "use_cache": True,
        **architecture_words(model),
        **labels,
        "dtype": dtype,
        "torch_dtype": dtype,
        **token_ids(bundle),
    }


def token_ids(bundle: Bundle) -> dict[str, int | None]:
    """Name the control tokens, and say null where no tokenizer does: the defaults are 1 and 2."""
    tokenizer = bundle.tokenizer
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
