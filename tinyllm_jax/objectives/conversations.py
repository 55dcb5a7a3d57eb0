"""Supervised fine-tuning: predict the answers of conversations, and nothing else of them."""

import math

from tinyllm_jax.config import Config
from tinyllm_jax.data.prepare import PreparedData
from tinyllm_jax.objectives.pretrain import make_next_token_objective
from tinyllm_jax.training.loop import Objective


def make_fine_tuning(config: Config, prepared: PreparedData) -> Objective:
    """Give `fit` the batches and the loss of answers, the `<|im_end|>` that closes each included."""
    validation = prepared.validation
    bytes_per_target = validation.text_bytes / max(validation.learnt_tokens, 1)

    def describe(loss: float) -> dict[str, float]:
        return {
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": loss / math.log(2) / bytes_per_target,
        }

    return make_next_token_objective(config, prepared, describe_loss=describe)
