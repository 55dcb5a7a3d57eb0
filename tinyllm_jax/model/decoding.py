"""Faster ways of a CPU to compute the next token of few rows; they differ from the usual in rounding.

Letters: b batch, q query position, k slot, n key/value head, d head width (as in `attention`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tinyllm_jax.model.attention import choose_implementation
from tinyllm_jax.model.attention_rows import head_product
from tinyllm_jax.model.layers import matmul_precision

# Up to so many rows a table times the rows was measured to be faster than the other way around.
FEW_ROWS = 256
# Slots of a cache that are read together.
CACHE_BLOCK = 64


def times_table(
    rows: Float[Array, "rows in"], table: Float[Array, "out in"]
) -> Float[Array, "rows out"]:
    """Multiply rows with each row of a table, summing in float32 (float64 stays float64).

    XLA's CPU backend takes up to three times as long for few rows with the table on the right; the
    barriers keep it from turning the product back. One row it divides among all cores, but only with the
    table on the right.
    """
    arguments: Any = {
        "precision": matmul_precision(rows.dtype),
        "preferred_element_type": jnp.promote_types(rows.dtype, jnp.float32),
    }
    if jax.default_backend() == "cpu" and 1 < len(rows) <= FEW_ROWS:
        turned = jnp.matmul(table, jax.lax.optimization_barrier(rows.T), **arguments)
        return jax.lax.optimization_barrier(turned).T
    # The transpose stands by itself, not in the product's own axes: only so XLA divides it.
    return jnp.matmul(rows, table.T, **arguments)


def reads_in_blocks(query: Array, *, implementation: str) -> bool:
    """Tell whether `cached_attention` is faster: for one token of one row, on a CPU.

    Blocks of more rows are no longer copied within a core's own cache, which costs what they save.
    """
    chosen = choose_implementation(implementation, query.dtype, dropout_rate=0.0)
    return chosen == "reference" and jax.default_backend() == "cpu" and query.shape[:2] == (1, 1)


def cached_attention(
    query: Float[Array, "batch query heads head_dim"],
    keys: Float[Array, "batch kv_heads slots head_dim"],
    values: Float[Array, "batch kv_heads slots head_dim"],
    positions: Int[Array, "batch query"],
) -> Float[Array, "batch query heads head_dim"]:
    """Attend to the slots up to each query's position, and read no more than the furthest one needs.

    The slots come in blocks, as many as the furthest query looks at, with a running maximum and sum. A
    block of which a query sees nothing changes none of its bits, so the other rows make no difference,
    and the size of the cache at most one of rounding, in a last block that is not full.

    Args:
        positions: A query beyond the last slot belongs to nobody, and nobody waits for what it needs.

    Source: the running softmax: Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3.
    """
    batch, queries, heads, head_dim = query.shape
    kv_heads, slots = keys.shape[1:3]
    wide, size = jnp.promote_types(query.dtype, jnp.float32), min(CACHE_BLOCK, slots)
    # The queries that share a key head are rows of one product.
    rows = query.transpose(0, 2, 1, 3).reshape(batch, kv_heads, -1, head_dim)
    seen_up_to = jnp.tile(positions, (1, heads // kv_heads))[:, None, :, None]
    furthest = jnp.max(jnp.where(positions < slots, positions, 0))

    def read_block(block: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        largest, total, mixed = sums
        start = jnp.minimum(block * size, slots - size)
        key = jax.lax.dynamic_slice_in_dim(keys, start, size, axis=2)
        value = jax.lax.dynamic_slice_in_dim(values, start, size, axis=2)
        # The last block of a cache that is no multiple of blocks begins in the one before.
        slot = (start + jnp.arange(size))[None, None, None]
        visible = (slot >= block * size) & (slot <= seen_up_to)
        scores = head_product("bnqd,bnkd->bnqk", rows, key) * head_dim**-0.5
        scores = jnp.where(visible, scores, jnp.finfo(wide).min)
        new = jnp.maximum(largest, scores.max(axis=-1, keepdims=True))
        kept, weights = jnp.exp(largest - new), jnp.where(visible, jnp.exp(scores - new), 0.0)
        total = total * kept + weights.sum(axis=-1, keepdims=True)
        mixed = mixed * kept + head_product("bnqk,bnkd->bnqd", weights.astype(value.dtype), value)
        return new, total, mixed

    one = jnp.zeros((batch, kv_heads, rows.shape[2], 1), wide)
    sums = (one + jnp.finfo(wide).min, one, jnp.zeros(rows.shape, wide))
    _, total, mixed = jax.lax.fori_loop(0, furthest // size + 1, read_block, sums)
    mixed = (mixed / total).astype(values.dtype)
    return mixed.reshape(batch, heads, queries, head_dim).transpose(0, 2, 1, 3)
