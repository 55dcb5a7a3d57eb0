"""LLaMA-style decoder: RMSNorm, rotary attention, SwiGLU or experts, tied or untied head.

Weights have Hugging Face's names; a matrix is `weight` with shape [out, in], the transpose of
`tinyllm_jax`'s `kernel`, and everything else has the same name and shape there.

Letters: r row (one token of the batch), e input width, v vocabulary.

Source: Touvron et al. 2023, arXiv:2302.13971; norms of queries and keys: Henry et al. 2020,
arXiv:2010.04245, in the form of transformers, models/qwen3/modeling_qwen3.py; names: transformers,
models/llama/modeling_llama.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tinyllm_jax.config import ModelConfig
from tinyllm_torch.model.attention import attention, segment_mask
from tinyllm_torch.model.dropout import dropout
from tinyllm_torch.model.kv_cache import LayerCache, visible_slots, write
from tinyllm_torch.model.layers import (
    MLP,
    Embedding,
    Linear,
    RMSNorm,
    compute_dtype,
    parameter_dtype,
)
from tinyllm_torch.model.moe import MoE, Routing
from tinyllm_torch.model.rope import rope_tables, rotate


class Hidden(NamedTuple):
    """What the blocks make of tokens."""

    states: Float[Tensor, "batch seq hidden"]
    cache: tuple[LayerCache, ...] | None
    routing: Routing | None  # of all blocks; None without experts


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
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, dtype=dtype)
        self.config = config

    def project(
        self, x: Float[Tensor, "batch seq hidden"], rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Make queries and keys, turned to their positions, and values."""
        config, (batch, seq, _) = self.config, x.shape
        query = self.q_proj(x).reshape(batch, seq, config.num_attention_heads, config.head_dim)
        key = self.k_proj(x).reshape(batch, seq, config.num_key_value_heads, config.head_dim)
        value = self.v_proj(x).reshape(batch, seq, config.num_key_value_heads, config.head_dim)
        if config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        return rotate(query, *rope), rotate(key, *rope), value

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
        query, key, value = self.project(x, rope)
        if cache is not None:
            cache = write(cache, key, value, positions)
            key, value = cache
        mixed = attention(
            query,
            key,
            value,
            mask=mask,
            causal=cache is None,
            implementation=config.attention,
            dropout_rate=config.attention_dropout,
            generator=generator,
        )
        return self.o_proj(mixed.reshape(batch, seq, -1)), cache


