"""Causal attention of one row after another, with a backward pass of its own: the fastest way on a CPU.

What one row needs stays in a core's cache. Letters: p position, h query head, n key/value head, r the
positions of a block for each of the query heads that share a key/value head, k key, d head width.

Source: the backward pass is that of Dao et al. 2022, arXiv:2205.14135, algorithm 4, with blocks of
queries alone.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Bool, Float

from tinyllm_jax.model.placement import placement


class _Softmax(NamedTuple):
    """What the weights of a block are made of again: the largest score and the sum of exponentials."""

    largest: Float[Array, "n r 1"]
    total: Float[Array, "n r 1"]


def goes_row_by_row(query: Array) -> bool:
    """Tell whether a loop over rows is faster: on a CPU whose program holds whole arrays.

    A grid of devices divides the rows, which a loop over them would gather.
    """
    return jax.default_backend() == "cpu" and placement().whole_rows and len(query) > 1


def block_size(queries: int) -> int:
    """Give the causal queries of one block: 64, and more where these would be over eight blocks.

    64 was the fastest of 32 to 256 for rows of 256 and 512 on two CPU cores.
    """
    return 64 * max(1, math.ceil(queries / 512))


def head_product(equation: str, left: Array, right: Array) -> Array:
    """Multiply the matrices of each head, in float32 at least (float64 stays float64)."""
    wide = jnp.promote_types(left.dtype, jnp.float32)
    return jnp.einsum(
        equation, left, right, precision=Precision.HIGHEST, preferred_element_type=wide
    )


def visible_keys(
    mask: Bool[Array, "batch query key"] | None, *, start: int, end: int, keys: int
) -> Bool[Array, "rows block keys"]:
    """Tell which of the first keys the queries from `start` to `end` may see.

    Args:
        mask: Of all queries and keys; None is keys 0 to i for query i, said once for all rows.
    """
    if mask is None:
        return (jnp.arange(start, end)[:, None] >= jnp.arange(keys)[None, :])[None]
    return mask[:, start:end, :keys]


@jax.custom_vjp
def attend_row_by_row(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads head_dim"],
    mask: Bool[Array, "batch seq seq"] | None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Do the causal `reference_attention` of one row after another.

    The backward pass makes the weights again and keeps two numbers for each query and head. Forward and
    backward of 16 rows of 256, 6 heads of 48, took 57 ms on one core, where JAX's own gradient of
    the same loop took 71 and straight code that keeps the weights 73.

    Args:
        mask: True where a query may look, which is nowhere beyond its own position and somewhere (as
            `segment_mask` has it); None is all of that.
    """
    return _attend(query, key, value, mask)[0]


def _attend(query: Array, key: Array, value: Array, mask: Array | None) -> tuple[Array, Any]:
    mixed, softmax = jax.lax.map(lambda row: _mix_row(*row), (query, key, value, mask))
    return mixed, (query, key, value, mask, mixed, softmax)


def _gradients(kept: Any, change: Array) -> tuple[Array, Array, Array, None]:
    query, key, value = jax.lax.map(lambda row: _change_row(*row), (*kept, change))
    return query, key, value, None


attend_row_by_row.defvjp(_attend, _gradients)


def _mix_row(
    query: Float[Array, "p h d"],
    key: Float[Array, "p n d"],
    value: Float[Array, "p n d"],
    mask: Bool[Array, "p p"] | None,
) -> tuple[Float[Array, "p h d"], list[_Softmax]]:
    """Attend within one row, block by block of its queries."""
    length, kv_heads = key.shape[:2]
    # Heads before positions: XLA's CPU backend multiplies that layout up to five times faster.
    key, value = key.transpose(1, 0, 2), value.transpose(1, 0, 2)
    mixed, softmax = [], []
    for start, end in _blocks(length):
        scores = _scores(_by_key_head(query[start:end], kv_heads), key, mask, start, end)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        # The softmax divides here, after the product: fewer numbers.
        block = head_product("nrk,nkd->nrd", weights.astype(value.dtype), value[:, :end]) / total
        mixed.append(_by_position(block, end - start).astype(value.dtype))
        softmax.append(_Softmax(largest, total))
    return jnp.concatenate(mixed), softmax


def _change_row(
    query: Float[Array, "p h d"],
    key: Float[Array, "p n d"],
    value: Float[Array, "p n d"],
    mask: Bool[Array, "p p"] | None,
    mixed: Float[Array, "p h d"],
    softmax: list[_Softmax],
    change: Float[Array, "p h d"],
) -> tuple[Float[Array, "p h d"], Float[Array, "p n d"], Float[Array, "p n d"]]:
    """Give the gradients of one row's queries, keys and values from that of what was mixed."""
    (length, kv_heads), dtype = key.shape[:2], query.dtype
    wide = softmax[0].total.dtype
    # What the softmax takes from each gradient of a weight: their sum by weight, which is this.
    common = jnp.sum(mixed.astype(wide) * change.astype(wide), axis=-1, keepdims=True)
    key, value = key.transpose(1, 0, 2), value.transpose(1, 0, 2)
    query_change = []
    key_change, value_change = jnp.zeros(key.shape, wide), jnp.zeros(value.shape, wide)
    for (largest, total), (start, end) in zip(softmax, _blocks(length), strict=True):
        rows, rows_change, rows_common = (
            _by_key_head(each[start:end], kv_heads) for each in (query, change, common)
        )
        weights = jnp.exp(_scores(rows, key, mask, start, end) - largest) / total
        weights_change = head_product("nrd,nkd->nrk", rows_change, value[:, :end])
        scores_change = weights * (weights_change - rows_common) * query.shape[-1] ** -0.5
        scores_change = scores_change.astype(dtype)
        block = head_product("nrk,nkd->nrd", scores_change, key[:, :end])
        query_change.append(_by_position(block, end - start).astype(dtype))
        key_change = key_change.at[:, :end].add(head_product("nrk,nrd->nkd", scores_change, rows))
        value_change = value_change.at[:, :end].add(
            head_product("nrk,nrd->nkd", weights.astype(dtype), rows_change)
        )
    query_ = jnp.concatenate(query_change)
    key_, value_ = (x.transpose(1, 0, 2).astype(dtype) for x in (key_change, value_change))
    return query_, key_, value_


def _blocks(length: int) -> list[tuple[int, int]]:
    """List where the blocks of a row's queries begin and end."""
    size = block_size(length)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _by_key_head(x: Float[Array, "p h d"], kv_heads: int) -> Float[Array, "n r d"]:
    """Make the query heads that share a key head rows of one product."""
    return x.transpose(1, 0, 2).reshape(kv_heads, -1, x.shape[-1])


def _by_position(x: Float[Array, "n r d"], length: int) -> Float[Array, "p h d"]:
    """Undo `_by_key_head`."""
    return x.reshape(-1, length, x.shape[-1]).transpose(1, 0, 2)


def _scores(
    rows: Float[Array, "n r d"],
    key: Float[Array, "n p d"],
    mask: Bool[Array, "p p"] | None,
    start: int,
    end: int,
) -> Float[Array, "n r k"]:
    """Match a block of queries with all keys up to its end."""
    mask = None if mask is None else mask[None]
    visible = visible_keys(mask, start=start, end=end, keys=end)
    scores = head_product("nrd,nkd->nrk", rows, key[:, :end]) * rows.shape[-1] ** -0.5
    visible = jnp.tile(visible, (1, rows.shape[1] // (end - start), 1))
    return jnp.where(visible, scores, jnp.finfo(scores.dtype).min)
