"""LLaMA-style decoder: RMSNorm, rotary attention, SwiGLU or experts, tied or untied head.

Weights have Hugging Face's names; a matrix is `kernel` with shape [in, out], the transpose of
PyTorch's `weight`, and everything else has the same name and shape there.

Letters: r row (one token of the batch), e input width, v vocabulary.

Source: Touvron et al. 2023, arXiv:2302.13971; norms of queries and keys: Henry et al. 2020,
arXiv:2010.04245, in the form of transformers, models/qwen3/modeling_qwen3.py; names: transformers,
models/llama/modeling_llama.py.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tinyllm_jax.config import ModelConfig
from tinyllm_jax.model.attention import attention, segment_mask
from tinyllm_jax.model.decoding import (
    cached_attention,
    reads_in_blocks,
    times_table,
)
from tinyllm_jax.model.dropout import dropout
from tinyllm_jax.model.kv_cache import LayerCache, visible_slots, write
from tinyllm_jax.model.layers import (
    MLP,
    Embedding,
    Linear,
    RMSNorm,
    compute_dtype,
    keys_of,
    matmul_precision,
    parameter_dtype,
)
from tinyllm_jax.model.moe import MoE, Routing
from tinyllm_jax.model.placement import placement
from tinyllm_jax.model.rope import rope_tables, rotate

# What the forward pass keeps for the backward pass; all else is computed again.
KEPT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Hidden(NamedTuple):
    """What the blocks make of tokens."""

    states: Float[Array, "batch seq hidden"]
    cache: tuple[LayerCache, ...] | None
    routing: Routing | None  # of all blocks; None without experts


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        hidden, dtype, std = config.hidden_size, parameter_dtype(config), config.initializer_range
        query_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        residual_std = std / (2 * config.num_hidden_layers) ** 0.5
        self.q_proj = Linear(hidden, query_size, std=std, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(hidden, kv_size, std=std, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(hidden, kv_size, std=std, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(query_size, hidden, std=residual_std, dtype=dtype, rngs=rngs)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, dtype=dtype)
        self.config = config

    def project(
        self,
        x: Float[Array, "batch seq hidden"],
        rope: tuple[Array, Array],
        adapter_keys: Sequence[PRNGKeyArray | None],
    ) -> tuple[Array, Array, Array]:
        """Make queries and keys, turned to their positions, and values."""
        config, (batch, seq, _) = self.config, x.shape
        query = self.q_proj(x, adapter_key=adapter_keys[0])
        query = query.reshape(batch, seq, config.num_attention_heads, config.head_dim)
        key = self.k_proj(x, adapter_key=adapter_keys[1])
        key = key.reshape(batch, seq, config.num_key_value_heads, config.head_dim)
        value = self.v_proj(x, adapter_key=adapter_keys[2])
        value = value.reshape(batch, seq, config.num_key_value_heads, config.head_dim)
        if config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        return rotate(query, *rope), rotate(key, *rope), value

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        rope: tuple[Array, Array],
        mask: Array | None,
        *,
        cache: LayerCache | None,
        positions: Int[Array, "batch seq"],
        dropout_key: PRNGKeyArray | None,
        adapter_key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch seq hidden"], LayerCache | None]:
        """Attend to this call's tokens or, with a cache, to every position up to each token's."""
        config, (batch, seq, _) = self.config, x.shape
        keys = keys_of(adapter_key, 4)
        query, key, value = self.project(x, rope, keys)
        if cache is not None:
            cache = write(cache, key, value, positions)
            key, value = cache.by_slot()
        if cache is not None and reads_in_blocks(query, implementation=config.attention):
            mixed = cached_attention(query, cache.keys, cache.values, positions)
        else:
            mixed = attention(
                query,
                key,
                value,
                mask=mask,
                causal=cache is None,
                implementation=config.attention,
                dropout_rate=config.attention_dropout,
                dropout_key=dropout_key,
            )
        return self.o_proj(mixed.reshape(batch, seq, -1), adapter_key=keys[3]), cache


class DecoderLayer(nnx.Module):
    """Attention and MLP or experts, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        hidden, eps, dtype = config.hidden_size, config.rms_norm_eps, parameter_dtype(config)
        self.input_layernorm = RMSNorm(hidden, eps=eps, dtype=dtype)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(hidden, eps=eps, dtype=dtype)
        if config.num_experts > 0:
            self.mlp = MoE(config, rngs=rngs)
        else:
            self.mlp = MLP(config, inner=config.intermediate_size, rngs=rngs)
        self.residual_dropout = config.residual_dropout

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        rope: tuple[Array, Array],
        mask: Array | None,
        *,
        cache: LayerCache | None,
        positions: Int[Array, "batch seq"],
        counted: Bool[Array, "batch seq"],
        dropout_key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "batch seq hidden"], LayerCache | None, Routing | None]:
        keys = keys_of(dropout_key, 6)
        attended, cache = self.self_attn(
            self.input_layernorm(x),
            rope,
            mask,
            cache=cache,
            positions=positions,
            dropout_key=keys[0],
            adapter_key=keys[4],
        )
        x = x + dropout(attended, rate=self.residual_dropout, key=keys[1])
        normed, routing = self.post_attention_layernorm(x), None
        if isinstance(self.mlp, MoE):
            fed, routing = self.mlp(normed, counted, dropout_key=keys[2])
        else:
            fed = self.mlp(normed, dropout_key=keys[2], adapter_key=keys[5])
        return x + dropout(fed, rate=self.residual_dropout, key=keys[3]), cache, routing


