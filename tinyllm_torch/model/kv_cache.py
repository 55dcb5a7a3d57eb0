"""Keys and values of the tokens already read, one slot for each position of the context."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tinyllm_jax.config import ModelConfig


class LayerCache(NamedTuple):
    """Cache of one block. Slot t holds position t, so a row's garbage past its end is harmless:
    each position is written before any query may see it."""

    keys: Float[Tensor, "batch slots kv_heads head_dim"]
    values: Float[Tensor, "batch slots kv_heads head_dim"]


def empty_cache(
    config: ModelConfig, *, batch: int, slots: int, dtype: torch.dtype, device: torch.device
) -> tuple[LayerCache, ...]:
    """Make the caches of all blocks, zero-filled, for `batch` rows of up to `slots` positions."""
    shape = (batch, slots, config.num_key_value_heads, config.head_dim)
    return tuple(
        LayerCache(
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
        )
        for _ in range(config.num_hidden_layers)
    )


def write(
    cache: LayerCache,
    keys: Float[Tensor, "batch seq kv_heads head_dim"],
    values: Float[Tensor, "batch seq kv_heads head_dim"],
    positions: Int[Tensor, "batch seq"],
) -> LayerCache:
    """Store new keys and values in the slots of their positions; the cache given is changed."""
    rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
    cache.keys[rows, positions] = keys
    cache.values[rows, positions] = values
    return cache


def visible_slots(
    positions: Int[Tensor, "batch seq"], *, slots: int
) -> Bool[Tensor, "batch seq slots"]:
    """Let a query at position p see slots 0 to p."""
    every_slot = torch.arange(slots, device=positions.device)
    return every_slot[None, None, :] <= positions[:, :, None]
