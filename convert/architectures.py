"""The architectures of transformers that compute exactly what this model does, and their words.

| architecture      | norms of q, k | experts | shared expert | chosen experts add up to 1 |
|-------------------|---------------|---------|---------------|----------------------------|
| `llama`, `mistral`| no            | no      |               |                            |
| `qwen3`           | yes           | no      |               |                            |
| `qwen3_moe`       | yes           | yes     | no            | either way                 |
| `mixtral`         | no            | yes     | no            | yes                        |
| `granitemoeshared`| no            | yes     | yes           | yes                        |

Source: huggingface/transformers, models/NAME/configuration_NAME.py and modeling_NAME.py; MiniMind:
jingyaogong/minimind, model/model_minimind.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from convert.checks import shown
from tinyllm_jax.config import ModelConfig
from tinyllm_jax.errors import InputError

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
# Every word about experts in configs of others; none of them is read as it stands.
EXPERT_SIZES = (
    *COUNTS, "num_experts_per_tok", "moe_intermediate_size", "shared_intermediate_size",
    "n_shared_experts", "num_shared_experts", "decoder_sparse_step",
)  # fmt: skip
EXPERT_SWITCHES = ("norm_topk_prob", "use_moe", "seq_aux")
_GRANITE = {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0}
MULTIPLIERS = _GRANITE | {"routed_scaling_factor": 1.0}
# What an architecture may say and this model computes in one way only.
_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu",),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
    "first_k_dense_replace": (0,),
    "scoring_func": ("softmax",),
    "n_group": (1,),
    **{name: (value,) for name, value in MULTIPLIERS.items()},
}
# An inexact square root in somebody's config is the same number in float32.
_NEARLY = 1e-6


@dataclass(frozen=True)
class Architecture:
    """One model_type of transformers.

    Args:
        defaults: What transformers takes where a config.json leaves it out.
    """

    model_type: str
    class_name: str
    qk_norm: bool
    experts: bool
    defaults: Mapping[str, Any]


def _defaults(
    *, longest: int, theta: float = 10000.0, eps: float = 1e-6, **more: Any
) -> dict[str, Any]:
    return {
        "num_attention_heads": 32,
        "max_position_embeddings": longest,
        "rms_norm_eps": eps,
        "rope_theta": theta,
        "tie_word_embeddings": False,
    } | more


_QWEN = {"use_sliding_window": False}
_TWO = {"num_experts_per_tok": 2}
_ALL = (
    Architecture("llama", "LlamaForCausalLM", False, False, _defaults(longest=2048)),
    Architecture(
        "mistral",
        "MistralForCausalLM",
        False,
        False,
        _defaults(longest=131072, sliding_window=4096),
    ),
    Architecture("qwen3", "Qwen3ForCausalLM", True, False, _defaults(longest=32768, **_QWEN)),
    Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        True,
        True,
        _defaults(longest=32768, **_QWEN, num_experts_per_tok=8, norm_topk_prob=False),
    ),
    Architecture(
        "mixtral",
        "MixtralForCausalLM",
        False,
        True,
        _defaults(longest=131072, theta=1e6, eps=1e-5, **_TWO),
    ),
    Architecture(
        "granitemoeshared",
        "GraniteMoeSharedForCausalLM",
        False,
        True,
        _defaults(longest=2048, **_TWO, attention_multiplier=1.0, shared_intermediate_size=0),
    ),
)
ARCHITECTURES = {each.model_type: each for each in _ALL}


def architecture_of(model: ModelConfig) -> Architecture:
    """Choose the architecture that computes what a model does.

    Raises:
        InputError: transformers has none; which setting stands in the way.
    """
    if model.num_experts == 0:
        # LlamaConfig takes no heads of a width of their own that do not divide hidden_size.
        plain = "mistral" if model.hidden_size % model.num_attention_heads else "llama"
        return ARCHITECTURES["qwen3" if model.qk_norm else plain]
    shared = model.num_shared_experts > 0
    if shared and model.score_head:
        raise InputError(
            f"hf: score_head=True with num_shared_experts={model.num_shared_experts} is computed by "
            "no architecture of transformers. Train the reward model without shared experts, or use "
            "--to orbax, torch or safetensors."
        )
    if shared and model.qk_norm:
        raise _not_computed(
            f"num_shared_experts={model.num_shared_experts} with qk_norm=True",
            "model.qk_norm=false (granitemoeshared) or model.num_shared_experts=0 (qwen3_moe)",
        )
    if model.qk_norm:
        return ARCHITECTURES["qwen3_moe"]
    if not model.norm_topk_prob:
        other = "" if shared else ", or model.qk_norm=true (qwen3_moe)"
        raise _not_computed(
            f"norm_topk_prob=False with qk_norm=False and num_shared_experts="
            f"{model.num_shared_experts}",
            f"model.norm_topk_prob=true ({'granitemoeshared' if shared else 'mixtral'}){other}",
        )
    return ARCHITECTURES["granitemoeshared" if shared else "mixtral"]


def _not_computed(what: str, instead: str) -> InputError:
    return InputError(
        f"hf: {what} is computed by no architecture of transformers. Train with {instead}, or use "
        "--to orbax, torch or safetensors."
    )


def architecture_words(model: ModelConfig) -> dict[str, Any]:
    """Say in a config.json what an architecture has beside a Llama."""
    kind = architecture_of(model).model_type
    if kind == "mistral":
        return {"sliding_window": None}
    words: dict[str, Any] = {} if kind == "mixtral" else {"attention_bias": False}
    if kind == "llama":
        return words | {"mlp_bias": False}
    if kind in ("qwen3", "qwen3_moe"):
        words |= {"use_sliding_window": False, "sliding_window": None}
    if kind == "qwen3":
        return words
    # Transformers 4 counts them as num_experts where 5 writes num_local_experts.
    words |= {
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.num_experts_per_tok,
        "output_router_logits": False,
    }
    if kind == "qwen3_moe":
        return words | {
            "num_experts": model.num_experts,
            "moe_intermediate_size": model.moe_intermediate_size,
            "norm_topk_prob": model.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    words["intermediate_size"] = model.moe_intermediate_size
    if kind == "mixtral":
        return words | {"sliding_window": None, "router_jitter_noise": 0.0}
    return (
        words
        | _GRANITE
        | {
            "attention_multiplier": model.head_dim**-0.5,
            "shared_intermediate_size": model.num_shared_experts * model.moe_intermediate_size,
        }
    )


def kind_of(table: Mapping[str, Any]) -> str | None:
    """Name the model_type of a config; one that only says it is of transformers is a Llama."""
    kind = table.get("model_type")
    if kind is None and any(word in table for word in ("architectures", "transformers_version")):
        kind = "llama"
    return kind if isinstance(kind, str) else None


def unlike(table: Mapping[str, Any], kind: str | None) -> list[str]:
    """List the settings of a config that this model does not compute, in words."""
    problems = [
        f"{key}={shown(table[key])}"
        for key, computed in _FIXED.items()
        if table.get(key) is not None and table[key] not in computed
    ]
    layers = table.get("layer_types")
    if layers is not None and layers not in _plain_layers(layers):
        problems.append(f"layer_types={shown(layers)}")
    problems += _unlike_window(table, kind)
    if kind == "granitemoeshared":
        problems += _unlike_granite(table)
    if kind == "minimind" and table.get("rope_scaling"):
        problems.append("rotary positions scaled as MiniMind does (rope_scaling)")
    return problems


def _plain_layers(layers: Any) -> list[Any]:
    return [["full_attention"] * len(layers)] if isinstance(layers, list) else []


def _unlike_window(table: Mapping[str, Any], kind: str | None) -> list[str]:
    """Find a window shorter than the context; what a config leaves out counts too."""
    known = ARCHITECTURES[kind].defaults if kind in ARCHITECTURES else {}
    words = {key: known[key] for key in ("sliding_window", "use_sliding_window") if key in known}
    longest = table.get("max_position_embeddings") or known.get("max_position_embeddings", 0)
    words |= {key: table[key] for key in ("sliding_window", "use_sliding_window") if key in table}
    window = words.get("sliding_window")
    if window is None or window >= longest or words.get("use_sliding_window") is False:
        return []
    return [f"sliding_window={window}"]


def _unlike_granite(table: Mapping[str, Any]) -> list[str]:
    """Find what a Granite with shared experts multiplies, and a width that is no multiple."""
    known, problems = ARCHITECTURES["granitemoeshared"].defaults, []
    heads = table.get("num_attention_heads") or known["num_attention_heads"]
    head_dim = table.get("head_dim") or (table.get("hidden_size") or 4096) // heads
    factor = _or_default(table, "attention_multiplier", known)
    if head_dim > 0 and not math.isclose(factor, head_dim**-0.5, rel_tol=_NEARLY):
        problems.append(f"attention_multiplier={factor} with head_dim={head_dim}")
    inner, shared = table.get("intermediate_size"), table.get("shared_intermediate_size")
    if inner and shared and shared % inner:
        problems.append(f"shared_intermediate_size={shared}, no multiple of {inner}")
    return problems


def family_settings(table: Mapping[str, Any], kind: str | None) -> dict[str, Any]:
    """Say under our names what a config says of norms, experts and how they are balanced."""
    known = ARCHITECTURES.get(kind or "")
    count = next((table[word] for word in COUNTS if table.get(word) is not None), None)
    if known is None:
        return _settings_of_others(table, count)
    found: dict[str, Any] = {"qk_norm": known.qk_norm}
    if not known.experts:
        return found | {"num_experts": 0}
    # The number of experts is told by the weights where nothing says it.
    found |= {} if count is None else {"num_experts": count}
    found["num_experts_per_tok"] = _or_default(table, "num_experts_per_tok", known.defaults)
    found["norm_topk_prob"] = (
        _or_default(table, "norm_topk_prob", known.defaults) if kind == "qwen3_moe" else True
    )
    inner = "moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"
    if table.get(inner) is not None:
        found["moe_intermediate_size"] = table[inner]
    if kind != "granitemoeshared":
        return found | {"num_shared_experts": 0}
    if table.get(inner) and table.get("shared_intermediate_size") is not None:
        found["num_shared_experts"] = table["shared_intermediate_size"] // table[inner]
    return found


def _settings_of_others(table: Mapping[str, Any], count: Any) -> dict[str, Any]:
    """Read MiniMind's words, of both its generations, and our own."""
    if table.get("use_moe") is False:
        return {"num_experts": 0}
    words = {"num_shared_experts": ("n_shared_experts", "num_shared_experts")}
    words |= {
        name: (name,) for name in ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
    }
    found: dict[str, Any] = {} if count is None else {"num_experts": count}
    for ours, theirs in words.items():
        values = [table[word] for word in theirs if table.get(word) is not None]
        found |= {ours: values[0]} if values else {}
    # The first generation leaves the probability of a single chosen expert as it is.
    if table.get("n_routed_experts") is not None and found.get("num_experts_per_tok") == 1:
        found["norm_topk_prob"] = False
    if table.get("aux_loss_alpha") is not None:
        found["router_aux_loss_coef"] = table["aux_loss_alpha"]
    if table.get("seq_aux") is not None:
        found["router_aux_loss_level"] = "sequence" if table["seq_aux"] else "batch"
    return found


def _or_default(table: Mapping[str, Any], key: str, defaults: Mapping[str, Any]) -> Any:
    return defaults[key] if table.get(key) is None else table[key]
