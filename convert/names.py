"""Other projects' names for weights and settings, turned into this project's.

Three families of weight names are known: Hugging Face's own (also MiniMind, and this project),
Meta's (llama2.c, Tiny-K: `attention.wq`, `feed_forward.w1`), and a mixture of both (TinyLLM:
`attention.q_proj`, `mlp.gate_proj`). Meta's come with interleaved rotary positions.

Source: karpathy/llama2.c, model.py; datawhalechina/happy-llm, docs/chapter5/code/k_model.py;
jingyaogong/minimind, model/model_minimind.py.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, get_type_hints

import numpy as np

from convert.architectures import ARCHITECTURES, kind_of
from convert.bundle import Arrays, check_tensors, expected_shapes, model_config, settle_tying
from convert.checks import listed, read_number
from convert.expert_names import from_foreign
from convert.layout import HALF_SPLIT, INTERLEAVED, half_split
from convert.setting_values import HUGGING_FACE_SETTINGS
from tinyllm_jax.config import ModelConfig, load_config, preset_names
from tinyllm_jax.errors import InputError

# What torch.compile and DistributedDataParallel put before, or into, a name.
WRAPPERS = ("_orig_mod.", "module.")
META = "Meta"

_PROJECTIONS = {
    **{f"{home}.{letter}_proj": f"self_attn.{letter}_proj" for letter in "qkvo" for home in ("attention", "attn", "self_attn")},
    **{f"{home}.out_proj": "self_attn.o_proj" for home in ("attention", "attn", "self_attn")},
    **{f"{home}.{part}_proj": f"mlp.{part}_proj" for part in ("gate", "up", "down") for home in ("mlp", "feed_forward", "ffn")},
}  # fmt: skip
_META_PROJECTIONS = {
    **{f"attention.w{letter}": f"self_attn.{letter}_proj" for letter in "qkvo"},
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_NORMS = {
    **dict.fromkeys(
        ("input_layernorm", "attention_norm", "attn_norm", "norm1", "ln1", "ln_1"),
        "input_layernorm",
    ),
    **dict.fromkeys(
        ("post_attention_layernorm", "ffn_norm", "mlp_norm", "norm2", "ln2", "ln_2"),
        "post_attention_layernorm",
    ),
}
_IN_LAYER = _PROJECTIONS | _META_PROJECTIONS | _NORMS
_OUTSIDE = {
    **dict.fromkeys(
        ("embed_tokens", "tok_embeddings", "token_embedding", "token_embeddings", "embedding", "wte"),
        "embed_tokens",
    ),
    **dict.fromkeys(("norm", "final_norm", "ln_f", "norm_f"), "norm"),
    **dict.fromkeys(("lm_head", "output"), "lm_head"),
    "score": "score",
}  # fmt: skip
# Tables that can be computed again, which some projects store beside the weights.
_TABLE = re.compile(
    r"(^|\.)(freqs_cis|freqs_cos|freqs_sin|inv_freq|cos_cached|sin_cached|mask|causal_mask)$"
)
# As many digits as a number of layers can have.
_LAYER = re.compile(r"^(?:layers|blocks|h)\.([0-9]{1,6})\.(.+)\.weight$")

# Other words for settings, the likeliest first.
_WORDS = {
    "hidden_size": ("hidden_size", "dim", "d_model", "n_embd"),
    "num_attention_heads": ("num_attention_heads", "n_heads", "num_heads", "n_head"),
    "num_key_value_heads": ("num_key_value_heads", "n_kv_heads", "num_kv_heads", "n_kv_head"),
    "num_hidden_layers": ("num_hidden_layers", "n_layers", "num_layers", "n_layer"),
    "vocab_size": ("vocab_size",),
    "intermediate_size": ("intermediate_size", "d_ff", "ffn_dim"),
    "head_dim": ("head_dim",),
    "max_position_embeddings": (
        "max_position_embeddings", "max_seq_len", "max_seq_length", "max_sequence_length",
        "context_length", "block_size",
    ),
    "rope_theta": ("rope_theta", "rope_base", "theta"),
    "rms_norm_eps": ("rms_norm_eps", "norm_eps", "layer_norm_eps", "eps"),
    "tie_word_embeddings": ("tie_word_embeddings", "tie_weights", "weight_tying", "tie_embeddings"),
    "initializer_range": ("initializer_range",),
    # What `check_config` says in our own words.
    **{name: (name,) for name in sorted(HUGGING_FACE_SETTINGS)},
    "router_aux_loss_coef": ("router_aux_loss_coef",),
    "router_aux_loss_level": ("router_aux_loss_level",),
}  # fmt: skip
# Settings of which 0 says something; elsewhere 0 and None stand for "derived from the rest".
_ZERO_COUNTS = {"num_experts", "num_shared_experts", "router_aux_loss_coef"}
_TYPES = get_type_hints(ModelConfig)
# What no shape tells, and changes every number, as a config.json that lacks it means it.
_UNTOLD = ("rms_norm_eps", "rope_theta", "max_position_embeddings")
_DEFAULTS = {
    **{kind: each.defaults for kind, each in ARCHITECTURES.items()},
    "minimind": {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 32768},
    "llama2.c": {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 2048},
}


def plain_names(arrays: Mapping[str, Any], *, origin: str) -> dict[str, str]:
    """Map each name of a state dict to the same without what wrappers put into it.

    Tables that are no weights are left out.
    """
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    if numbers := [name for name in arrays if not isinstance(name, str)]:
        raise InputError(
            f"{origin}: tensors under keys that are no names: {listed(numbers)}. Give a file that "
            "holds a state dict."
        )
    for name in arrays:
        plain = name
        for wrapper in WRAPPERS:
            plain = re.sub(rf"(^|\.){re.escape(wrapper)}", r"\1", plain)
        plain = plain.removeprefix("model.").removeprefix("transformer.")
        if _TABLE.search(plain):
            continue
        if plain in taken:
            raise InputError(
                f"{origin}: {listed([taken[plain], name], between=' and ')} are the same weight. "
                "Keep one of them."
            )
        taken[plain] = name
        found[name] = plain
    return found


def family(names: Iterable[str]) -> str:
    """Tell whose names these are; only Meta's matters, for its rotary positions."""
    return META if any(re.search(r"\.attention\.wq\.weight$", name) for name in names) else ""


