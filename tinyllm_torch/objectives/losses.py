"""Losses on logits, summed over targets; what they are divided by is the train step's business."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def cross_entropy_sum(
    logits: Float[Tensor, "batch seq vocab"],
    targets: Int[Tensor, "batch seq"],
    loss_mask: Bool[Tensor, "batch seq"],
) -> Float[Tensor, ""]:
    """Sum -log p(target) over the targets where `loss_mask` is True.

    Computed in the type of the logits, which is float32 or wider.

    Returns:
        Nats.
    """
    largest = torch.amax(logits, dim=-1, keepdim=True)
    log_sum = torch.log(torch.sum(torch.exp(logits - largest), dim=-1)) + largest[..., 0]
    chosen = torch.take_along_dim(logits, targets[..., None].long(), dim=-1)[..., 0]
    return torch.sum(torch.where(loss_mask, log_sum - chosen, 0.0))


def head_cross_entropy_sum(
    model: Any,
    hidden: Float[Tensor, "batch seq hidden"],
    targets: Int[Tensor, "batch seq"],
    loss_mask: Bool[Tensor, "batch seq"],
) -> Float[Tensor, ""]:
    """Do the `cross_entropy_sum` of a model's logits.

    Args:
        model: A `Transformer`; its head is what counts here.
        hidden: Final hidden states.

    Returns:
        Nats.
    """
    return cross_entropy_sum(model.logits(hidden), targets, loss_mask)
