"""Scaled dot-product attention for grouped heads, in three interchangeable implementations.

Letters: b batch, q query position, k key position, h query head, n key/value head, g query heads
that share one key/value head (h = n g), d head width.

Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1; grouped heads: Ainslie et al. 2023,
arXiv:2305.13245.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tinyllm_jax.errors import InputError
from tinyllm_jax.model.attention_rows import (
    attend_row_by_row,
    block_size,
    goes_row_by_row,
    head_product,
    visible_keys,
)
from tinyllm_jax.model.dropout import dropout


def choose_implementation(implementation: str, dtype: jnp.dtype, *, dropout_rate: float) -> str:
    """Turn `auto` into the fastest implementation that keeps the precision of `dtype`.

    cuDNN and XLA's own kernel work in float32 at most and have no dropout on the weights, so
    float64 and attention dropout take the reference; so does float32, where a GPU's or TPU's
    default would multiply in fewer bits.

    Raises:
        InputError: cudnn is asked for by name where there is no GPU.
    """
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        raise InputError(
            f"model.attention=cudnn needs a GPU, and JAX runs on {jax.default_backend()} here. Use "
            "model.attention=auto."
        )
    if implementation != "auto":
        return implementation
    if dtype != jnp.bfloat16 or dropout_rate > 0:
        return "reference"
    return "cudnn" if jax.default_backend() == "gpu" else "xla"


def attention(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch key kv_heads head_dim"],
    value: Float[Array, "batch key kv_heads head_dim"],
    *,
    mask: Bool[Array, "batch query key"] | None,
    causal: bool,
    implementation: str,
    dropout_rate: float,
    dropout_key: PRNGKeyArray | None,
) -> Float[Array, "batch query heads head_dim"]:
    """Mix values by how well queries match keys.

    Args:
        mask: True where a query may look. None is keys 0 to i for query i, and needs `causal`.
        causal: Query i and key i are the same position, and the mask, too, lets no query look beyond
            its own.
        implementation: auto, xla, cudnn (GPU, bfloat16) or reference.
        dropout_rate: Share of attention weights set to zero; only the reference can.
        dropout_key: None leaves dropout off.
    """
    assert causal or mask is not None
    rate = dropout_rate if dropout_key is not None else 0.0
    chosen = choose_implementation(implementation, query.dtype, dropout_rate=rate)
    if chosen == "reference":
        if causal and rate == 0.0 and goes_row_by_row(query):
            return attend_row_by_row(query, key, value, mask)
        return reference_attention(
            query, key, value, mask=mask, causal=causal, dropout_rate=rate, dropout_key=dropout_key
        )
    if chosen == "cudnn" and not suits_cudnn(query, key, masked=mask is not None):
        if implementation == "cudnn" and query.shape[1] > 1:
            raise InputError(
                f"model.attention=cudnn takes heads of 8, 16, ... 128 and, with a mask, even "
                f"lengths; head_dim is {query.shape[3]}, lengths are {query.shape[1]} and "
                f"{key.shape[1]}. Use model.attention=auto."
            )
        chosen = "xla"
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=None if mask is None else mask[:, None],
        is_causal=mask is None,
        implementation="cudnn" if chosen == "cudnn" else "xla",
    )


def suits_cudnn(query: Array, key: Array, *, masked: bool) -> bool:
    """Tell whether cuDNN has a kernel for these shapes, and whether it could gain anything.

    Its limits are those of jax, cudnn/fused_attention_stablehlo.py, `check_is_flash_attention`. A
    flash kernel gains nothing where one query is decoded.
    """
    queries, head_dim = query.shape[1], query.shape[3]
    even = queries % 2 == 0 and key.shape[1] % 2 == 0
    return queries > 1 and head_dim % 8 == 0 and head_dim <= 128 and (even or not masked)


def reference_attention(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch key kv_heads head_dim"],
    value: Float[Array, "batch key kv_heads head_dim"],
    *,
    mask: Bool[Array, "batch query key"] | None,
    causal: bool,
    dropout_rate: float,
    dropout_key: PRNGKeyArray | None,
) -> Float[Array, "batch query heads head_dim"]:
    """Attend as the paper writes it, scores and softmax in float32 (float64 stays float64).

    Causal queries go in blocks, each with the keys up to its end, so that nearly half of the products
    are not made; the blocks are few, since each is compiled by itself.
    """
    batch, queries, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    # Heads before positions: XLA's CPU backend multiplies that layout up to five times faster.
    grouped = query.transpose(0, 2, 1, 3)
    grouped = grouped.reshape(batch, kv_heads, heads // kv_heads, queries, head_dim)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    size = block_size(queries) if causal else queries
    mixed = []
    for start in range(0, queries, size):
        end = min(start + size, queries)
        seen = end if causal else keys
        visible = visible_keys(mask, start=start, end=end, keys=seen)
        # The queries that share a key head are rows of one product.
        rows = grouped[:, :, :, start:end].reshape(batch, kv_heads, -1, head_dim)
        scores = head_product("bnqd,bnkd->bnqk", rows, key[:, :, :seen])
        scores = scores.reshape(batch, kv_heads, heads // kv_heads, end - start, seen)
        scores = jnp.where(
            visible[:, None, None], scores * head_dim**-0.5, jnp.finfo(scores.dtype).min
        )
        largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1).reshape(batch, heads, end - start, 1)
        own = None if dropout_key is None else jax.random.fold_in(dropout_key, start)
        weights = dropout(weights, rate=dropout_rate, key=own)
        weights = weights.astype(value.dtype).reshape(batch, kv_heads, -1, seen)
        block = head_product("bnqk,bnkd->bnqd", weights, value[:, :, :seen])
        # The softmax divides here, after the product, so that the sum in its gradient, too, is over the
        # width of a head and not over keys.
        block = block.reshape(batch, heads, end - start, head_dim) / total
        mixed.append(block.astype(value.dtype))
    return jnp.concatenate(mixed, axis=2).transpose(0, 2, 1, 3)


def segment_mask(segment_ids: Int[Array, "batch seq"]) -> Bool[Array, "batch seq seq"]:
    """Let each token see the earlier tokens of its own document only.

    Padding (segment 0) sees padding, so that no softmax is over an empty set; its outputs are
    never counted.
    """
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = jnp.tril(jnp.ones((segment_ids.shape[1],) * 2, dtype=bool))
    return same & causal[None]
