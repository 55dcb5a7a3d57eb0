"""LLaMA-style decoder: RMSNorm, rotary attention, SwiGLU, tied or untied head.

Weights have Hugging Face's names; a matrix is `kernel` with shape [in, out], the transpose of
PyTorch's `weight`, and everything else has the same name and shape there.

Letters: r row (one token of the batch), e input width, f output width, v vocabulary.

Source: Touvron et al. 2023, arXiv:2302.13971; RMSNorm: Zhang and Sennrich 2019, arXiv:1910.07467;
SwiGLU: Shazeer 2020, arXiv:2002.05202; names: transformers, models/llama/modeling_llama.py.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import Precision
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tinyllm_jax.config import ModelConfig
from tinyllm_jax.model.attention import attention, segment_mask
from tinyllm_jax.model.dropout import dropout
from tinyllm_jax.model.kv_cache import LayerCache, visible_slots, write
from tinyllm_jax.model.rope import rope_tables, rotate


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """Name the type of activations; `auto` is bfloat16 on GPU and TPU, float32 on CPU."""
    if config.compute_dtype == "auto":
        return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return jnp.dtype(config.compute_dtype)


def parameter_dtype(config: ModelConfig) -> jnp.dtype:
    """Name the type of weights: float32, or float64 where the model computes in float64."""
    return jnp.promote_types(compute_dtype(config), jnp.float32)


def matmul_precision(dtype: jnp.dtype) -> Precision:
    """Keep float32 products in float32 on devices whose default multiplies in fewer bits."""
    return Precision.DEFAULT if dtype == jnp.bfloat16 else Precision.HIGHEST


class Linear(nnx.Module):
    """Matrix product without bias."""

    def __init__(
        self, in_size: int, out_size: int, *, std: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        noise = jax.random.normal(rngs.params(), (in_size, out_size), dtype)
        self.kernel = nnx.Param(std * noise)

    def __call__(self, x: Float[Array, "batch seq in"]) -> Float[Array, "batch seq out"]:
        """Multiply rows as one matrix: with batch and sequence apart, XLA's CPU backend transposes
        a copy of every gradient, which doubles the time of the MLP."""
        kernel = self.kernel[...].astype(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        out = jnp.einsum("re,ef->rf", rows, kernel, precision=matmul_precision(x.dtype))
        return out.reshape(*x.shape[:-1], -1)


class Embedding(nnx.Module):
    """Table of one vector for each token."""

    def __init__(self, rows: int, size: int, *, std: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), (rows, size), dtype))

    def __call__(
        self, tokens: Int[Array, "batch seq"], *, dtype: jnp.dtype
    ) -> Float[Array, "batch seq hidden"]:
        # Cast after the look-up: the gradient of a frequent token is a sum of thousands, which
        # bfloat16 cannot hold.
        return jnp.take(self.weight[...], tokens, axis=0).astype(dtype)


class RMSNorm(nnx.Module):
    """Scale each vector to unit root mean square, then by a learnt weight."""

    def __init__(self, size: int, *, eps: float, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "batch seq hidden"]) -> Float[Array, "batch seq hidden"]:
        """Normalise at least in float32; the weight is applied in the type of `x`."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.eps)
        # Both are rounded to the type of `x` and then widened: the product is the same, and the
        # gradient of the weight, a sum over all rows, is not summed in bfloat16.
        factors = [normed, self.weight[...][None, None, :]]
        normed, weight = (factor.astype(x.dtype).astype(wide.dtype) for factor in factors)
        return (normed * weight).astype(x.dtype)


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
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        rope: tuple[Array, Array],
        mask: Array | None,
        *,
        cache: LayerCache | None,
        positions: Int[Array, "batch seq"],
        dropout_key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "batch seq hidden"], LayerCache | None]:
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
            dropout_key=dropout_key,
        )
        return self.o_proj(mixed.reshape(batch, seq, -1)), cache


