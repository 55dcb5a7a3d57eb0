"""Learning what an answer is worth, from pairs of a chosen and a rejected one.

Source: Bradley and Terry 1952, Biometrika 39 (3/4); Ouyang et al. 2022, arXiv:2203.02155,
equation 1.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tinyllm_jax.model.moe import Routing
from tinyllm_jax.objectives.log_probs import log_sigmoid
from tinyllm_jax.objectives.preference import both_answers, count_pairs, real_pairs
from tinyllm_jax.objectives.router_losses import add_router_losses
from tinyllm_jax.training.step import LossSums


def reward_losses(
    chosen_scores: Float[Array, " rows"], rejected_scores: Float[Array, " rows"]
) -> Float[Array, " rows"]:
    """Give -log of the probability that the chosen answer is the better one, in nats."""
    return -log_sigmoid(chosen_scores - rejected_scores)


def answer_scores(
    model: Any,
    tokens: Int[Array, "batch seq"],
    targets: Int[Array, "batch seq"],
    loss_mask: Bool[Array, "batch seq"],
    *,
    dropout_key: PRNGKeyArray | None,
) -> tuple[Float[Array, " batch"], Routing | None]:
    """Score each row's answer where its last token has been read.

    That token may stand among the targets alone, so the rows are read with one token more.

    Args:
        targets: The token after each of `tokens`.
        loss_mask: True on the targets that are the answer's.

    Returns:
        A number for each row, that of its first token where it has no answer; and the routing.
    """
    whole = jnp.concatenate([tokens, targets[:, -1:]], axis=1)
    counted = jnp.concatenate([jnp.zeros_like(loss_mask[:, :1]), loss_mask], axis=1)
    places = jnp.arange(whole.shape[1])[None]
    last = jnp.max(jnp.where(counted, places, 0), axis=1, keepdims=True)
    hidden = model.hidden(whole, counted=counted, dropout_key=dropout_key)
    scores = jnp.take_along_axis(model.scores(hidden.states), last, axis=1)
    return scores[:, 0], hidden.routing


def make_reward_loss() -> LossSums:
    """Make the function that sums the losses of a batch's pairs.

    It tells, each summed over pairs: `loss`, `margin` and `accuracy` (share of pairs with a margin
    above 0), `chosen_score` and `rejected_score`.
    """

    def loss_sums(
        model: Any, batch: dict[str, Array], dropout_key: PRNGKeyArray | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        arrays = [both_answers(batch, name) for name in ("tokens", "targets", "mask")]
        scores, routing = answer_scores(model, *arrays, dropout_key=dropout_key)
        chosen, rejected = scores.reshape(-1, 2).T
        told = {
            "loss": reward_losses(chosen, rejected),
            "margin": chosen - rejected,
            "accuracy": (chosen > rejected).astype(scores.dtype),
            "chosen_score": chosen,
            "rejected_score": rejected,
        }
        real = real_pairs(batch)
        sums = {name: jnp.sum(jnp.where(real, values, 0.0)) for name, values in told.items()}
        return add_router_losses(
            sums["loss"], sums, routing, model.config, weight=count_pairs(batch)
        )

    return loss_sums
