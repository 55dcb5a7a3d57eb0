"""Mixture of experts: a router sends each token through few of many MLPs, and drops none.

Source: Shazeer et al. 2017, arXiv:1701.06538; softmax before the choice, and its optional
renormalisation: transformers, models/qwen3_moe/modeling_qwen3_moe.py; experts that every token
passes: Dai et al. 2024, arXiv:2401.06066.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tinyllm_jax.config import ModelConfig
from tinyllm_jax.model.dropout import dropout
from tinyllm_jax.model.grouped_dot import grouped_dot
from tinyllm_jax.model.layers import MLP, Linear, draw, matmul_precision, parameter_dtype
from tinyllm_jax.model.placement import placement

# The end of a router's name among the weights.
ROUTER = ".mlp.gate.kernel"


class Routing(NamedTuple):
    """What a router did with the tokens that count; of all blocks, with an axis for them."""

    balance_loss: Float[Array, "*layers"]
    z_loss: Float[Array, "*layers"]
    load: Float[Array, "*layers experts"]  # share of all choices; they add up to 1


class ExpertLinear(nnx.Module):
    """A matrix product for each expert, their kernels stacked."""

    def __init__(
        self,
        experts: int,
        in_size: int,
        out_size: int,
        *,
        std: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        shape = (experts, in_size, out_size)
        self.kernel = nnx.Param(draw(rngs.params(), shape, std=std, dtype=dtype))

    def __call__(
        self, rows: Float[Array, "rows in"], group_sizes: Int[Array, "experts"]
    ) -> Float[Array, "rows out"]:
        kernel = self.kernel[...].astype(rows.dtype)
        return grouped_dot(rows, kernel, group_sizes, precision=matmul_precision(rows.dtype))


class Experts(nnx.Module):
    """The SwiGLU layers of all experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        experts, hidden, inner = (
            config.num_experts,
            config.hidden_size,
            config.moe_intermediate_size,
        )
        dtype, std = parameter_dtype(config), config.initializer_range
        residual_std = std / (2 * config.num_hidden_layers) ** 0.5
        self.gate_proj = ExpertLinear(experts, hidden, inner, std=std, dtype=dtype, rngs=rngs)
        self.up_proj = ExpertLinear(experts, hidden, inner, std=std, dtype=dtype, rngs=rngs)
        self.down_proj = ExpertLinear(
            experts, inner, hidden, std=residual_std, dtype=dtype, rngs=rngs
        )
        self.dropout_rate = config.mlp_dropout
        self.num_experts = experts

    def __call__(
        self,
        rows: Float[Array, "rows hidden"],
        group_sizes: Int[Array, "experts"],
        *,
        dropout_key: PRNGKeyArray | None,
    ) -> Float[Array, "rows hidden"]:
        """Pass rows that are sorted by expert through their experts.

        Rows behind those of the last group are of experts that are not here, and become zero.
        """
        has_all = len(group_sizes) == self.num_experts
        inside = jnp.arange(len(rows))[:, None] < jnp.sum(group_sizes)

        # Nothing is promised of products with those rows, so they are cleared on every side, which
        # clears them backward, too.
        def cleared(rows: Array) -> Array:
            return rows if has_all else jnp.where(inside, rows, 0)

        rows = cleared(rows)
        gate, up = (
            cleared(project(rows, group_sizes)) for project in (self.gate_proj, self.up_proj)
        )
        inner = dropout(jax.nn.silu(gate) * up, rate=self.dropout_rate, key=dropout_key)
        return cleared(self.down_proj(inner, group_sizes))


