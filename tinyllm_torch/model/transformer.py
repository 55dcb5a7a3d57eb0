"""LLaMA-style decoder: RMSNorm, rotary attention, SwiGLU, tied or untied head.

Weights have Hugging Face's names; a matrix is `weight` with shape [out, in], the transpose of
`tinyllm_jax`'s `kernel`, and everything else has the same name and shape there.

Letters: r row (one token of the batch), e input width, f output width, v vocabulary.

Source: Touvron et al. 2023, arXiv:2302.13971; RMSNorm: Zhang and Sennrich 2019, arXiv:1910.07467;
SwiGLU: Shazeer 2020, arXiv:2002.05202; names: transformers, models/llama/modeling_llama.py.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding, silu

from tinyllm_jax.config import ModelConfig
from tinyllm_torch.model.attention import attention, segment_mask
from tinyllm_torch.model.dropout import dropout
from tinyllm_torch.model.kv_cache import LayerCache, visible_slots, write
from tinyllm_torch.model.rope import rope_tables, rotate


def compute_dtype(config: ModelConfig) -> torch.dtype:
    """Name the type of activations; `auto` is bfloat16 on a GPU, float32 on CPU."""
    if config.compute_dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, config.compute_dtype)


def parameter_dtype(config: ModelConfig) -> torch.dtype:
    """Name the type of weights: float32, or float64 where the model computes in float64."""
    return torch.promote_types(compute_dtype(config), torch.float32)


class Linear(nn.Module):
    """Matrix product without bias."""

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        std: float,
        dtype: torch.dtype,
        generator: torch.Generator | None,
    ):
        super().__init__()
        noise = torch.randn(out_size, in_size, dtype=dtype, generator=generator)
        self.weight = nn.Parameter(std * noise)

    def forward(self, x: Float[Tensor, "batch seq in"]) -> Float[Tensor, "batch seq out"]:
        kernel = self.weight.T.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        out = torch.einsum("re,ef->rf", rows, kernel)
        return out.reshape(*x.shape[:-1], -1)


class Embedding(nn.Module):
    """Table of one vector for each token."""

    def __init__(
        self,
        rows: int,
        size: int,
        *,
        std: float,
        dtype: torch.dtype,
        generator: torch.Generator | None,
    ):
        super().__init__()
        self.weight = nn.Parameter(std * torch.randn(rows, size, dtype=dtype, generator=generator))

    def forward(
        self, tokens: Int[Tensor, "batch seq"], *, dtype: torch.dtype
    ) -> Float[Tensor, "batch seq hidden"]:
        # Cast after the look-up: the gradient of a frequent token is a sum of thousands, which
        # bfloat16 cannot hold.
        return embedding(tokens, self.weight).to(dtype)


class RMSNorm(nn.Module):
    """Scale each vector to unit root mean square, then by a learnt weight."""

    def __init__(self, size: int, *, eps: float, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self.eps = eps

    def forward(self, x: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq hidden"]:
        """Normalise at least in float32; the weight is applied in the type of `x`."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = torch.mean(torch.square(wide), dim=-1, keepdim=True)
        normed = wide * torch.rsqrt(mean_square + self.eps)
        # Both are rounded to the type of `x` and then widened: the product is the same, and the
        # gradient of the weight, a sum over all rows, is not summed in bfloat16.
        factors = [normed, self.weight[None, None, :]]
        normed, weight = (factor.to(x.dtype).to(wide.dtype) for factor in factors)
        return (normed * weight).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None):
        super().__init__()
        hidden, dtype, std = config.hidden_size, parameter_dtype(config), config.initializer_range
        query_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        residual_std = std / (2 * config.num_hidden_layers) ** 0.5
        self.q_proj = Linear(hidden, query_size, std=std, dtype=dtype, generator=generator)
        self.k_proj = Linear(hidden, kv_size, std=std, dtype=dtype, generator=generator)
        self.v_proj = Linear(hidden, kv_size, std=std, dtype=dtype, generator=generator)
        self.o_proj = Linear(query_size, hidden, std=residual_std, dtype=dtype, generator=generator)
        self.config = config

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        *,
        cache: LayerCache | None,
        positions: Int[Tensor, "batch seq"],
        generator: torch.Generator | None,
    ) -> tuple[Float[Tensor, "batch seq hidden"], LayerCache | None]:
        """Attend to this call's tokens or, with a cache, to every position up to each token's."""
        config, (batch, seq, _) = self.config, x.shape
        query = self.q_proj(x).reshape(batch, seq, config.num_attention_heads, config.head_dim)
        key = self.k_proj(x).reshape(batch, seq, config.num_key_value_heads, config.head_dim)
        value = self.v_proj(x).reshape(batch, seq, config.num_key_value_heads, config.head_dim)
        query, key = rotate(query, *rope), rotate(key, *rope)
        if cache is not None:
            cache = write(cache, key, value, positions)
            key, value = cache
        mixed = attention(
            query,
            key,
            value,
            mask=mask,
            implementation=config.attention,
            dropout_rate=config.attention_dropout,
            generator=generator,
        )
        return self.o_proj(mixed.reshape(batch, seq, -1)), cache