def bundle_name(name: str) -> str:
    """Give a weight's name in a bundle, or the name itself where it is not known."""
    if match := _LAYER.match(name):
        return f"layers.{match[1]}.{_IN_LAYER.get(match[2], match[2])}.weight"
    stem = name.removesuffix(".weight")
    return f"{_OUTSIDE[stem]}.weight" if stem in _OUTSIDE and name.endswith(".weight") else name


def untangle_swapped(weights: Arrays, *, certain: bool, origin: str) -> bool:
    """Put w2 and w3 of Meta's MLP right where a file has them swapped.

    Among the public texts of Tiny-K one calls the projection back to the stream w3. The shapes
    tell, unless the MLP is as wide as the stream.

    Args:
        certain: The file is of a project known never to swap them.

    Returns:
        Whether they were swapped.

    Raises:
        InputError: the shapes cannot tell.
    """
    up, down = (weights.get(f"layers.0.mlp.{part}_proj.weight") for part in ("up", "down"))
    if up is None or down is None or up.ndim != 2:
        return False
    if up.shape[0] == up.shape[1] and not certain:
        raise InputError(
            f"{origin}: the MLP is as wide as the stream ({up.shape[0]}), so shapes cannot tell "
            "feed_forward.w2 from w3, which texts of Tiny-K call by each other's name. Rename them "
            "to mlp.down_proj (back to the stream) and mlp.up_proj."
        )
    gate = weights.get("layers.0.mlp.gate_proj.weight")
    if gate is None or gate.shape != down.shape or gate.shape == up.shape:
        return False
    for name in [name for name in weights if name.endswith("mlp.up_proj.weight")]:
        other = name.replace("up_proj", "down_proj")
        if other in weights:
            weights[name], weights[other] = weights[other], weights[name]
    return True