class MoE(nnx.Module):
    """Router, routed experts, and experts that every token passes."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dtype, std = parameter_dtype(config), config.initializer_range
        self.gate = Linear(config.hidden_size, config.num_experts, std=std, dtype=dtype, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        if config.num_shared_experts > 0:
            # Experts whose outputs are added are one expert of their common width.
            inner = config.num_shared_experts * config.moe_intermediate_size
            self.shared_experts = MLP(config, inner=inner, rngs=rngs)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        counted: Bool[Array, "batch seq"],
        *,
        dropout_key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "batch seq hidden"], Routing]:
        """Mix, for every token, what its experts make of it.

        Args:
            counted: The tokens by which the router is judged; the others pass experts, too.
        """
        config = self.config
        keys = [None] * 2 if dropout_key is None else jax.random.split(dropout_key)
        # The choice is made at least in float32: rounding would make ties of near probabilities.
        logits = self.gate(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        probabilities = jax.nn.softmax(logits, axis=-1)
        weights, choices = placement().by_row(
            lambda rows: jax.lax.top_k(rows, config.num_experts_per_tok), probabilities
        )
        if config.norm_topk_prob:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        mixed = self.mix(x, weights.astype(x.dtype), choices, dropout_key=keys[0])
        if config.num_shared_experts > 0:
            mixed = mixed + self.shared_experts(x, dropout_key=keys[1])
        return mixed, routing(logits, probabilities, choices, counted, config)

    def mix(
        self,
        x: Float[Array, "batch seq hidden"],
        weights: Float[Array, "batch seq choices"],
        choices: Int[Array, "batch seq choices"],
        *,
        dropout_key: PRNGKeyArray | None,
    ) -> Float[Array, "batch seq hidden"]:
        """Add up the outputs of each token's experts, times their weights."""
        structure, kernels = nnx.split(self.experts)
        count = self.config.num_experts

        def mix(
            kernels: Any, x: Array, weights: Array, choices: Array, key: Array | None, first: Any
        ) -> Array:
            experts = nnx.merge(structure, kernels)
            here = experts.gate_proj.kernel.shape[0]
            # From `first` on, so that experts that are not here come last.
            numbers = choices.reshape(-1)
            numbers = numbers if here == count else (numbers - first) % count
            # One row for each choice, sorted so that each expert's rows stand together.
            order = jnp.argsort(numbers, stable=True)
            places = jnp.argsort(order)
            group_sizes = jnp.bincount(numbers, length=count)[:here]
            rows = jnp.repeat(x.reshape(-1, x.shape[-1]), weights.shape[-1], axis=0)
            rows = experts(permute(rows, order, places), group_sizes, dropout_key=key)
            rows = permute(rows, places, order).reshape(*choices.shape, -1)
            return jnp.sum(weights[..., None] * rows, axis=2)

        return placement().experts(mix, kernels, x, weights, choices, dropout_key)


@jax.custom_vjp
def permute(
    rows: Float[Array, "rows width"], order: Int[Array, "rows"], inverse: Int[Array, "rows"]
) -> Float[Array, "rows width"]:
    """Put rows in another order. The gradient goes back by `inverse`, since XLA, which cannot know
    that no row comes twice, would add it up row by row."""
    del inverse
    return rows[order]


permute.defvjp(
    lambda rows, order, inverse: (rows[order], (order, inverse)),
    lambda saved, change: (change[saved[1]], None, None),
)


def routing(
    logits: Float[Array, "batch seq experts"],
    probabilities: Float[Array, "batch seq experts"],
    choices: Int[Array, "batch seq choices"],
    counted: Bool[Array, "batch seq"],
    config: ModelConfig,
) -> Routing:
    """Measure how evenly the experts are loaded, and how large the router's logits are.

    The balance loss is experts x sum over experts of (share of all choices x mean probability); it
    is 1 where all experts are loaded alike. It is taken over all tokens, or over each row and
    averaged over rows by their tokens.

    Source: Fedus et al. 2022, arXiv:2101.03961, equations 4 to 6; within each row: DeepSeek-AI
    2024, arXiv:2405.04434, section 2.2.3; z-loss: Zoph et al. 2022, arXiv:2202.08906, equation 5.
    """
    experts, per_token = config.num_experts, config.num_experts_per_tok
    weight = counted.astype(logits.dtype)
    tokens = jnp.maximum(jnp.sum(weight), 1.0)
    squares = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    chosen = jnp.sum(jax.nn.one_hot(choices, experts, dtype=logits.dtype), axis=2)
    chosen, probabilities = (x * weight[..., None] for x in (chosen / per_token, probabilities))
    load = jnp.sum(chosen, axis=(0, 1)) / tokens
    if config.router_aux_loss_level == "batch":
        balance = experts * jnp.sum(load * jnp.sum(probabilities, axis=(0, 1)) / tokens)
    else:
        of_row = jnp.maximum(jnp.sum(weight, axis=1), 1.0)
        product = jnp.sum(jnp.sum(chosen, axis=1) * jnp.sum(probabilities, axis=1), axis=-1)
        balance = experts * jnp.sum(product / of_row) / tokens
    return Routing(balance, jnp.sum(squares * weight) / tokens, load)
