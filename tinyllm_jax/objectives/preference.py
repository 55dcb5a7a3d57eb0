"""Learning from pairs of a chosen and a rejected answer, without a reward model.

Source: DPO: Rafailov et al. 2023, arXiv:2305.18290, equation 7; label smoothing: Mitchell 2023,
ericmitchell.ai/cdpo.pdf; IPO: Azar et al. 2023, arXiv:2310.12036, equation 17; SimPO: Meng et al.
2024, arXiv:2405.14734, equation 6.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from tinyllm_jax.config import PreferenceConfig
from tinyllm_jax.objectives.head_blocks import measure_logits
from tinyllm_jax.objectives.log_probs import (
    answer_lengths,
    answer_log_probs,
    log_sigmoid,
    target_log_probs,
)
from tinyllm_jax.objectives.router_losses import add_router_losses
from tinyllm_jax.training.step import LossSums

PAIR = ("chosen", "rejected")


def implicit_rewards(
    log_probs: Float[Array, " rows"],
    reference: Float[Array, " rows"],
    lengths: Float[Array, " rows"],
    *,
    settings: PreferenceConfig,
) -> Float[Array, " rows"]:
    """Say what a model holds an answer to be worth: beta times its log-probability.

    Args:
        log_probs: Of whole answers, in nats.
        reference: Of the same answers under the reference; SimPO has none, and does not look.
        lengths: Tokens of the answers.
    """
    if settings.loss == "simpo":
        return settings.beta * log_probs / lengths
    ratios = log_probs - reference
    return settings.beta * (ratios / lengths if settings.length_normalised else ratios)


def preference_losses(
    chosen_rewards: Float[Array, " rows"],
    rejected_rewards: Float[Array, " rows"],
    *,
    settings: PreferenceConfig,
) -> Float[Array, " rows"]:
    """Give the loss of each pair.

    - sigmoid: -log sigmoid(margin).
    - simpo: the same of the margin less the one that is wanted.
    - ipo: (h - 1 / (2 beta))^2, where h is the margin without its factor beta.

    A share `label_smoothing` of the pairs counts the other way round.
    """
    margin = chosen_rewards - rejected_rewards
    if settings.loss == "ipo":
        return jnp.square(margin / settings.beta - 1 / (2 * settings.beta))
    if settings.loss == "simpo":
        margin = margin - settings.simpo_margin
    wrong = settings.label_smoothing
    return -(1 - wrong) * log_sigmoid(margin) - wrong * log_sigmoid(-margin)


def real_pairs(batch: dict[str, Array]) -> Bool[Array, "*rows"]:
    """Tell the rows that are pairs from those that fill a batch up; passes may stand before them."""
    return jnp.any(batch["chosen_mask"], axis=-1) & jnp.any(batch["rejected_mask"], axis=-1)


def count_pairs(batch: dict[str, Array]) -> Float[Array, ""]:
    """Count the pairs of a batch."""
    return jnp.sum(real_pairs(batch), dtype=jnp.float32)


def both_answers(batch: dict[str, Array], name: str) -> Array:
    """Lay both answers of each pair one under the other, so that a pair stays on its device."""
    both = jnp.stack([batch[f"{kind}_{name}"] for kind in PAIR], axis=1)
    return both.reshape(-1, *both.shape[2:])


def make_preference_loss(settings: PreferenceConfig) -> LossSums:
    """Make the function that sums the losses of a batch's pairs.

    What it tells, each summed over pairs:

    - `loss`, `margin` (between the rewards), `accuracy` (share of pairs with a margin above 0).
    - `chosen_reward`, `rejected_reward`; `chosen_log_prob`, `rejected_log_prob` of whole answers.
    - `chosen_kl`, `rejected_kl`: how far an answer's log-probability has moved from the
      reference's, in nats. Over answers that the model itself samples this would be its divergence.
    """

    def loss_sums(
        model: Any, batch: dict[str, Array], dropout_key: PRNGKeyArray | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        tokens, mask = both_answers(batch, "tokens"), both_answers(batch, "mask")
        hidden = model.hidden(tokens, counted=mask, dropout_key=dropout_key)
        targets = both_answers(batch, "targets")
        by_token = measure_logits(model, hidden.states, target_log_probs, targets)
        log_probs = answer_log_probs(by_token, mask).reshape(-1, 2)
        lengths = answer_lengths(mask).reshape(-1, 2)
        has_reference = settings.loss != "simpo"
        real, reference = real_pairs(batch), jnp.zeros_like(log_probs)
        if has_reference:
            given = jnp.stack([batch[f"reference_{kind}"] for kind in PAIR], axis=1)
            reference = jnp.where(real[:, None], given, 0.0)
        rewards = [
            implicit_rewards(log_probs[:, i], reference[:, i], lengths[:, i], settings=settings)
            for i in range(2)
        ]
        told = {
            "loss": preference_losses(*rewards, settings=settings),
            "margin": rewards[0] - rewards[1],
            "accuracy": (rewards[0] > rewards[1]).astype(log_probs.dtype),
        }
        for i, kind in enumerate(PAIR):
            told[f"{kind}_reward"] = rewards[i]
            told[f"{kind}_log_prob"] = log_probs[:, i]
            if has_reference:
                told[f"{kind}_kl"] = log_probs[:, i] - reference[:, i]
        sums = {name: jnp.sum(jnp.where(real, values, 0.0)) for name, values in told.items()}
        return add_router_losses(
            sums["loss"], sums, hidden.routing, model.config, weight=count_pairs(batch)
        )

    return loss_sums