class Transformer(nnx.Module):
    """The decoder from tokens to logits.

    Args:
        config: Shape and arithmetic.
        rngs: Source of the initial weights (stream `params`).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        hidden, dtype, std = config.hidden_size, parameter_dtype(config), config.initializer_range
        self.embed_tokens = Embedding(config.vocab_size, hidden, std=std, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [DecoderLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(hidden, eps=config.rms_norm_eps, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(hidden, config.vocab_size, std=std, dtype=dtype, rngs=rngs)
        if config.score_head:
            # Scores begin near 0: normed states are about sqrt(hidden) long.
            self.score = Linear(hidden, 1, std=std / hidden**0.5, dtype=dtype, rngs=rngs)
        self.config = config

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch seq vocab"]:
        """Predict the token after each token, as float32 logits (float64 stays float64).

        Args:
            tokens: Rows of token ids.
            positions: Position of each token; None counts from 0 in every row.
            segment_ids: Number of the document of each token, 0 for padding; tokens never see
                another document. None is plain causal attention.
            dropout_key: Turns dropout on.
        """
        hidden = self.hidden(tokens, positions, segment_ids, dropout_key=dropout_key)
        return self.logits(hidden.states)

    def hidden(
        self,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        *,
        counted: Bool[Array, "batch seq"] | None = None,
        cache: tuple[LayerCache, ...] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Hidden:
        """Compute the final hidden states, and the cache with these tokens written into it.

        With a cache, `positions` say in which slots the tokens stand and each token sees all slots
        up to its own.

        Args:
            counted: The tokens by which routers are judged; None is all of them.
        """
        config, dtype = self.config, compute_dtype(self.config)
        keys: Array | None = None
        if dropout_key is not None:
            keys = jax.random.split(dropout_key, config.num_hidden_layers + 1)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        mask = None
        if counted is None:
            counted = jnp.ones(tokens.shape, bool)
        if cache is not None:
            mask = visible_slots(positions, slots=cache[0].slots())
        elif segment_ids is not None:
            mask = segment_mask(segment_ids)
        rope = rope_tables(positions, config, dtype=dtype)
        x = self.embed_tokens(tokens, dtype=dtype)
        x = dropout(x, rate=config.embedding_dropout, key=None if keys is None else keys[-1])
        x = placement().residual(x)

        def block(
            layer: DecoderLayer, x: Array, layer_cache: LayerCache | None, key: Array | None
        ) -> tuple[Array, LayerCache | None, Routing | None]:
            return layer(
                x,
                rope,
                mask,
                cache=layer_cache,
                positions=positions,
                counted=counted,
                dropout_key=key,
            )

        x, caches, routing = self.run_blocks(block, x, cache, keys)
        return Hidden(self.norm(x), None if cache is None else caches, routing)

    def run_blocks(
        self,
        block: Callable[..., tuple[Array, LayerCache | None, Any]],
        x: Float[Array, "batch seq hidden"],
        cache: tuple[LayerCache, ...] | None,
        keys: Array | None,
    ) -> tuple[Float[Array, "batch seq hidden"], tuple[Any, ...], Any]:
        """Run all blocks one after another, in the form of the settings, which changes rounding at most.

        Args:
            block: Runs one: (layer, x, its cache, its dropout key) -> (x, cache, routing); in place of
                the routing it may tell arrays of its own, which are stacked alike.
            keys: Dropout keys, one for each block and more; None leaves dropout off.
        """
        config = self.config
        structures, states = zip(*(nnx.split(layer) for layer in self.layers), strict=True)

        def pure(state: Any, x: Array, layer_cache: LayerCache | None, key: Array | None) -> Any:
            layer = nnx.merge(structures[0], placement().block_weights(state))
            x, layer_cache, routing = block(layer, x, layer_cache, key)
            return placement().residual(x), layer_cache, routing

        keeping = config.activation_checkpointing
        # Nothing is kept for a backward pass while text is generated.
        if cache is None and (keeping != "none" or placement().kept is not None):
            policy = KEPT.get(keeping, placement().kept)
            pure = jax.checkpoint(pure, policy=policy, prevent_cse=not config.scan_layers)
        if isinstance(x, Tracer):
            # Blocks are alike: one is traced, and the program calls it for each (XLA inlines the calls).
            pure = jax.jit(pure)
        if keys is not None:
            keys = keys[: config.num_hidden_layers]
        if config.scan_layers and cache is None:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

            def body(x: Array, layer: tuple[Any, Array | None]) -> tuple[Array, Any]:
                x, _, routing = pure(layer[0], x, None, layer[1])
                return x, routing

            x, routing = jax.lax.scan(body, x, (stacked, keys))
            return x, (), routing
        caches, routings = [], []
        for index, state in enumerate(states):
            layer_cache = None if cache is None else cache[index]
            x, layer_cache, routing = pure(
                state, x, layer_cache, None if keys is None else keys[index]
            )
            caches.append(layer_cache)
            routings.append(routing)
        return x, tuple(caches), jax.tree.map(lambda *leaves: jnp.stack(leaves), *routings)

    def logits(self, hidden: Float[Array, "batch seq hidden"]) -> Float[Array, "batch seq vocab"]:
        """Score every token of the vocabulary, summing in float32 (float64 stays float64)."""
        dtype = hidden.dtype
        rows = hidden.reshape(-1, hidden.shape[-1])
        if self.config.tie_word_embeddings:
            logits = times_table(rows, jnp.asarray(self.embed_tokens.weight[...], dtype))
        else:
            logits = jnp.einsum(
                "re,ev->rv",
                rows,
                jnp.asarray(self.lm_head.kernel[...], dtype),
                precision=matmul_precision(dtype),
                preferred_element_type=jnp.promote_types(dtype, jnp.float32),
            )
        return placement().logits(logits.reshape(*hidden.shape[:-1], -1))

    def scores(self, hidden: Float[Array, "batch seq hidden"]) -> Float[Array, "batch seq"]:
        """Give the score head's number at each position, summed in float32 (float64 stays float64)."""
        dtype = hidden.dtype
        rows = hidden.reshape(-1, hidden.shape[-1])
        scores = jnp.einsum(
            "re,e->r",
            rows,
            self.score.kernel[...][:, 0].astype(dtype),
            precision=matmul_precision(dtype),
            preferred_element_type=jnp.promote_types(dtype, jnp.float32),
        )
        return scores.reshape(hidden.shape[:-1])
