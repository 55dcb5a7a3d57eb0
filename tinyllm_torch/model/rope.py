"""Rotary positions in the half-split layout of Hugging Face.

Source: Su et al. 2021, arXiv:2104.09864, equation 34; layout: transformers,
models/llama/modeling_llama.py, `rotate_half`. llama2.c and Meta interleave the pairs instead,
which differs by a permutation of the rows of the query and key projections.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def rope_frequencies(*, head_dim: int, theta: float) -> Float[np.ndarray, "half"]:
    """Give the angle, in radians, by which one position turns each pair of a head (float64)."""
    return theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def rope_tables(
    positions: Int[Tensor, "batch seq"], *, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "batch seq 1 half"], Float[Tensor, "batch seq 1 half"]]:
    """Compute cosine and sine of every angle, at least in float32 whatever the model computes in.

    bfloat16 cannot tell position 256 from 257, so the tables never go below float32.
    """
    wide = torch.promote_types(dtype, torch.float32)
    frequencies = torch.from_numpy(rope_frequencies(head_dim=head_dim, theta=theta))
    frequencies = frequencies.to(positions.device, wide)
    angles = positions[:, :, None, None].to(wide) * frequencies[None, None, None, :]
    return torch.cos(angles), torch.sin(angles)


def rotate(
    x: Float[Tensor, "batch seq heads head_dim"],
    cosine: Float[Tensor, "batch seq 1 half"],
    sine: Float[Tensor, "batch seq 1 half"],
) -> Float[Tensor, "batch seq heads head_dim"]:
    """Turn pair (i, i + head_dim / 2) of every head by its angle, in the precision of the tables."""
    first, second = torch.chunk(x.to(cosine.dtype), 2, dim=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return torch.cat(turned, dim=-1).to(x.dtype)
