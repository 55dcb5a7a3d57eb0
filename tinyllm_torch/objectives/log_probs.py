"""Log-probabilities of tokens and answers, of which the losses after pretraining are made."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def target_log_probs(
    logits: Float[Tensor, "batch seq vocab"], targets: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq"]:
    """Give log p(target) at each position, in the type of the logits, which is float32 or wider.

    Returns:
        Nats; of targets that are no answer's, too.
    """
    largest = torch.amax(logits, dim=-1, keepdim=True)
    log_sum = torch.log(torch.sum(torch.exp(logits - largest), dim=-1)) + largest[..., 0]
    return torch.take_along_dim(logits, targets[..., None].long(), dim=-1)[..., 0] - log_sum


def answer_log_probs(
    log_probs: Float[Tensor, "batch seq"], loss_mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, " batch"]:
    """Sum the log-probabilities of the tokens of each row's answer, in nats."""
    return torch.sum(torch.where(loss_mask, log_probs, 0.0), dim=-1)


def answer_lengths(loss_mask: Bool[Tensor, "batch seq"]) -> Float[Tensor, " batch"]:
    """Count the tokens of each row's answer; 1 where there is none, to divide by."""
    return torch.sum(loss_mask, dim=-1, dtype=torch.float32).clamp(min=1.0)


def entropy(logits: Float[Tensor, "batch seq vocab"]) -> Float[Tensor, "batch seq"]:
    """Give the entropy of the next token at each position, in nats."""
    log_probs = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    return -torch.sum(torch.exp(log_probs) * log_probs, dim=-1)


def log_sigmoid(x: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Give log(1 / (1 + exp(-x))) without overflow."""
    return torch.nn.functional.logsigmoid(x)
