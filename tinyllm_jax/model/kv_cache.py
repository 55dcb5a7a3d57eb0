"""Keys and values of the tokens already read, one slot for each position of the context."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tinyllm_jax.config import ModelConfig


class LayerCache(NamedTuple):
    """Cache of one block. Slot t holds position t, so a row's garbage past its end is harmless:
    each position is written before any query may see it."""

    # Heads before slots, as products of a CPU want them: attention would copy all at every token.
    keys: Float[Array, "batch kv_heads slots head_dim"]
    values: Float[Array, "batch kv_heads slots head_dim"]

    def slots(self) -> int:
        """Count the positions that there is room for."""
        return self.keys.shape[2]

    def by_slot(
        self,
    ) -> tuple[
        Float[Array, "batch slots kv_heads head_dim"], Float[Array, "batch slots kv_heads head_dim"]
    ]:
        """Give keys and values in the order of axes that `attention` takes."""
        return self.keys.transpose(0, 2, 1, 3), self.values.transpose(0, 2, 1, 3)


def empty_cache(
    config: ModelConfig, *, batch: int, slots: int, dtype: jnp.dtype
) -> tuple[LayerCache, ...]:
    """Make the caches of all blocks, zero-filled, for `batch` rows of up to `slots` positions."""
    shape = (batch, config.num_key_value_heads, slots, config.head_dim)
    return tuple(
        LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        for _ in range(config.num_hidden_layers)
    )


def write(
    cache: LayerCache,
    keys: Float[Array, "batch seq kv_heads head_dim"],
    values: Float[Array, "batch seq kv_heads head_dim"],
    positions: Int[Array, "batch seq"],
) -> LayerCache:
    """Store new keys and values in the slots of their positions; nowhere beyond the last slot.

    One token alone, whose position lies beyond it, is stored in the last slot, which no query has
    yet seen.
    """
    if positions.shape == (1, 1):
        # XLA's CPU backend copies the whole cache three times where it must ask whether to write.
        zero = jnp.zeros((), positions.dtype)
        start = (zero, zero, positions[0, 0], zero)
        return LayerCache(
            jax.lax.dynamic_update_slice(cache.keys, keys.transpose(0, 2, 1, 3), start),
            jax.lax.dynamic_update_slice(cache.values, values.transpose(0, 2, 1, 3), start),
        )
    rows = jnp.arange(keys.shape[0])[:, None]
    return LayerCache(
        cache.keys.at[rows, :, positions].set(keys), cache.values.at[rows, :, positions].set(values)
    )


def visible_slots(
    positions: Int[Array, "batch seq"], *, slots: int
) -> Bool[Array, "batch seq slots"]:
    """Let a query at position p see slots 0 to p."""
    return jnp.arange(slots)[None, None, :] <= positions[:, :, None]