def to_bundle_weights(
    arrays: Mapping[str, np.ndarray], *, certain: bool, origin: str
) -> tuple[Arrays, dict[str, Any]]:
    """Rename a foreign state dict; rotary rows stay as they are.

    Returns:
        The weights, and what was found: `rope` and `swapped`.
    """
    plain = plain_names(arrays, origin=origin)
    meta = family(plain.values()) == META
    named = {bundle_name(plain[name]): array for name, array in arrays.items() if name in plain}
    if len(named) < len(plain):
        raise InputError(
            f"{origin}: several tensors stand for the same weight: "
            f"{listed(sorted(plain.values()))}. Keep one of each."
        )
    weights = from_foreign(named, origin=origin)
    swapped = meta and untangle_swapped(weights, certain=certain, origin=origin)
    return weights, {"rope": INTERLEAVED if meta else HALF_SPLIT, "swapped": swapped}


def declared_settings(table: Mapping[str, Any], *, origin: str) -> dict[str, Any]:
    """Pick the settings of the model out of another project's config, under our names.

    Raises:
        InputError: a value is not of the type that the setting has.
    """
    found = {}
    for ours, words in _WORDS.items():
        word = next((word for word in words if table.get(word) is not None), None)
        if word is None:
            continue
        value = read_number(table[word], _TYPES[ours], what=word, origin=origin)
        if value != 0 or isinstance(value, bool) or ours in _ZERO_COUNTS:
            found[ours] = value
    return found


