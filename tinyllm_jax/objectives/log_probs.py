"""Log-probabilities of tokens and answers, of which the losses after pretraining are made."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def target_log_probs(
    logits: Float[Array, "batch seq vocab"], targets: Int[Array, "batch seq"]
) -> Float[Array, "batch seq"]:
    """Give log p(target) at each position, in the type of the logits, which is float32 or wider.

    Returns:
        Nats; of targets that are no answer's, too.
    """
    largest = jnp.max(logits, axis=-1, keepdims=True)
    log_sum = jnp.log(jnp.sum(jnp.exp(logits - largest), axis=-1)) + largest[..., 0]
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - log_sum


def answer_log_probs(
    log_probs: Float[Array, "batch seq"], loss_mask: Bool[Array, "batch seq"]
) -> Float[Array, " batch"]:
    """Sum the log-probabilities of the tokens of each row's answer, in nats."""
    return jnp.sum(jnp.where(loss_mask, log_probs, 0.0), axis=-1)


def answer_lengths(loss_mask: Bool[Array, "batch seq"]) -> Float[Array, " batch"]:
    """Count the tokens of each row's answer; 1 where there is none, to divide by."""
    return jnp.maximum(jnp.sum(loss_mask, axis=-1, dtype=jnp.float32), 1.0)


def entropy(logits: Float[Array, "batch seq vocab"]) -> Float[Array, "batch seq"]:
    """Give the entropy of the next token at each position, in nats."""
    log_probs = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


def log_sigmoid(x: Float[Array, " rows"]) -> Float[Array, " rows"]:
    """Give log(1 / (1 + exp(-x))) without overflow."""
    return -jnp.logaddexp(0.0, -x)
