"""The optimizer: AdamW with a warm-up-cosine schedule, decay on matrices only, clipping by norm.

Source: Loshchilov and Hutter 2019, arXiv:1711.05101 (decoupled decay) and 2017, arXiv:1608.03983
(cosine); the arithmetic is optax's, which differs from `torch.optim.AdamW` in rounding and from
`torch.nn.utils.clip_grad_norm_` by the 1e-6 that torch adds to the norm.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tinyllm_jax.config import Config


class Moments(NamedTuple):
    """AdamW's memory in the form that checkpoints keep."""

    count: int  # updates applied
    first: dict[str, Tensor]  # running mean of the gradient, by weight name
    second: dict[str, Tensor]  # running mean of its square


class Optimizer(NamedTuple):
    """Two pure functions, in optax's form."""

    init: Callable[[Mapping[str, Tensor]], Moments]
    # (gradients, moments, weights) -> (what to add to the weights, new moments)
    update: Callable[..., tuple[dict[str, Tensor], Moments]]


def learning_rate_schedule(config: Config) -> Callable[[int], float]:
    """Give the learning rate of update number `update`, counted from 1.

    Linear from 0 to the peak, reached at update `warmup_steps`; cosine from there to the floor,
    reached at `decay_steps`; the floor after that. The first update has peak / warmup_steps, so no
    update is wasted on a rate of zero.
    """
    optimizer = config.optimizer
    peak, floor = optimizer.learning_rate, optimizer.min_learning_rate
    warmup_steps = optimizer.warmup_steps
    decay_steps = max(config.decay_steps, warmup_steps + 1)

    def schedule(update: int) -> float:
        if update < warmup_steps:
            return peak * update / warmup_steps
        share = min((update - warmup_steps) / (decay_steps - warmup_steps), 1.0)
        return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * share))

    return schedule


def decays(weight: Any) -> bool:
    """Tell whether a weight is decayed: matrices (the embedding among them), never norms."""
    return weight.ndim >= 2


def global_norm(tensors: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """Give the Euclidean norm of all tensors laid end to end."""
    squares = [torch.sum(torch.square(tensor)) for tensor in tensors.values()]
    return torch.sqrt(torch.stack(squares).sum())


def clip_by_global_norm(gradients: Mapping[str, Tensor], *, max_norm: float) -> dict[str, Tensor]:
    """Scale gradients down to `max_norm` where their global norm is larger."""
    norm = global_norm(gradients)
    if norm < max_norm:
        return dict(gradients)
    return {name: gradient / norm * max_norm for name, gradient in gradients.items()}


def make_optimizer(config: Config) -> Optimizer:
    """Chain clipping by global norm and AdamW."""
    settings, schedule = config.optimizer, learning_rate_schedule(config)
    beta1, beta2 = settings.beta1, settings.beta2

    def init(weights: Mapping[str, Tensor]) -> Moments:
        first, second = (
            {name: torch.zeros_like(weight) for name, weight in weights.items()} for _ in range(2)
        )
        return Moments(0, first, second)

    @torch.no_grad()
    def update(
        gradients: Mapping[str, Tensor], moments: Moments, weights: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Moments]:
        if settings.max_grad_norm != 0.0:
            gradients = clip_by_global_norm(gradients, max_norm=settings.max_grad_norm)
        count = moments.count + 1
        rate = schedule(count)
        updates, first, second = {}, {}, {}
        for name, gradient in gradients.items():
            first[name] = (1 - beta1) * gradient + beta1 * moments.first[name]
            second[name] = (1 - beta2) * gradient**2 + beta2 * moments.second[name]
            mean = first[name] / (1 - beta1**count)
            mean_square = second[name] / (1 - beta2**count)
            change = mean / (torch.sqrt(mean_square) + settings.epsilon)
            if decays(weights[name]):
                change = change + settings.weight_decay * weights[name]
            updates[name] = -rate * change
        return updates, Moments(count, first, second)

    return Optimizer(init, update)
