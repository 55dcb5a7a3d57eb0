"""Rotary positions in the half-split layout of Hugging Face, and their stretching to long contexts.

Source: Su et al. 2021, arXiv:2104.09864, equation 34; layout: transformers,
models/llama/modeling_llama.py, `rotate_half`. llama2.c and Meta interleave the pairs instead,
which differs by a permutation of the rows of the query and key projections.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jaxtyping import Array, Float, Int

from tinyllm_jax.config import ModelConfig


def rope_frequencies(config: ModelConfig) -> Float[np.ndarray, "half"]:
    """Give the angle, in radians, by which one position turns each pair of a head (float64).

    A frequency that turns often within the original context tells near positions apart and stays;
    one that does not turn once would meet angles never seen and is divided by `rope_factor`.
    `llama3` blends the two over frequencies, `yarn` over the pairs' numbers.

    Source: linear: Chen et al. 2023, arXiv:2306.15595, equation 4; yarn: Peng et al. 2023,
    arXiv:2309.00071, section 3.2; llama3 and the rounding of yarn's bounds: transformers,
    modeling_rope_utils.py.
    """
    half = config.head_dim // 2
    kept = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    if config.rope_type == "default":
        return kept
    divided = kept / config.rope_factor
    if config.rope_type == "linear":
        return divided
    turns = config.rope_original_max_position_embeddings * kept / (2 * math.pi)
    if config.rope_type == "llama3":
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        share_kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    else:
        low, high = (
            half * math.log(turns[0] / bound) / math.log(config.rope_theta)
            for bound in (config.rope_beta_fast, config.rope_beta_slow)
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), config.head_dim - 1)
        pairs = np.arange(half, dtype=np.float64)
        share_kept = 1.0 - np.clip((pairs - low) / ((high - low) or 0.001), 0.0, 1.0)
    return share_kept * kept + (1.0 - share_kept) * divided


def rope_attention_factor(config: ModelConfig) -> float:
    """Give what queries and keys are both multiplied by, which sharpens attention in long contexts.

    Source: Peng et al. 2023, arXiv:2309.00071, equation 22.
    """
    if config.rope_type != "yarn":
        return 1.0
    return config.rope_attention_factor or 0.1 * math.log(config.rope_factor) + 1.0


def rope_tables(
    positions: Int[Array, "batch seq"], config: ModelConfig, *, dtype: jnp.dtype
) -> tuple[Float[Array, "batch seq 1 half"], Float[Array, "batch seq 1 half"]]:
    """Compute cosine and sine of every angle, at least in float32 whatever the model computes in.

    bfloat16 cannot tell position 256 from 257, so the tables never go below float32.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    frequencies = jnp.asarray(rope_frequencies(config), wide)
    angles = positions[:, :, None, None].astype(wide) * frequencies[None, None, None, :]
    factor = rope_attention_factor(config)
    cosine, sine = factor * jnp.cos(angles), factor * jnp.sin(angles)
    if jax.default_backend() == "cpu":
        # XLA's CPU backend would make the tables anew wherever something is turned, which took three
        # quarters of the time of turning. It fuses nothing into a product; one with 1 changes nothing.
        one = jnp.eye(cosine.shape[-1], dtype=wide)
        cosine, sine = (
            jnp.matmul(table, one, precision=Precision.HIGHEST) for table in (cosine, sine)
        )
    return cosine, sine


def rotate(
    x: Float[Array, "batch seq heads head_dim"],
    cosine: Float[Array, "batch seq 1 half"],
    sine: Float[Array, "batch seq 1 half"],
) -> Float[Array, "batch seq heads head_dim"]:
    """Turn pair (i, i + head_dim / 2) of every head by its angle, in the precision of the tables."""
    first, second = jnp.split(x.astype(cosine.dtype), 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
