"""Batches of a chosen and a rejected answer each, and what a reference model makes of them."""

import hashlib
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from tinyllm_jax.config import Config, data_dir
from tinyllm_jax.data.batches import epoch_rows
from tinyllm_jax.data.files import replacing
from tinyllm_jax.data.prepare import hash_of
from tinyllm_jax.data.prepare_chat import PreferenceData, PreferenceSplit
from tinyllm_jax.model.compiled import compiled
from tinyllm_jax.model.weights import Weights, merge_weights, model_structure
from tinyllm_jax.objectives.head_blocks import measure_logits
from tinyllm_jax.objectives.log_probs import answer_log_probs, target_log_probs
from tinyllm_jax.objectives.preference import PAIR, both_answers, count_pairs, make_preference_loss
from tinyllm_jax.objectives.reward import make_reward_loss
from tinyllm_jax.training.loop import HostBatch, Objective
from tinyllm_jax.training.step import LossSums

# Summed log-probabilities of both answers of each pair, by split.
References = Mapping[str, np.ndarray]


def make_preference_objective(
    config: Config, data: PreferenceData, references: References | None
) -> Objective:
    """Give `fit` pairs and the loss of `dpo.loss`.

    Args:
        references: What `reference_log_probs` gives; None for a loss without a reference.
    """
    return make_pair_objective(config, data, references, loss_sums=make_preference_loss(config.dpo))


def make_reward_objective(config: Config, data: PreferenceData) -> Objective:
    """Give `fit` pairs and the loss of a reward model."""
    return make_pair_objective(config, data, None, loss_sums=make_reward_loss())


def make_pair_objective(
    config: Config, data: PreferenceData, references: References | None, *, loss_sums: LossSums
) -> Objective:
    """Give `fit` pairs: every one comes once an epoch, in an order of its own for each."""
    size, seed = config.rows_per_step, config.train.seed

    def read(split: PreferenceSplit, name: str, numbers: np.ndarray) -> HostBatch:
        rows = split.read(numbers)
        if references is not None:
            found = np.where(numbers[:, None] < 0, 0.0, references[name][numbers])
            rows |= {f"reference_{kind}": found[:, i] for i, kind in enumerate(PAIR)}
        return rows

    def train_batch(number: int, rows: np.ndarray | None = None) -> HostBatch:
        chosen = epoch_rows(number * size, size=size, count=data.train.pairs, seed=seed)
        return read(data.train, "train", chosen if rows is None else chosen[rows])

    def evaluation_batches(rows: np.ndarray | None = None) -> Iterator[HostBatch]:
        every = numbers_in_batches(data.validation.pairs, size=config.train.batch_size)
        for numbers in every[: config.train.eval_batches or None]:
            yield read(data.validation, "validation", numbers if rows is None else numbers[rows])

    return Objective(
        loss_sums=loss_sums,
        loss_weight=count_pairs,
        train_batch=train_batch,
        evaluation_batches=evaluation_batches,
        describe_loss=lambda _: {},
        shown=("accuracy", "margin"),
    )


def numbers_in_batches(count: int, *, size: int) -> list[np.ndarray]:
    """Number `count` pairs in batches of one size; -1 fills the last one up."""
    numbers = np.arange(-(-count // size) * size)
    return [*np.where(numbers < count, numbers, -1).reshape(-1, size)]


def reference_log_probs(
    config: Config, data: PreferenceData, weights: Weights, *, progress: bool
) -> dict[str, Float[np.ndarray, "pairs 2"]]:
    """Give the log-probabilities that the reference model has of both answers of every pair.

    They are computed once and kept in `data_dir()/reference/KEY.npz`, whose key is a hash of all that
    they depend on.

    Args:
        weights: Of the reference model, which has the shape of the model in training.

    Returns:
        Summed over the tokens of each answer, in nats, by split.
    """
    key = reference_key(config, data, weights)
    path = data_dir() / "reference" / f"{key}.npz"
    if path.is_file():
        try:
            with open(path, "rb") as file, np.load(file) as kept:
                return dict(kept)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            print(f"{path}: damaged ({error}), and made anew", file=sys.stderr)
    print(
        f"Reference log-probabilities of {data.train.pairs + data.validation.pairs:,} pairs are "
        f"computed once and kept in {path}",
        file=sys.stderr,
    )
    structure, _ = model_structure(config.model)

    @compiled
    def log_probs(weights: Weights, batch: dict[str, jax.Array]) -> jax.Array:
        model = merge_weights(structure, weights)
        tokens, targets, mask = (
            both_answers(batch, name) for name in ("tokens", "targets", "mask")
        )
        hidden = model.hidden(tokens, counted=mask).states
        by_token = measure_logits(model, hidden, target_log_probs, targets)
        return answer_log_probs(by_token, mask).reshape(-1, len(PAIR))

    found = {}
    for name, split in (("train", data.train), ("validation", data.validation)):
        batches = numbers_in_batches(split.pairs, size=config.train.batch_size)
        shown = tqdm(batches, desc=f"reference model, {name}", disable=not progress)
        rows = [np.asarray(log_probs(weights, split.read(numbers))) for numbers in shown]
        found[name] = np.concatenate(rows)[: split.pairs]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **found)  # type: ignore[arg-type]
    return found


def reference_key(config: Config, data: PreferenceData, weights: Weights) -> str:
    """Name what log-probabilities of a reference model depend on."""
    # The rows of a batch, too: another number of them is another program, with other last bits.
    program = [asdict(config.model), config.train.batch_size, jax.default_backend()]
    content = hashlib.sha256()
    for name in sorted(weights):
        content.update(name.encode())
        content.update(np.ascontiguousarray(weights[name]).data)
    return hash_of([content.hexdigest(), program, data.dataset_hash])[:16]