class MLP(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None):
        super().__init__()
        hidden, inner, dtype = (
            config.hidden_size,
            config.intermediate_size,
            parameter_dtype(config),
        )
        std = config.initializer_range
        residual_std = std / (2 * config.num_hidden_layers) ** 0.5
        self.gate_proj = Linear(hidden, inner, std=std, dtype=dtype, generator=generator)
        self.up_proj = Linear(hidden, inner, std=std, dtype=dtype, generator=generator)
        self.down_proj = Linear(inner, hidden, std=residual_std, dtype=dtype, generator=generator)
        self.dropout_rate = config.mlp_dropout

    def forward(
        self, x: Float[Tensor, "batch seq hidden"], *, generator: torch.Generator | None
    ) -> Float[Tensor, "batch seq hidden"]:
        inner = silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(dropout(inner, rate=self.dropout_rate, generator=generator))


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None):
        super().__init__()
        hidden, eps, dtype = config.hidden_size, config.rms_norm_eps, parameter_dtype(config)
        self.input_layernorm = RMSNorm(hidden, eps=eps, dtype=dtype)
        self.self_attn = Attention(config, generator=generator)
        self.post_attention_layernorm = RMSNorm(hidden, eps=eps, dtype=dtype)
        self.mlp = MLP(config, generator=generator)
        self.residual_dropout = config.residual_dropout

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        *,
        cache: LayerCache | None,
        positions: Int[Tensor, "batch seq"],
        generator: torch.Generator | None,
    ) -> tuple[Float[Tensor, "batch seq hidden"], LayerCache | None]:
        attended, cache = self.self_attn(
            self.input_layernorm(x),
            rope,
            mask,
            cache=cache,
            positions=positions,
            generator=generator,
        )
        x = x + dropout(attended, rate=self.residual_dropout, generator=generator)
        fed = self.mlp(self.post_attention_layernorm(x), generator=generator)
        return x + dropout(fed, rate=self.residual_dropout, generator=generator), cache


class Transformer(nn.Module):
    """The decoder from tokens to logits.

    Args:
        config: Shape and arithmetic.
        generator: Source of the initial weights; None is torch's own.
    """

    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None):
        super().__init__()
        hidden, dtype, std = config.hidden_size, parameter_dtype(config), config.initializer_range
        self.embed_tokens = Embedding(
            config.vocab_size, hidden, std=std, dtype=dtype, generator=generator
        )
        self.layers = nn.ModuleList(
            [DecoderLayer(config, generator=generator) for _ in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(hidden, eps=config.rms_norm_eps, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                hidden, config.vocab_size, std=std, dtype=dtype, generator=generator
            )
        self.config = config

    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "batch seq"] | None = None,
        segment_ids: Int[Tensor, "batch seq"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Predict the token after each token, as float32 logits (float64 stays float64).

        Args:
            tokens: Rows of token ids.
            positions: Position of each token; None counts from 0 in every row.
            segment_ids: Number of the document of each token, 0 for padding; tokens never see
                another document. None is plain causal attention.
            generator: Turns dropout on.
        """
        hidden, _ = self.hidden(tokens, positions, segment_ids, generator=generator)
        return self.logits(hidden)

    def hidden(
        self,
        tokens: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "batch seq"] | None = None,
        segment_ids: Int[Tensor, "batch seq"] | None = None,
        *,
        cache: tuple[LayerCache, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "batch seq hidden"], tuple[LayerCache, ...] | None]:
        """Compute the final hidden states, and the cache with these tokens written into it.

        With a cache, `positions` say in which slots the tokens stand and each token sees all slots
        up to its own.
        """
        config, dtype = self.config, compute_dtype(self.config)
        if positions is None:
            every_place = torch.arange(tokens.shape[1], device=tokens.device)
            positions = every_place[None].expand(tokens.shape)
        mask = None
        if cache is not None:
            mask = visible_slots(positions, slots=cache[0].keys.shape[1])
        elif segment_ids is not None:
            mask = segment_mask(segment_ids)
        rope = rope_tables(
            positions, head_dim=config.head_dim, theta=config.rope_theta, dtype=dtype
        )
        x = self.embed_tokens(tokens, dtype=dtype)
        x = dropout(x, rate=config.embedding_dropout, generator=generator)
        new_cache = []
        for index, layer in enumerate(self.layers):
            x, layer_cache = layer(
                x,
                rope,
                mask,
                cache=None if cache is None else cache[index],
                positions=positions,
                generator=generator,
            )
            new_cache.append(layer_cache)
        return self.norm(x), None if cache is None else tuple(new_cache)

    def logits(self, hidden: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq vocab"]:
        """Score every token of the vocabulary, summing in float32 (float64 stays float64)."""
        dtype = hidden.dtype
        wide = torch.promote_types(dtype, torch.float32)
        rows = hidden.reshape(-1, hidden.shape[-1])
        if self.config.tie_word_embeddings:
            equation, matrix = "re,ve->rv", self.embed_tokens.weight
        else:
            equation, matrix = "re,ev->rv", self.lm_head.weight.T
        # torch rounds a product to its inputs' type, so they are widened first; no bit is lost.
        logits = torch.einsum(equation, rows.to(wide), matrix.to(dtype).to(wide))
        return logits.reshape(*hidden.shape[:-1], -1)
