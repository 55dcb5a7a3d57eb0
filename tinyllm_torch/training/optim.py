"""The optimizer: AdamW, or Muon beside it; schedules, decay on matrices only, clipping by norm.

Source: Loshchilov and Hutter 2019, arXiv:1711.05101 (decoupled decay) and 2017, arXiv:1608.03983
(cosine); Jordan et al. 2024, kellerjordan.github.io/posts/muon (Muon); Liu et al. 2025,
arXiv:2502.16982 (its updates scaled to AdamW's size, with decay). The arithmetic is optax's, which
differs from `torch.optim.AdamW` in rounding, from `torch.nn.utils.clip_grad_norm_` by the 1e-6 that
torch adds to the norm, and from `torch.optim.Muon`, which has no bias correction and multiplies in
bfloat16.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tinyllm_jax.config import Config

# Muon's numbers, as its authors chose them together: a, b and c of the polynomial
# a x + b x^3 + c x^5, how often it is applied, and what keeps a gradient of zero from a division
# by zero.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_EPSILON = 1e-8
# Root mean square of an update of AdamW, which Muon's are given too.
UPDATE_RMS = 0.2


class Moments(NamedTuple):
    """The optimizer's memory in the form that checkpoints keep."""

    count: int  # updates applied
    first: dict[str, Tensor]  # running mean of the gradient, by weight name
    second: dict[str, Tensor]  # running mean of its square, of the weights that AdamW updates


class Optimizer(NamedTuple):
    """Two pure functions, in optax's form."""

    init: Callable[[Mapping[str, Tensor]], Moments]
    # (gradients, moments, weights) -> (what to add to the weights, new moments)
    update: Callable[..., tuple[dict[str, Tensor], Moments]]


def learning_rate_schedule(config: Config) -> Callable[[int], float]:
    """Give the learning rate of update number `update`, counted from 1.

    Linear from 0 to the peak, reached at update `warmup_steps`, so the first update has peak /
    warmup_steps, and none is wasted on a rate of zero. From there to update `decay_steps`:

    - cosine: along a cosine to the floor, and the floor after that.
    - wsd (warm up, stay, decay): the peak, then linear to the floor over the last
      `wsd_decay_share` of `decay_steps`, which begins when warm-up has ended or later; the floor
      after that.
    - minimind_cosine: from 1.1 to 0.1 of the peak along a cosine that begins at the first update
      and ends after `decay_steps` of them, whatever the floor; warm-up multiplies it.

    Source:
        wsd: Hu et al. 2024, arXiv:2404.06395, section 4.2; linear: Haegele et al. 2024,
        arXiv:2405.18392. minimind_cosine: jingyaogong/minimind, `get_lr` of its trainers until
        December 2025; later ones begin at 1.0 of the peak.
    """
    optimizer = config.optimizer
    peak, floor = optimizer.learning_rate, optimizer.min_learning_rate
    warmup_steps = optimizer.warmup_steps
    decay_steps = max(config.decay_steps, warmup_steps + 1)
    cooldown_steps = min(optimizer.wsd_decay_share * decay_steps, decay_steps - warmup_steps)

    def cosine(update: int) -> float:
        if update < warmup_steps:
            return peak * update / warmup_steps
        share = min((update - warmup_steps) / (decay_steps - warmup_steps), 1.0)
        return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * share))

    def climbed(update: int) -> float:
        return min(update / max(warmup_steps, 1), 1.0)

    def wsd(update: int) -> float:
        left = min(max((decay_steps - update) / cooldown_steps, 0.0), 1.0)
        return climbed(update) * (floor + (peak - floor) * left)

    def minimind_cosine(update: int) -> float:
        share = min((update - 1) / config.decay_steps, 1.0)
        return climbed(update) * (peak / 10 + 0.5 * peak * (1.0 + math.cos(math.pi * share)))

    schedules = {"cosine": cosine, "wsd": wsd, "minimind_cosine": minimind_cosine}
    return schedules[optimizer.schedule]


def decays(weight: Any) -> bool:
    """Tell whether a weight is decayed: matrices (the embedding among them), never norms."""
    return weight.ndim >= 2


def is_hidden_matrix(name: str) -> bool:
    """Tell the matrices inside the blocks, by which vectors are multiplied, from all else.

    The embedding is no such matrix (its rows are looked up), nor is the head, and a router is so
    thin that its rows are rather vectors of their own.
    """
    return name.startswith("layers.") and name.endswith("_proj.weight")


def has_second_moment(name: str, config: Config) -> bool:
    """Tell whether AdamW updates a weight, which is all that needs a second moment."""
    return config.optimizer.name == "adamw" or not is_hidden_matrix(name)


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


def orthogonalize(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Bring all singular values near 1, by Newton and Schulz's iteration.

    Each step maps every singular value x to a x + b x^3 + c x^5 and leaves the directions. This
    polynomial is steep at 0 and does not converge: the values end anywhere from 0.68 to 1.21, and
    those that began below 0.002 of the norm lower.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]  # then the other product is the smaller one
    x = matrix.T if is_tall else matrix
    x = x / (torch.linalg.norm(x) + NEWTON_SCHULZ_EPSILON)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


def make_optimizer(config: Config) -> Optimizer:
    """Chain clipping by global norm and AdamW, or Muon for the hidden matrices and AdamW beside it.

    Both take the same learning rate and decay.
    """
    settings, schedule = config.optimizer, learning_rate_schedule(config)
    beta1, beta2, momentum = settings.beta1, settings.beta2, settings.muon_momentum

    def init(weights: Mapping[str, Tensor]) -> Moments:
        first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        second = {
            name: torch.zeros_like(weight)
            for name, weight in weights.items()
            if has_second_moment(name, config)
        }
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
            if has_second_moment(name, config):
                first[name] = (1 - beta1) * gradient + beta1 * moments.first[name]
                second[name] = (1 - beta2) * gradient**2 + beta2 * moments.second[name]
                mean = first[name] / (1 - beta1**count)
                mean_square = second[name] / (1 - beta2**count)
                change = mean / (torch.sqrt(mean_square) + settings.epsilon)
            else:
                first[name] = (1 - momentum) * gradient + momentum * moments.first[name]
                # Nesterov's: the mean that there would be after the same gradient once more.
                mean = momentum * first[name] / (1 - momentum ** (count + 1))
                mean = mean + (1 - momentum) * gradient / (1 - momentum**count)
                change = UPDATE_RMS * math.sqrt(max(gradient.shape)) * orthogonalize(mean)
            if decays(weights[name]):
                change = change + settings.weight_decay * weights[name]
            updates[name] = -rate * change
        return updates, Moments(count, first, second)

    return Optimizer(init, update)
