"""The permutation between the two layouts of rotary positions.

Half-split (Hugging Face, and everything inside this project) turns rows (i, i + head_dim / 2) of a
head together; interleaved (Meta, llama2.c, Tiny-K, GGUF) turns rows (2 i, 2 i + 1). The model is
the same when the rows of the query and key projections are permuted within every head, which under
grouped queries means every key head for the keys. A wrong permutation reads well for some twenty
tokens and then drifts.

Source: transformers, models/llama/convert_llama_weights_to_hf.py (`permute`); karpathy/llama2.c,
export.py (`permute_original`, `permute_reverse`).
"""

import re

import numpy as np

from tinyllm_jax.config import ModelConfig

HALF_SPLIT = "half-split"
INTERLEAVED = "interleaved"
_ROTATED = re.compile(r"\.self_attn\.[qk]_(proj|norm)\.weight$")


def to_interleaved(matrix: np.ndarray, *, head_dim: int) -> np.ndarray:
    """Reorder the rows [heads x head_dim, in] of a half-split projection, or the norm after it."""
    heads = matrix.shape[0] // head_dim
    pairs = matrix.reshape(heads, 2, head_dim // 2, *matrix.shape[1:])
    return pairs.swapaxes(1, 2).reshape(matrix.shape)


def to_half_split(matrix: np.ndarray, *, head_dim: int) -> np.ndarray:
    """Reorder the rows [heads x head_dim, in] of an interleaved projection."""
    heads = matrix.shape[0] // head_dim
    pairs = matrix.reshape(heads, head_dim // 2, 2, *matrix.shape[1:])
    return pairs.swapaxes(1, 2).reshape(matrix.shape)


def interleaved(name: str, matrix: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Give a weight, or its moment, as an interleaved format holds it."""
    return to_interleaved(matrix, head_dim=config.head_dim) if _ROTATED.search(name) else matrix


def half_split(name: str, matrix: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Give a weight, or its moment, of an interleaved format as a bundle holds it."""
    return to_half_split(matrix, head_dim=config.head_dim) if _ROTATED.search(name) else matrix
