"""Learning what an answer is worth, from pairs of a chosen and a rejected one.

Source: Bradley and Terry 1952, Biometrika 39 (3/4); Ouyang et al. 2022, arXiv:2203.02155,
equation 1.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tinyllm_torch.model.moe import Routing
from tinyllm_torch.objectives.log_probs import log_sigmoid
from tinyllm_torch.objectives.preference import both_answers, count_pairs, real_pairs
from tinyllm_torch.objectives.router_losses import add_router_losses
from tinyllm_torch.training.step import LossSums


def reward_losses(
    chosen_scores: Float[Tensor, " rows"], rejected_scores: Float[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """Give -log of the probability that the chosen answer is the better one, in nats."""
    return -log_sigmoid(chosen_scores - rejected_scores)


def answer_scores(
    model: Any,
    tokens: Int[Tensor, "batch seq"],
    targets: Int[Tensor, "batch seq"],
    loss_mask: Bool[Tensor, "batch seq"],
    *,
    generator: torch.Generator | None,
) -> tuple[Float[Tensor, " batch"], Routing | None]:
    """Score each row's answer where its last token has been read.

    That token may stand among the targets alone, so the rows are read with one token more.

    Args:
        targets: The token after each of `tokens`.
        loss_mask: True on the targets that are the answer's.

    Returns:
        A number for each row, that of its first token where it has no answer; and the routing.
    """
    whole = torch.cat([tokens, targets[:, -1:]], dim=1)
    counted = torch.cat([torch.zeros_like(loss_mask[:, :1]), loss_mask], dim=1)
    places = torch.arange(whole.shape[1], device=whole.device)[None]
    last = torch.amax(torch.where(counted, places, 0), dim=1, keepdim=True)
    hidden = model.hidden(whole, counted=counted, generator=generator)
    scores = torch.take_along_dim(model.scores(hidden.states), last, dim=1)
    return scores[:, 0], hidden.routing


def make_reward_loss() -> LossSums:
    """Make the function that sums the losses of a batch's pairs.

    It tells, each summed over pairs: `loss`, `margin` and `accuracy` (share of pairs with a margin
    above 0), `chosen_score` and `rejected_score`.
    """

    def loss_sums(
        model: Any, batch: dict[str, Tensor], generator: torch.Generator | None
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        arrays = [both_answers(batch, name) for name in ("tokens", "targets", "mask")]
        scores, routing = answer_scores(model, *arrays, generator=generator)
        chosen, rejected = scores.reshape(-1, 2).T
        told = {
            "loss": reward_losses(chosen, rejected),
            "margin": chosen - rejected,
            "accuracy": (chosen > rejected).to(scores.dtype),
            "chosen_score": chosen,
            "rejected_score": rejected,
        }
        real = real_pairs(batch)
        sums = {name: torch.sum(torch.where(real, values, 0.0)) for name, values in told.items()}
        return add_router_losses(
            sums["loss"], sums, routing, model.config, weight=count_pairs(batch)
        )

    return loss_sums
