"""Pretraining: predict every next token of a corpus."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tinyllm_jax.config import Config
from tinyllm_jax.data.batches import Batch, Batches, EvaluationBatches
from tinyllm_jax.data.prepare import PreparedData
from tinyllm_torch.objectives.losses import head_cross_entropy_sum
from tinyllm_torch.objectives.router_losses import add_router_losses
from tinyllm_torch.training.loop import HostBatch, Objective


def make_pretraining(config: Config, prepared: PreparedData) -> Objective:
    """Give `fit` the batches and the loss of next-token prediction on a prepared corpus."""
    train = Batches(prepared.train, rows_per_step=config.rows_per_step, seed=config.train.seed)
    validation = EvaluationBatches(
        prepared.validation, batch_size=config.train.batch_size, count=config.train.eval_batches
    )
    return Objective(
        loss_sums=next_token_loss,
        loss_weight=count_targets,
        train_batch=lambda number: as_arrays(train.batch(number)),
        evaluation_batches=lambda: map(as_arrays, validation),
        describe_loss=loss_describer(prepared),
    )


def as_arrays(batch: Batch) -> HostBatch:
    """Name the arrays of a batch, without those it has not."""
    return {name: array for name, array in vars(batch).items() if array is not None}


def next_token_loss(
    model: Any, batch: dict[str, Tensor], generator: torch.Generator | None
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Sum the cross-entropy of every target of a batch, in nats, and what its routers add.

    Returns:
        What is minimised, and what is told: `loss` is the cross-entropy alone. With experts,
        `router_balance_loss` and `router_z_loss` are means over layers, without their weights in
        the sum; `expert_load` is each expert's share of its layer's choices. Tokens without a target
        count in none of them, so that passes of a step add up; only a balance over the whole pass
        (`router_aux_loss_level = "batch"`) is not the same over two halves.
    """
    hidden = model.hidden(
        batch["tokens"],
        batch.get("positions"),
        batch.get("segment_ids"),
        counted=batch["loss_mask"],
        generator=generator,
    )
    loss = head_cross_entropy_sum(model, hidden.states, batch["targets"], batch["loss_mask"])
    return add_router_losses(
        loss, {"loss": loss}, hidden.routing, model.config, weight=count_targets(batch)
    )


def count_targets(batch: dict[str, Tensor]) -> Float[Tensor, ""]:
    """Count the targets of a batch."""
    return torch.sum(batch["loss_mask"], dtype=torch.float32)


def loss_describer(prepared: PreparedData) -> Callable[[float], dict[str, float]]:
    """Make the function that says a validation loss in other units.

    - `perplexity`: exp of the loss.
    - `bits_per_byte`: bits to encode the validation text with the model, for each UTF-8 byte of it;
      comparable between vocabularies. The loss stands for every token that must be predicted,
      which in a stream includes the bos of each document.
    """
    validation = prepared.validation
    tokens = validation.tokens - (0 if validation.packing == "stream" else validation.documents)
    tokens_per_byte = tokens / validation.text_bytes

    def describe(loss: float) -> dict[str, float]:
        return {
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": loss / math.log(2) * tokens_per_byte,
        }

    return describe
