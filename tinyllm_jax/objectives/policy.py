"""Learning from answers that the model sampled itself: PPO and GRPO.

Source: PPO: Schulman et al. 2017, arXiv:1707.06347; GRPO: Shao et al. 2024, arXiv:2402.03300; a
higher upper end of the clip range, and the mean over tokens: Yu et al. 2025, arXiv:2503.14476
(DAPO), equation 8.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from tinyllm_jax.config import RlhfConfig
from tinyllm_jax.objectives.head_blocks import measure_logits
from tinyllm_jax.objectives.log_probs import answer_lengths, entropy, target_log_probs
from tinyllm_jax.objectives.router_losses import add_router_losses
from tinyllm_jax.training.step import LossSums, LossWeight


def clipped_policy_losses(
    log_probs: Float[Array, "batch seq"],
    old_log_probs: Float[Array, "batch seq"],
    advantages: Float[Array, "batch seq"],
    *,
    clip_low: float,
    clip_high: float,
) -> Float[Array, "batch seq"]:
    """Give the loss of each token, which ends to fall where its probability has moved far enough.

    Source:
        PPO, equation 7; with two ends of the range: DAPO, equation 8.
    """
    ratios = jnp.exp(log_probs - old_log_probs)
    clipped = jnp.clip(ratios, 1.0 - clip_low, 1.0 + clip_high)
    return -jnp.minimum(ratios * advantages, clipped * advantages)


def clipped_value_losses(
    values: Float[Array, "batch seq"],
    old_values: Float[Array, "batch seq"],
    returns: Float[Array, "batch seq"],
    *,
    value_clip: float,
) -> Float[Array, "batch seq"]:
    """Give half the squared error of each value, or of one held near its old self if that is larger.

    Args:
        value_clip: How far from the old one; 0 leaves values free.

    Source:
        PPO, equation 9 (its L^VF); half of it, and the clip: openai/baselines, ppo2/model.py.
    """
    errors = jnp.square(values - returns)
    if value_clip > 0:
        near = old_values + jnp.clip(values - old_values, -value_clip, value_clip)
        errors = jnp.maximum(errors, jnp.square(near - returns))
    return 0.5 * errors


def kl_k3(
    log_probs: Float[Array, "batch seq"], reference_log_probs: Float[Array, "batch seq"]
) -> Float[Array, "batch seq"]:
    """Estimate the divergence from the reference at tokens that the policy sampled, in nats.

    Without bias and never below 0.

    Source:
        Schulman 2020, joschu.net/blog/kl-approx.html (k3); GRPO, equation 4.
    """
    ratios = reference_log_probs - log_probs
    return jnp.exp(ratios) - ratios - 1.0


def sum_over_answers(
    terms: Float[Array, "batch seq"], loss_mask: Bool[Array, "batch seq"], *, loss_level: str
) -> Float[Array, ""]:
    """Sum what each token of an answer gives (token), or the mean of each answer (sequence)."""
    # A product with the mask would keep what is no number outside of it.
    terms = jnp.where(loss_mask, terms, 0.0)
    if loss_level == "sequence":
        terms = terms / answer_lengths(loss_mask)[:, None]
    return jnp.sum(terms)


def make_policy_weight(settings: RlhfConfig) -> LossWeight:
    """Make the function that counts what the loss is a mean over: tokens, or answers."""

    def loss_weight(batch: dict[str, Array]) -> Float[Array, ""]:
        mask = batch["loss_mask"]
        # The last axis, since on a mesh the rows of a step are cut into passes already.
        counted = mask if settings.loss_level == "token" else jnp.any(mask, axis=-1)
        return jnp.sum(counted, dtype=jnp.float32)

    return loss_weight


def make_policy_loss(settings: RlhfConfig) -> LossSums:
    """Make the function that sums the losses of a batch's sampled tokens.

    GRPO adds the divergence from the reference; PPO, whose rewards hold it already, the loss of the
    value function.

    What it tells, each a sum of the same weights:

    - `loss`: all that is minimised, without what routers add; `policy_loss` alone.
    - `kl`: divergence from the reference, and `old_kl` from the policy that sampled, both k3.
    - `entropy`; `ratio` of the probability to the old one; `clip_fraction` of tokens whose loss
      tells the policy nothing since they are outside the range.
    - ppo: `value_loss`, and `return`, `return_square`, `value_error` and `value_error_square`, of
      which `explained_variance` is made.
    """
    loss_weight = make_policy_weight(settings)

    def loss_sums(
        model: Any, batch: dict[str, Array], dropout_key: PRNGKeyArray | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        mask = batch["loss_mask"]
        hidden = model.hidden(batch["tokens"], counted=mask, dropout_key=dropout_key)
        log_probs, entropies = measure_logits(
            model,
            hidden.states,
            lambda logits, targets: (target_log_probs(logits, targets), entropy(logits)),
            batch["targets"],
        )
        values = model.scores(hidden.states) if settings.algorithm == "ppo" else None
        told = policy_terms(log_probs, values, batch, settings=settings)
        told["entropy"] = entropies
        sums = {
            name: sum_over_answers(terms, mask, loss_level=settings.loss_level)
            for name, terms in told.items()
        }
        return add_router_losses(
            sums["loss"], sums, hidden.routing, model.config, weight=loss_weight(batch)
        )

    return loss_sums


def policy_terms(
    log_probs: Float[Array, "batch seq"],
    values: Float[Array, "batch seq"] | None,
    batch: Mapping[str, Array],
    *,
    settings: RlhfConfig,
) -> dict[str, Float[Array, "batch seq"]]:
    """Give the loss of each token and what is told of it; only an answer's tokens mean anything.

    Args:
        log_probs: Of the targets, in nats.
        values: What is expected before each target, in reward units; None for GRPO.
        batch: `old_log_probs`, `reference_log_probs`, `advantages`, `loss_mask`; for PPO
            `old_values` and `returns`.
    """
    # Where nothing was sampled, an exponential could overflow, and make its gradient no number.
    mask = batch["loss_mask"]
    log_probs, old, reference, advantages = (
        jnp.where(mask, array, 0.0)
        for array in (
            log_probs,
            batch["old_log_probs"],
            batch["reference_log_probs"],
            batch["advantages"],
        )
    )
    ratios = jnp.exp(log_probs - old)
    too_high = (ratios > 1.0 + settings.clip_high) & (advantages > 0)
    too_low = (ratios < 1.0 - settings.clip_low) & (advantages < 0)
    told = {
        "policy_loss": clipped_policy_losses(
            log_probs,
            old,
            advantages,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
        ),
        "kl": kl_k3(log_probs, reference),
        "old_kl": kl_k3(log_probs, old),
        "ratio": ratios,
        "clip_fraction": (too_high | too_low).astype(ratios.dtype),
    }
    if values is None:
        return told | {"loss": told["policy_loss"] + settings.kl_coef * told["kl"]}
    returns = jnp.where(mask, batch["returns"], 0.0)
    old_values = jnp.where(mask, batch["old_values"], 0.0)
    errors = jnp.where(mask, returns - values, 0.0)
    told["value_loss"] = clipped_value_losses(
        jnp.where(mask, values, 0.0), old_values, returns, value_clip=settings.value_clip
    )
    told |= {
        "return": returns,
        "return_square": jnp.square(returns),
        "value_error": errors,
        "value_error_square": jnp.square(errors),
    }
    return told | {"loss": told["policy_loss"] + settings.value_coef * told["value_loss"]}


def explained_variance(means: Mapping[str, Any]) -> Any:
    """Give the share of the variance of returns that the value function explains: 1 is all.

    Args:
        means: What the step told of a PPO batch.
    """
    left = means["value_error_square"] - means["value_error"] ** 2
    whole = means["return_square"] - means["return"] ** 2
    return 1.0 - left / whole
