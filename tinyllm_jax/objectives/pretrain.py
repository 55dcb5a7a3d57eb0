"""Pretraining: predict every next token of a corpus."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from tinyllm_jax.config import Config
from tinyllm_jax.data.batches import Batch, Batches, EvaluationBatches
from tinyllm_jax.data.prepare import PreparedData
from tinyllm_jax.data.tokenizer import Tokenizer
from tinyllm_jax.data.toy_stories import entropy_bits_per_byte, floor_bits
from tinyllm_jax.objectives.device_rows import corpus_arrays, lies_on_device, row_reader
from tinyllm_jax.objectives.losses import head_cross_entropy_sum
from tinyllm_jax.objectives.router_losses import add_router_losses
from tinyllm_jax.training.distributed import hosts
from tinyllm_jax.training.loop import DeviceCorpus, HostBatch, Objective


def make_pretraining(config: Config, prepared: PreparedData) -> Objective:
    """Give `fit` the batches and the loss of next-token prediction on a prepared corpus."""
    floor = None
    is_toy = config.data.paths == ("toy",) and not config.data.validation_paths
    if is_toy and hosts().is_first:  # who reads all validation rows, and reports what follows
        floor = floor_of_rows(evaluation_rows(config, prepared), prepared.tokenizer)
    return make_next_token_objective(
        config, prepared, describe_loss=loss_describer(prepared, floor)
    )


def evaluation_rows(config: Config, prepared: PreparedData) -> EvaluationBatches:
    """Give the rows that every evaluation of a run looks at."""
    return EvaluationBatches(
        prepared.validation, batch_size=config.train.batch_size, count=config.train.eval_batches
    )


def make_next_token_objective(
    config: Config, prepared: PreparedData, *, describe_loss: Callable[[float], dict[str, float]]
) -> Objective:
    """Give `fit` rows of tokens, of which those with a True `loss_mask` are predicted."""
    validation = evaluation_rows(config, prepared)
    train = Batches(prepared.train, rows_per_step=config.rows_per_step, seed=config.train.seed)
    corpus = None
    if lies_on_device(config, prepared.train):
        corpus = DeviceCorpus(
            arrays=corpus_arrays(prepared.train),
            read_rows=row_reader(prepared.train),
            places=lambda number: {"places": train.places(number).astype(np.int32)},
        )
    return Objective(
        loss_sums=next_token_loss,
        loss_weight=count_targets,
        train_batch=lambda number, rows=None: as_arrays(train.batch(number, rows=rows)),
        evaluation_batches=lambda rows=None: (
            as_arrays(validation.batch(index, rows=rows)) for index in range(len(validation))
        ),
        describe_loss=describe_loss,
        corpus=corpus,
    )


def as_arrays(batch: Batch) -> HostBatch:
    """Name the arrays of a batch, without those it has not."""
    return {name: array for name, array in vars(batch).items() if array is not None}


def next_token_loss(
    model: Any, batch: dict[str, Array], dropout_key: PRNGKeyArray | None
) -> tuple[Float[Array, ""], dict[str, Array]]:
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
        dropout_key=dropout_key,
    )
    loss = head_cross_entropy_sum(model, hidden.states, batch["targets"], batch["loss_mask"])
    return add_router_losses(
        loss, {"loss": loss}, hidden.routing, model.config, weight=count_targets(batch)
    )


def count_targets(batch: dict[str, Array]) -> Float[Array, ""]:
    """Count the targets of a batch."""
    return jnp.sum(batch["loss_mask"], dtype=jnp.float32)


def loss_describer(
    prepared: PreparedData, floor: float | None
) -> Callable[[float], dict[str, float]]:
    """Make the function that says a validation loss in other units.

    - `perplexity`: exp of the loss.
    - `bits_per_byte`: bits to encode the validation text with the model, for each UTF-8 byte of it;
      comparable between vocabularies. The loss stands for every token that must be predicted,
      which in a stream includes the bos of each document.
    - `entropy_floor_bits_per_byte` and `above_floor_share`: where the text's own probability is known,
      the lowest value that any model can expect, and by which share the model is above it.
    """
    validation = prepared.validation
    tokens = validation.tokens - (0 if validation.packing == "stream" else validation.documents)
    tokens_per_byte = tokens / validation.text_bytes

    def describe(loss: float) -> dict[str, float]:
        bits_per_byte = loss / math.log(2) * tokens_per_byte
        described = {
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": bits_per_byte,
        }
        if floor is not None:
            described["entropy_floor_bits_per_byte"] = floor
            described["above_floor_share"] = bits_per_byte / floor - 1
        return described

    return describe


def floor_of_rows(batches: Iterable[Batch], tokenizer: Tokenizer) -> float:
    """Give the exact information, in bits per byte, in the toy stories that stand whole in rows.

    Rows too short for any story get the mean of the whole grammar.
    """
    stories = [
        tokenizer.decode(story)
        for batch in batches
        for row in np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1)
        for story in whole_documents(row, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    ]
    return floor_bits(stories).bits_per_byte if stories else entropy_bits_per_byte()


def whole_documents(
    row: Int32[np.ndarray, " tokens"], *, bos_id: int, eos_id: int
) -> Iterator[Int32[np.ndarray, " document"]]:
    """Cut a row of tokens into the documents that both begin and end in it."""
    start = None
    for place in np.flatnonzero((row == bos_id) | (row == eos_id)).tolist():
        if row[place] == bos_id:
            start = place
        elif start is not None:
            yield row[start : place + 1]
            start = None
