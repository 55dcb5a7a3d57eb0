"""Random weights that tests can see through, and transformers' Llama with the same ones.

Standard deviation 0.1 and an odd theta and eps: with the usual 0.02 and 10,000 a wrong rotary base
or a missing eps hides in the last digits.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np

from tinyllm_jax.config import ModelConfig
from tinyllm_jax.model.weights import model_structure

SMALL = ModelConfig(
    vocab_size=67,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rope_theta=12345.6,
    rms_norm_eps=3e-3,
    compute_dtype="float32",
)


def changed(config: ModelConfig, **fields: Any) -> ModelConfig:
    """Change fields; head_dim is derived again unless it is given."""
    return dataclasses.replace(config, **{"head_dim": 0, **fields})


def random_weights(
    config: ModelConfig, *, seed: int = 0, std: float = 0.1
) -> dict[str, np.ndarray]:
    """Draw every weight with this standard deviation, norms around 1."""
    rng = np.random.default_rng(seed)
    with jax.enable_x64(config.compute_dtype == "float64"):
        shapes = model_structure(config)[1]
    dtype = np.float64 if config.compute_dtype == "float64" else np.float32
    weights = {}
    for name, shape in shapes.items():
        noise = std * rng.standard_normal(shape.shape)
        weights[name] = (noise + ("norm" in name)).astype(dtype)
    return weights


def torch_name(name: str) -> str:
    """Give a weight's name in a Hugging Face state dict."""
    name = name.removesuffix("kernel") + "weight" if name.endswith("kernel") else name
    return name if name.startswith(("lm_head", "score")) else f"model.{name}"


@contextlib.contextmanager
def torch_in_float64() -> Iterator[None]:
    """Let transformers compute in float64 where it says float32: norms, angles, softmax and loss.

    Nothing but the rounding changes; without this its own rounding limits a comparison to 1e-7.
    """
    import torch

    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch, "float", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def rope_parameters(config: ModelConfig) -> dict[str, Any]:
    """Say a model's rotary settings in transformers' words."""
    words = {"rope_type": config.rope_type, "rope_theta": config.rope_theta}
    if config.rope_type != "default":
        words["factor"] = config.rope_factor
    if config.rope_type in ("llama3", "yarn"):
        original = config.rope_original_max_position_embeddings
        words["original_max_position_embeddings"] = original
    if config.rope_type == "llama3":
        words["low_freq_factor"] = config.rope_low_freq_factor
        words["high_freq_factor"] = config.rope_high_freq_factor
    if config.rope_type == "yarn":
        words["beta_fast"], words["beta_slow"] = config.rope_beta_fast, config.rope_beta_slow
        words["attention_factor"] = config.rope_attention_factor or None
    return words


def transformers_rope(config: ModelConfig) -> tuple[Any, float]:
    """Let transformers compute the frequencies and the attention factor."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = LlamaConfig(
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=rope_parameters(config),
    )
    return ROPE_INIT_FUNCTIONS[config.rope_type](theirs, device="cpu")


def transformers_llama(config: ModelConfig, weights: dict[str, np.ndarray]) -> Any:
    """Build transformers' Llama of this config with these weights, in evaluation mode."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=rope_parameters(config),
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
            attn_implementation="eager",
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
    )
    llama = llama.to(torch.float64 if config.compute_dtype == "float64" else torch.float32).eval()
    state = {
        torch_name(name): torch.from_numpy(
            np.ascontiguousarray(value.T if name.endswith("kernel") else value)
        )
        for name, value in weights.items()
    }
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    llama.load_state_dict(state)
    return llama
