"""Mixture of experts: a router sends each token through few of many MLPs, and drops none.

Source: Shazeer et al. 2017, arXiv:1701.06538; softmax before the choice, and its optional
renormalisation: transformers, models/qwen3_moe/modeling_qwen3_moe.py; experts that every token
passes: Dai et al. 2024, arXiv:2401.06066.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot

from tinyllm_jax.config import ModelConfig
from tinyllm_torch.model.layers import MLP, Linear, parameter_dtype

# The end of a router's name among the weights.
ROUTER = ".mlp.gate.weight"


class Routing(NamedTuple):
    """What a router did with the tokens that count; of all blocks, with an axis for them."""

    balance_loss: Float[Tensor, "*layers"]
    z_loss: Float[Tensor, "*layers"]
    load: Float[Tensor, "*layers experts"]  # share of all choices; they add up to 1


class MoE(nn.Module):
    """Router, routed experts, and experts that every token passes."""

    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None):
        super().__init__()
        dtype, std = parameter_dtype(config), config.initializer_range
        self.gate = Linear(
            config.hidden_size, config.num_experts, std=std, dtype=dtype, generator=generator
        )
        inner = config.moe_intermediate_size
        self.experts = nn.ModuleList(
            [MLP(config, inner=inner, generator=generator) for _ in range(config.num_experts)]
        )
        if config.num_shared_experts > 0:
            # Experts whose outputs are added are one expert of their common width.
            inner = config.num_shared_experts * config.moe_intermediate_size
            self.shared_experts = MLP(config, inner=inner, generator=generator)
        self.config = config

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        counted: Bool[Tensor, "batch seq"],
        *,
        generator: torch.Generator | None,
    ) -> tuple[Float[Tensor, "batch seq hidden"], Routing]:
        """Mix, for every token, what its experts make of it.

        Args:
            counted: The tokens by which the router is judged; the others pass experts, too.
        """
        config = self.config
        # The choice is made at least in float32: rounding would make ties of near probabilities.
        logits = self.gate(x.to(torch.promote_types(x.dtype, torch.float32)))
        probabilities = torch.softmax(logits, dim=-1)
        # Of equal probabilities the first expert's comes first, which `torch.topk` does not promise.
        weights, choices = torch.sort(probabilities, dim=-1, descending=True, stable=True)
        weights, choices = (each[..., : config.num_experts_per_tok] for each in (weights, choices))
        if config.norm_topk_prob:
            weights = weights / torch.sum(weights, dim=-1, keepdim=True)
        mixed = self.mix(x, weights.to(x.dtype), choices, generator=generator)
        if config.num_shared_experts > 0:
            mixed = mixed + self.shared_experts(x, generator=generator)
        return mixed, routing(logits, probabilities, choices, counted, config)

    def mix(
        self,
        x: Float[Tensor, "batch seq hidden"],
        weights: Float[Tensor, "batch seq choices"],
        choices: Int[Tensor, "batch seq choices"],
        *,
        generator: torch.Generator | None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Add up the outputs of each token's experts, times their weights."""
        mixed = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            row, place, choice = torch.where(choices == index)
            passed = expert(x[row, place][None], generator=generator)[0]
            weighted = weights[row, place, choice][:, None] * passed
            mixed = mixed.index_put((row, place), weighted, accumulate=True)
        return mixed


def routing(
    logits: Float[Tensor, "batch seq experts"],
    probabilities: Float[Tensor, "batch seq experts"],
    choices: Int[Tensor, "batch seq choices"],
    counted: Bool[Tensor, "batch seq"],
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
    weight = counted.to(logits.dtype)
    tokens = torch.sum(weight).clamp(min=1.0)
    squares = torch.square(torch.logsumexp(logits, dim=-1))
    chosen = torch.sum(one_hot(choices, experts).to(logits.dtype), dim=2)
    chosen, probabilities = (x * weight[..., None] for x in (chosen / per_token, probabilities))
    load = torch.sum(chosen, dim=(0, 1)) / tokens
    if config.router_aux_loss_level == "batch":
        balance = experts * torch.sum(load * torch.sum(probabilities, dim=(0, 1)) / tokens)
    else:
        of_row = torch.sum(weight, dim=1).clamp(min=1.0)
        product = torch.sum(torch.sum(chosen, dim=1) * torch.sum(probabilities, dim=1), dim=-1)
        balance = experts * torch.sum(product / of_row) / tokens
    return Routing(balance, torch.sum(squares * weight) / tokens, load)
