"""Losses on logits, summed over targets; what they are divided by is the train step's business."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def cross_entropy_sum(
    logits: Float[Array, "batch seq vocab"],
    targets: Int[Array, "batch seq"],
    loss_mask: Bool[Array, "batch seq"],
) -> Float[Array, ""]:
    """Sum -log p(target) over the targets where `loss_mask` is True.

    Computed in the type of the logits, which is float32 or wider.

    Returns:
        Nats.
    """
    largest = jnp.max(logits, axis=-1, keepdims=True)
    log_sum = jnp.log(jnp.sum(jnp.exp(logits - largest), axis=-1)) + largest[..., 0]
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(loss_mask, log_sum - chosen, 0.0))
