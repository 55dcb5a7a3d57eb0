"""How much better than expected each sampled token, or each sampled answer, was.

Source: Schulman et al. 2016, arXiv:1506.02438 (GAE); Shao et al. 2024, arXiv:2402.03300 (groups);
Ziegler et al. 2019, arXiv:1909.08593 (divergence in the rewards, and its adaptive weight).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Added to a standard deviation that is divided by, as TRL does; rewards that are equal up to their
# last bits give advantages near 0.
GROUP_EPSILON = 1e-4
EPSILON = 1e-8
# Ziegler et al. choose them together: the share of the error that the weight follows in one update,
# and the largest error that counts.
KL_GAIN, KL_LARGEST_ERROR = 0.1, 0.2


def token_rewards(
    answer_rewards: Float[Tensor, " batch"],
    log_probs: Float[Tensor, "batch seq"],
    reference_log_probs: Float[Tensor, "batch seq"],
    loss_mask: Bool[Tensor, "batch seq"],
    *,
    kl_coef: float | Float[Tensor, ""],
) -> Float[Tensor, "batch seq"]:
    """Spread rewards over tokens: each pays for its divergence, the last one has the answer's reward.

    Args:
        answer_rewards: One for each row.
        log_probs: Of the tokens when they were sampled.
        reference_log_probs: Of the same tokens under the reference.
        loss_mask: True on the tokens of the answer.
        kl_coef: Reward that one nat costs.

    Returns:
        In units of the rewards; 0 outside the answer.

    Source:
        Ziegler et al. 2019, equation 2; for each token: Shao et al. 2024, equation 2.
    """
    places = torch.arange(loss_mask.shape[1], device=loss_mask.device)[None]
    last = torch.amax(torch.where(loss_mask, places, -1), dim=1, keepdim=True)
    rewards = torch.where(places == last, answer_rewards[:, None], 0.0)
    rewards = rewards - kl_coef * (log_probs - reference_log_probs)
    return torch.where(loss_mask, rewards, 0.0)


def generalised_advantages(
    rewards: Float[Tensor, "batch seq"],
    values: Float[Tensor, "batch seq"],
    loss_mask: Bool[Tensor, "batch seq"],
    *,
    discount: float,
    trace: float,
) -> Float[Tensor, "batch seq"]:
    """Estimate the advantage of each sampled token.

    What stands between the tokens of an answer, such as what a tool said, is stepped over: the
    state after a token is the one before the answer's next token. After its last one nothing is
    expected any more.

    Args:
        rewards: Reward given at each token.
        values: What was expected before each token, in reward units.
        loss_mask: True on the tokens of the answer; the others get advantage 0.
        discount: Worth of a reward one token later (gamma).
        trace: 0 is one step, 1 is Monte Carlo (lambda).

    Returns:
        Advantages in reward units, not normalised. With `values` added they are the returns that a
        value function learns.

    Source:
        Schulman et al. 2016, equation 16.
    """

    next_value = next_advantage = torch.zeros_like(values[:, 0])
    advantages = []
    for place in reversed(range(values.shape[1])):
        value, sampled = values[:, place], loss_mask[:, place]
        surprise = rewards[:, place] + discount * next_value - value
        advantage = surprise + discount * trace * next_advantage
        next_value = torch.where(sampled, value, next_value)
        next_advantage = torch.where(sampled, advantage, next_advantage)
        advantages.append(torch.where(sampled, advantage, 0.0))
    return torch.stack(advantages[::-1], dim=1)


def normalised_advantages(
    advantages: Float[Tensor, "batch seq"], loss_mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq"]:
    """Bring the advantages of all tokens together to mean 0 and standard deviation 1."""
    count = torch.sum(loss_mask, dtype=advantages.dtype).clamp(min=1.0)
    mean = torch.sum(torch.where(loss_mask, advantages, 0.0)) / count
    centred = torch.where(loss_mask, advantages - mean, 0.0)
    deviation = torch.sqrt(torch.sum(torch.square(centred)) / count)
    return centred / (deviation + EPSILON)


def group_advantages(
    rewards: Float[Tensor, " batch"], group_size: int, *, normalised: bool
) -> Float[Tensor, " batch"]:
    """Compare each answer's reward with the mean of those to the same prompt.

    Args:
        rewards: The answers to one prompt stand together.
        normalised: Divide by the group's standard deviation (that of a sample, over one answer
            less, as TRL and veRL take it), which gives easy and hard prompts the same weight.

    Source:
        Shao et al. 2024, section 4.1.2; without the division: Liu et al. 2025, arXiv:2503.20783.
    """
    groups = rewards.reshape(-1, group_size)
    centred = groups - torch.mean(groups, dim=1, keepdim=True)
    if normalised:
        variance = torch.sum(torch.square(centred), dim=1, keepdim=True) / (group_size - 1)
        centred = centred / (torch.sqrt(variance) + GROUP_EPSILON)
    return centred.reshape(-1)


def adapted_kl_coef(
    kl_coef: float | Float[Tensor, ""], kl: Float[Tensor, ""], *, target: float
) -> Float[Tensor, ""]:
    """Move the weight of the divergence so that the divergence comes to its target.

    Args:
        kl_coef: The weight until now.
        kl: Divergence of whole answers from the reference under it, in nats.
        target: The one that is wanted; above 0.

    Source:
        Ziegler et al. 2019, section 2.2.
    """
    error = torch.clamp(kl / target - 1.0, -KL_LARGEST_ERROR, KL_LARGEST_ERROR)
    return kl_coef * (1.0 + KL_GAIN * error)