class MLP(nnx.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        hidden, inner, dtype = (
            config.hidden_size,
            config.intermediate_size,
            parameter_dtype(config),
        )
        std = config.initializer_range
        residual_std = std / (2 * config.num_hidden_layers) ** 0.5
        self.gate_proj = Linear(hidden, inner, std=std, dtype=dtype, rngs=rngs)
        self.up_proj = Linear(hidden, inner, std=std, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(inner, hidden, std=residual_std, dtype=dtype, rngs=rngs)
        self.dropout_rate = config.mlp_dropout

    def __call__(
        self, x: Float[Array, "batch seq hidden"], *, dropout_key: PRNGKeyArray | None
    ) -> Float[Array, "batch seq hidden"]:
        inner = jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(dropout(inner, rate=self.dropout_rate, key=dropout_key))


class DecoderLayer(nnx.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        hidden, eps, dtype = config.hidden_size, config.rms_norm_eps, parameter_dtype(config)
        self.input_layernorm = RMSNorm(hidden, eps=eps, dtype=dtype)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(hidden, eps=eps, dtype=dtype)
        self.mlp = MLP(config, rngs=rngs)
        self.residual_dropout = config.residual_dropout

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        rope: tuple[Array, Array],
        mask: Array | None,
        *,
        cache: LayerCache | None,
        positions: Int[Array, "batch seq"],
        dropout_key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "batch seq hidden"], LayerCache | None]:
        keys = [None] * 4 if dropout_key is None else jax.random.split(dropout_key, 4)
        attended, cache = self.self_attn(
            self.input_layernorm(x),
            rope,
            mask,
            cache=cache,
            positions=positions,
            dropout_key=keys[0],
        )
        x = x + dropout(attended, rate=self.residual_dropout, key=keys[1])
        fed = self.mlp(self.post_attention_layernorm(x), dropout_key=keys[2])
        return x + dropout(fed, rate=self.residual_dropout, key=keys[3]), cache


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
        hidden, _ = self.hidden(tokens, positions, segment_ids, dropout_key=dropout_key)
        return self.logits(hidden)

    def hidden(
        self,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        *,
        cache: tuple[LayerCache, ...] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch seq hidden"], tuple[LayerCache, ...] | None]:
        """Compute the final hidden states, and the cache with these tokens written into it.

        With a cache, `positions` say in which slots the tokens stand and each token sees all slots
        up to its own.
        """
        config, dtype = self.config, compute_dtype(self.config)
        keys: list[Array | None] = [None] * (config.num_hidden_layers + 1)
        if dropout_key is not None:
            keys = list(jax.random.split(dropout_key, config.num_hidden_layers + 1))
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        mask = None
        if cache is not None:
            mask = visible_slots(positions, slots=cache[0].keys.shape[1])
        elif segment_ids is not None:
            mask = segment_mask(segment_ids)
        rope = rope_tables(
            positions, head_dim=config.head_dim, theta=config.rope_theta, dtype=dtype
        )
        x = self.embed_tokens(tokens, dtype=dtype)
        x = dropout(x, rate=config.embedding_dropout, key=keys[-1])
        new_cache = []
        for index, layer in enumerate(self.layers):
            x, layer_cache = layer(
                x,
                rope,
                mask,
                cache=None if cache is None else cache[index],
                positions=positions,
                dropout_key=keys[index],
            )
            new_cache.append(layer_cache)
        return self.norm(x), None if cache is None else tuple(new_cache)

    def logits(self, hidden: Float[Array, "batch seq hidden"]) -> Float[Array, "batch seq vocab"]:
        """Score every token of the vocabulary, summing in float32 (float64 stays float64)."""
        dtype = hidden.dtype
        rows = hidden.reshape(-1, hidden.shape[-1])
        if self.config.tie_word_embeddings:
            equation, matrix = "re,ve->rv", self.embed_tokens.weight[...]
        else:
            equation, matrix = "re,ev->rv", self.lm_head.kernel[...]
        logits = jnp.einsum(
            equation,
            rows,
            matrix.astype(dtype),
            precision=matmul_precision(dtype),
            preferred_element_type=jnp.promote_types(dtype, jnp.float32),
        )
        return logits.reshape(*hidden.shape[:-1], -1)
