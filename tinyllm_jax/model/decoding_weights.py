"""Weights as a CPU makes the next token of few rows fastest, in float32; others are taken as they are."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinyllm_jax.config import ModelConfig
from tinyllm_jax.model.layers import compute_dtype
from tinyllm_jax.model.transformer import Transformer
from tinyllm_jax.model.weights import EMBEDDING, HEAD, merge_weights, model_structure

# So many rows and more are multiplied faster with the table of a tied model than with the copy.
ROWS_OF_TABLE = 8


class Turned(NamedTuple):
    """A kernel [in, out] that lies as its transpose."""

    table: Float[Array, "out in"]


def add_head(config: ModelConfig, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Add the head of a tied model as a matrix [hidden, vocab], which multiplies few rows faster.

    It takes as much memory as the table. `weights` are those of `tinyllm_jax.model.weights`.
    """
    if not (_gains(config) and config.tie_word_embeddings):
        return dict(weights)
    return {**weights, HEAD: weights[EMBEDDING].T}


def suit_rows(config: ModelConfig, weights: Mapping[str, Any], *, rows: int) -> dict[str, Any]:
    """Give weights for the next tokens of `rows` rows; within a program, before its loop over tokens.

    For few rows the head of a tied model is added. For one row the matrices of the blocks are turned,
    too: XLA divides the product of one row among cores where a transposed matrix stands on the right.
    What is turned is held twice.
    """
    if not _gains(config) or rows >= ROWS_OF_TABLE:
        return dict(weights)
    found = add_head(config, weights)
    for name, value in weights.items():
        if rows == 1 and name.endswith("_proj.kernel") and value.ndim == 2:
            # Without the barrier XLA turns it back within the loop.
            found[name] = Turned(jax.lax.optimization_barrier(value.T))
    return found


def decoding_model(config: ModelConfig, weights: Mapping[str, Any], *, rows: int) -> Transformer:
    """Put a model together from weights in any of these forms; within the loop over tokens, if there is one.

    Args:
        rows: How many go through the head.
    """
    found = {
        name: value.table.T if isinstance(value, Turned) else value
        for name, value in weights.items()
    }
    if config.tie_word_embeddings and HEAD in found:
        if rows < ROWS_OF_TABLE:
            config = replace(config, tie_word_embeddings=False)
        else:
            del found[HEAD]
    return merge_weights(model_structure(config)[0], found)


def _gains(config: ModelConfig) -> bool:
    return jax.default_backend() == "cpu" and compute_dtype(config) == jnp.float32
