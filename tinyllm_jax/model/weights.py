"""Weights as one flat dictionary from dotted names to arrays, the form everything else uses."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from tinyllm_jax.config import ModelConfig
from tinyllm_jax.model.transformer import Transformer

Weights = dict[str, jax.Array]
# Rows of the vocabulary, as tokens along the first axis or along the last, and what scores a position.
EMBEDDING, HEAD, SCORES = "embed_tokens.weight", "lm_head.kernel", "score.kernel"


def split_weights(model: Transformer) -> tuple[nnx.GraphDef, Weights]:
    """Take a model apart into its structure and its weights by name."""
    structure, state = nnx.split(model, nnx.Param)
    flat = {
        ".".join(str(part) for part in path): param[...] for path, param in nnx.to_flat_state(state)
    }
    return structure, flat


def merge_weights(structure: nnx.GraphDef, weights: Mapping[str, Any]) -> Transformer:
    """Put a model together again; names and structure must come from the same config."""
    paths: Any = {
        tuple(int(part) if part.isdigit() else part for part in name.split(".")): nnx.Param(value)
        for name, value in weights.items()
    }
    return nnx.merge(structure, nnx.from_flat_state(paths))


def model_structure(config: ModelConfig) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
    """Give structure, names, shapes and types of a model without computing a weight."""
    structure, shapes = _structure(config, bool(jax.config.read("jax_enable_x64")))
    return structure, dict(shapes)


@functools.cache
def _structure(config: ModelConfig, x64: bool) -> tuple[nnx.GraphDef, dict[str, Any]]:
    # All that work with a model ask for it, and it takes 0.1 s with 6 layers, 0.4 s with 18.
    del x64  # without it JAX makes float32 of what is to be float64
    structures = []

    def build() -> Any:
        structure, weights = split_weights(Transformer(config, rngs=nnx.Rngs(params=0)))
        structures.append(structure)
        return weights

    shapes = jax.eval_shape(build)
    return structures[0], shapes


def initial_weights(config: ModelConfig, *, seed: int) -> Weights:
    """Draw the initial weights one after another, or inside a program of the caller's.

    A program of all would compile for half a minute with 20 layers, where those of their few shapes
    take a second or two.
    """
    return split_weights(Transformer(config, rngs=nnx.Rngs(params=jax.random.key(seed))))[1]


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """Count all parameters, and those outside the embedding table (the head counts if untied)."""
    hidden, per_mlp = config.hidden_size, 3 * config.hidden_size
    query = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = hidden * (2 * query + 2 * kv) + 2 * hidden + 2 * config.head_dim * config.qk_norm
    if config.num_experts > 0:
        experts = config.num_experts + config.num_shared_experts
        layer += experts * per_mlp * config.moe_intermediate_size + hidden * config.num_experts
    else:
        layer += per_mlp * config.intermediate_size
    embedding = config.vocab_size * hidden
    head = 0 if config.tie_word_embeddings else embedding
    outside = config.num_hidden_layers * layer + hidden + head + hidden * config.score_head
    return outside + embedding, outside


def count_active_parameters(config: ModelConfig) -> int:
    """Count the parameters that one token passes: all but the experts that were not chosen."""
    idle = max(config.num_experts - config.num_experts_per_tok, 0)
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    return count_parameters(config)[0] - config.num_hidden_layers * idle * expert


def describe_size(config: ModelConfig) -> str:
    """Say for people how many parameters a model has, and how many of them one token passes."""
    total, outside = count_parameters(config)
    active = count_active_parameters(config)
    idle = f", {active:,} active for each token" if active < total else ""
    return f"{total:,} parameters, {outside:,} without the embedding{idle}"


def flops_per_token(config: ModelConfig, *, sequence_length: int) -> float:
    """Count floating-point operations of training on one token: 6 N + 6 L Q S.

    N is every parameter that multiplies a token (norms and idle experts left out, embedding look-up
    left out, head counted whether tied or not): 2 operations forward, 4 backward. Attention adds, in each of L layers of
    query width Q, 2 x 2 x Q x S forward for scores and mixing over S keys, three times that with
    the backward pass, and half of it since a causal query sees S / 2 keys on average.

    Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1; Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B.
    """
    layers, table = config.num_hidden_layers, config.vocab_size * config.hidden_size
    norms = (2 * layers + 1) * config.hidden_size + 2 * layers * config.head_dim * config.qk_norm
    look_up = 0 if config.tie_word_embeddings else table
    multiplying = count_active_parameters(config) - norms - look_up
    query = config.num_attention_heads * config.head_dim
    return 6.0 * multiplying + 6.0 * config.num_hidden_layers * query * sequence_length