def settings_from_shapes(weights: Arrays, declared: Mapping[str, Any]) -> dict[str, Any]:
    """Complete declared settings with what the shapes of the weights tell."""
    fields = dict(declared)
    layers = [int(match[1]) for name in weights if (match := _LAYER.match(name))]
    # What is no matrix tells nothing, and is refused by name once all settings are known.
    table, gate, query, key, router, expert, shared = (
        array if (array := weights.get(f"{name}.weight")) is not None and array.ndim == 2 else None
        for name in (
            "embed_tokens",
            "layers.0.mlp.gate_proj",
            "layers.0.self_attn.q_proj",
            "layers.0.self_attn.k_proj",
            "layers.0.mlp.gate",
            "layers.0.mlp.experts.0.gate_proj",
            "layers.0.mlp.shared_experts.gate_proj",
        )
    )
    if layers:
        fields.setdefault("num_hidden_layers", max(layers) + 1)
    if table is not None:
        fields.setdefault("vocab_size", table.shape[0])
        fields.setdefault("hidden_size", table.shape[1])
    if gate is not None:
        fields.setdefault("intermediate_size", gate.shape[0])
    if router is not None:
        fields.setdefault("num_experts", router.shape[0])
    if expert is not None and fields.get("num_experts"):
        inner = fields.setdefault("moe_intermediate_size", expert.shape[0])
        fields.setdefault("intermediate_size", inner)
        if shared is not None and inner:
            fields.setdefault("num_shared_experts", shared.shape[0] // inner)
    fields.setdefault("qk_norm", "layers.0.self_attn.q_norm.weight" in weights)
    heads = fields.get("num_attention_heads")
    if heads and query is not None:
        fields.setdefault("head_dim", query.shape[0] // heads)
    if fields.get("head_dim") and key is not None:
        fields.setdefault("num_key_value_heads", max(1, key.shape[0] // fields["head_dim"]))
    return fields


def take_defaults(fields: dict[str, Any], table: Mapping[str, Any], *, certain: bool) -> list[str]:
    """Fill in what neither a config says nor shapes tell: the defaults of whose config it is.

    Args:
        certain: The config is llama2.c's.

    Returns:
        A sentence about them for the report, or nothing.
    """
    whose, defaults = "this project", {name: getattr(ModelConfig(), name) for name in _UNTOLD}
    kind = "llama2.c" if certain else kind_of(table)
    if kind in _DEFAULTS:
        whose, defaults = kind, _DEFAULTS[kind]
    if kind == "minimind" and fields["qk_norm"]:  # its second generation
        defaults = defaults | {"rms_norm_eps": 1e-6}
    missing = {name: defaults[name] for name in _UNTOLD if name not in fields}
    fields.update(missing)
    missing |= take_original_context(fields)
    if not missing:
        return []
    words = ", ".join(f"{name}={value:g}" for name, value in missing.items())
    return [f"the source does not say {words}; these are the defaults of {whose}"]


def take_original_context(fields: dict[str, Any]) -> dict[str, Any]:
    """Fill in the context that stretched frequencies were trained on as transformers does."""
    name = "rope_original_max_position_embeddings"
    if fields.get("rope_type") not in ("llama3", "yarn") or name in fields:
        return {}
    fields[name] = fields["max_position_embeddings"]
    return {name: fields[name]}


def foreign_model(
    arrays: Mapping[str, np.ndarray],
    table: Mapping[str, Any] | None,
    *,
    settings: ModelConfig | None,
    certain: bool,
    origin: str,
) -> tuple[ModelConfig, Arrays, dict[str, Any]]:
    """Turn another project's weights and settings into a model, checked.

    Args:
        table: The config that stands in the file or beside it.
        settings: What `--config` names, instead of the table.
        certain: w2 and w3 are known not to be swapped.

    Returns:
        The model, its weights half-split, and what was found: `rope`, `swapped`, and `notes` for
        the report.

    Raises:
        InputError: no settings are known, or the tensors are not those of the settings.
    """
    weights, found = to_bundle_weights(arrays, certain=certain, origin=origin)
    table = table or {}
    notes: list[str] = []
    if found["swapped"]:
        notes.append("feed_forward.w2 and w3 were swapped in the source; their shapes told")
    if settings is not None:
        declared_tying = settings.tie_word_embeddings
        config = settings
        settle_tying(weights, declared_tying, origin=origin)
    else:
        declared = declared_settings(table, origin=origin)
        declared["score_head"] = "score.weight" in weights
        if declared["score_head"] and "lm_head.weight" not in weights:
            # A reward model of transformers has no other head, whatever it says of tying one.
            declared.pop("tie_word_embeddings", None)
        tied = settle_tying(weights, declared.get("tie_word_embeddings"), origin=origin)
        declared["tie_word_embeddings"] = tied
        if "num_attention_heads" not in declared:
            preset, name = preset_of(weights, tied=tied, origin=origin)
            fields = dataclasses.asdict(preset) | declared
            if "rope_type" in declared and "rope_original_max_position_embeddings" not in declared:
                fields.pop("rope_original_max_position_embeddings")
                take_original_context(fields)
            config = model_config(fields, origin=origin)
            notes.append(
                f"the source does not say all settings; those of the preset {name} were taken, "
                "whose shapes it has (--config NAME or FILE.toml for others)"
            )
        else:
            fields = settings_from_shapes(weights, declared)
            notes += take_defaults(fields, table, certain=certain)
            if fields.get("num_experts") and "num_experts_per_tok" not in fields:
                raise InputError(
                    f"{origin}: it does not say how many experts each token passes. Set "
                    "num_experts_per_tok in its config.json, or add --config NAME or FILE.toml."
                )
            config = model_config(fields, origin=origin)
    check_tensors(weights, config, origin=origin)
    if found["rope"] == INTERLEAVED:
        weights = {name: half_split(name, array, config) for name, array in weights.items()}
    return config, weights, found | {"notes": notes}


def preset_of(weights: Arrays, *, tied: bool, origin: str) -> tuple[ModelConfig, str]:
    """Find the preset that has exactly these shapes, where a file says nothing of its settings.

    Shapes alone do not tell how many heads share the rows of a projection.
    """
    shapes = {name: array.shape for name, array in weights.items()}
    for name in preset_names():
        config = load_config(name).model
        if config.tie_word_embeddings == tied and expected_shapes(config) == shapes:
            return config, name
    raise InputError(
        f"{origin}: it holds no settings (heads, rope_theta), and no preset has its shapes. Lay its "
        "config.json beside it, or add --config NAME or FILE.toml."
    )
