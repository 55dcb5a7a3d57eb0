"""What the routers of experts add to any loss."""

import torch
from jaxtyping import Float
from torch import Tensor

from tinyllm_jax.config import ModelConfig
from tinyllm_torch.model.moe import Routing


def add_router_losses(
    loss: Float[Tensor, ""],
    told: dict[str, Tensor],
    routing: Routing | None,
    config: ModelConfig,
    *,
    weight: Float[Tensor, ""],
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Add what keeps experts loaded alike to a sum of losses, and tell it.

    Args:
        loss: Summed over what the step divides by (targets, pairs or rows).
        told: Summed alike.
        routing: Of all blocks; None without experts, which adds nothing.
        weight: How many of those the pass has. A router's losses are means over a pass, so that
            they are multiplied by it.

    Returns:
        What is minimised, and what is told, with `router_balance_loss` and `router_z_loss` (means
        over layers, without their weights in the sum) and `expert_load`, each expert's share of its
        layer's choices.
    """
    if routing is None:
        return loss, told
    added = config.router_aux_loss_coef * torch.sum(routing.balance_loss)
    added = added + config.router_z_loss_coef * torch.sum(routing.z_loss)
    of_routers = {
        "router_balance_loss": weight * torch.mean(routing.balance_loss),
        "router_z_loss": weight * torch.mean(routing.z_loss),
        "expert_load": weight * routing.load,
    }
    return loss + weight * added, told | of_routers
