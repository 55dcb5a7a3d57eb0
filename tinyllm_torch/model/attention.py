"""Scaled dot-product attention for grouped heads, in two interchangeable implementations.

Letters: b batch, q query position, k key position, h query head, n key/value head, g query heads
that share one key/value head (h = n g), d head width.

Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1; grouped heads: Ainslie et al. 2023,
arXiv:2305.13245.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tinyllm_jax.errors import InputError
from tinyllm_torch.model.dropout import dropout


def choose_implementation(implementation: str, dtype: torch.dtype, *, dropout_rate: float) -> str:
    """Turn `auto` into the fastest implementation that keeps the precision of `dtype`.

    The settings have the names of JAX's kernels; `xla` and `cudnn` are torch's own
    `scaled_dot_product_attention` here, which picks a kernel by itself. Everything but bfloat16
    without dropout takes the reference, as in `tinyllm_jax`.

    Raises:
        InputError: cudnn is asked for by name where there is no GPU.
    """
    if implementation == "cudnn" and not torch.cuda.is_available():
        raise InputError(
            "model.attention=cudnn needs a GPU, and torch runs on cpu here. Use "
            "model.attention=auto."
        )
    if implementation != "auto":
        return implementation
    if dtype != torch.bfloat16 or dropout_rate > 0:
        return "reference"
    return "cudnn" if torch.cuda.is_available() else "xla"


def attention(
    query: Float[Tensor, "batch query heads head_dim"],
    key: Float[Tensor, "batch key kv_heads head_dim"],
    value: Float[Tensor, "batch key kv_heads head_dim"],
    *,
    mask: Bool[Tensor, "batch query key"] | None,
    causal: bool,
    implementation: str,
    dropout_rate: float,
    generator: torch.Generator | None,
) -> Float[Tensor, "batch query heads head_dim"]:
    """Mix values by how well queries match keys.

    Args:
        mask: True where a query may look. None is keys 0 to i for query i, and needs `causal`.
        causal: Query i and key i are the same position, and the mask, too, lets no query look beyond
            its own.
        implementation: auto, xla, cudnn (both are torch's own) or reference.
        dropout_rate: Share of attention weights set to zero; only the reference can.
        generator: None leaves dropout off.
    """
    assert causal or mask is not None
    rate = dropout_rate if generator is not None else 0.0
    chosen = choose_implementation(implementation, query.dtype, dropout_rate=rate)
    if chosen == "reference":
        return reference_attention(
            query, key, value, mask=mask, dropout_rate=rate, generator=generator
        )
    mixed = scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=None if mask is None else mask[:, None],
        is_causal=mask is None,
        enable_gqa=True,
    )
    return mixed.transpose(1, 2)


def reference_attention(
    query: Float[Tensor, "batch query heads head_dim"],
    key: Float[Tensor, "batch key kv_heads head_dim"],
    value: Float[Tensor, "batch key kv_heads head_dim"],
    *,
    mask: Bool[Tensor, "batch query key"] | None,
    dropout_rate: float,
    generator: torch.Generator | None,
) -> Float[Tensor, "batch query heads head_dim"]:
    """Attend as the paper writes it, scores and softmax in float32 (float64 stays float64)."""
    batch, queries, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    # The queries that share a key head are rows of one product.
    rows = query.permute(0, 2, 1, 3).reshape(batch, kv_heads, -1, head_dim)
    key, value = key.permute(0, 2, 1, 3), value.permute(0, 2, 1, 3)
    # torch rounds a product to its inputs' type, so they are widened first; no bit is lost by it.
    scores = torch.einsum("bnqd,bnkd->bnqk", rows.to(wide), key.to(wide))
    scores = scores.reshape(batch, heads, queries, keys) * head_dim**-0.5
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()[None]
    scores = torch.where(mask[:, None], scores, torch.finfo(wide).min)
    weights = dropout(torch.softmax(scores, dim=-1), rate=dropout_rate, generator=generator)
    weights = weights.to(value.dtype).reshape(batch, kv_heads, -1, keys)
    mixed = torch.einsum("bnqk,bnkd->bnqd", weights, value)
    return mixed.reshape(batch, heads, queries, head_dim).permute(0, 2, 1, 3)


def segment_mask(segment_ids: Int[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq seq"]:
    """Let each token see the earlier tokens of its own document only.

    Padding (segment 0) sees padding, so that no softmax is over an empty set; its outputs are
    never counted.
    """
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = torch.ones_like(same[0]).tril()
    return same & causal[None]