class DecoderLayer(nn.Module):
    """Attention and MLP or experts, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None):
        super().__init__()
        hidden, eps, dtype = config.hidden_size, config.rms_norm_eps, parameter_dtype(config)
        self.input_layernorm = RMSNorm(hidden, eps=eps, dtype=dtype)
        self.self_attn = Attention(config, generator=generator)
        self.post_attention_layernorm = RMSNorm(hidden, eps=eps, dtype=dtype)
        if config.num_experts > 0:
            self.mlp = MoE(config, generator=generator)
        else:
            self.mlp = MLP(config, inner=config.intermediate_size, generator=generator)
        self.residual_dropout = config.residual_dropout

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        *,
        cache: LayerCache | None,
        positions: Int[Tensor, "batch seq"],
        counted: Bool[Tensor, "batch seq"],
        generator: torch.Generator | None,
    ) -> tuple[Float[Tensor, "batch seq hidden"], LayerCache | None, Routing | None]:
        attended, cache = self.self_attn(
            self.input_layernorm(x),
            rope,
            mask,
            cache=cache,
            positions=positions,
            generator=generator,
        )
        x = x + dropout(attended, rate=self.residual_dropout, generator=generator)
        normed, routing = self.post_attention_layernorm(x), None
        if isinstance(self.mlp, MoE):
            fed, routing = self.mlp(normed, counted, generator=generator)
        else:
            fed = self.mlp(normed, generator=generator)
        return x + dropout(fed, rate=self.residual_dropout, generator=generator), cache, routing


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
        if config.score_head:
            # Scores begin near 0: normed states are about sqrt(hidden) long.
            self.score = Linear(hidden, 1, std=std / hidden**0.5, dtype=dtype, generator=generator)
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
        hidden = self.hidden(tokens, positions, segment_ids, generator=generator)
        return self.logits(hidden.states)

    def hidden(
        self,
        tokens: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "batch seq"] | None = None,
        segment_ids: Int[Tensor, "batch seq"] | None = None,
        *,
        counted: Bool[Tensor, "batch seq"] | None = None,
        cache: tuple[LayerCache, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> Hidden:
        """Compute the final hidden states, and the cache with these tokens written into it.

        With a cache, `positions` say in which slots the tokens stand and each token sees all slots
        up to its own.

        Args:
            counted: The tokens by which routers are judged; None is all of them.
        """
        config, dtype = self.config, compute_dtype(self.config)
        if positions is None:
            every_place = torch.arange(tokens.shape[1], device=tokens.device)
            positions = every_place[None].expand(tokens.shape)
        mask = None
        if counted is None:
            counted = torch.ones_like(tokens, dtype=torch.bool)
        if cache is not None:
            mask = visible_slots(positions, slots=cache[0].keys.shape[1])
        elif segment_ids is not None:
            mask = segment_mask(segment_ids)
        rope = rope_tables(positions, config, dtype=dtype)
        x = self.embed_tokens(tokens, dtype=dtype)
        x = dropout(x, rate=config.embedding_dropout, generator=generator)

        def block(
            layer: nn.Module, x: Tensor, layer_cache: LayerCache | None
        ) -> tuple[Tensor, LayerCache | None, Routing | None]:
            return layer(
                x,
                rope,
                mask,
                cache=layer_cache,
                positions=positions,
                counted=counted,
                generator=generator,
            )

        x, caches, routing = self.run_blocks(block, x, cache)
        return Hidden(self.norm(x), None if cache is None else caches, routing)

    def run_blocks(
        self,
        block: Callable[..., tuple[Tensor, LayerCache | None, Routing | None]],
        x: Float[Tensor, "batch seq hidden"],
        cache: tuple[LayerCache, ...] | None,
    ) -> tuple[Float[Tensor, "batch seq hidden"], tuple[Any, ...], Routing | None]:
        """Run all blocks one after another.

        Neither `scan_layers` nor `activation_checkpointing` changes a number, so the twin has only
        the plain form.

        Args:
            block: Runs one: (layer, x, its cache) -> (x, cache, routing).
        """
        caches, routings = [], []
        for index, layer in enumerate(self.layers):
            x, layer_cache, routing = block(layer, x, None if cache is None else cache[index])
            caches.append(layer_cache)
            routings.append(routing)
        if self.config.num_experts == 0:
            return x, tuple(caches), None
        return x, tuple(caches), Routing(*map(torch.stack, zip(*routings, strict=True)))

    def logits(self, hidden: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq vocab"]:
        """Score every token of the vocabulary, summing in float32 (float64 stays float64)."""
        dtype = hidden.dtype
        wide = torch.promote_types(dtype, torch.float32)
        rows = hidden.reshape(-1, hidden.shape[-1])
        tied = self.config.tie_word_embeddings
        matrix = (self.embed_tokens if tied else self.lm_head).weight.T
        # torch rounds a product to its inputs' type, so they are widened first; no bit is lost.
        logits = torch.einsum("re,ev->rv", rows.to(wide), matrix.to(dtype).to(wide))
        return logits.reshape(*hidden.shape[:-1], -1)

    def scores(self, hidden: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq"]:
        """Give the score head's number at each position, summed in float32 (float64 stays float64)."""
        dtype = hidden.dtype
        wide = torch.promote_types(dtype, torch.float32)
        rows = hidden.reshape(-1, hidden.shape[-1])
        scores = torch.einsum("re,e->r", rows.to(wide), self.score.weight[0].to(dtype).to(wide))
        return scores.reshape(hidden.shape[:-1])
