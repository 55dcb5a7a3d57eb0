"""A checkpoint of one way to learn made ready for another: control tokens, and a head for scores."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from tinyllm_jax.config import Config
from tinyllm_jax.data.chat_template import CONTROL_TOKENS
from tinyllm_jax.data.tokenizer import extend_tokenizer
from tinyllm_jax.model.weights import EMBEDDING, HEAD, SCORES
from tinyllm_jax.training.checkpoint import Checkpoint


def needs_scores(mode: str, algorithm: str) -> bool:
    """Tell whether a model gives a number for each position in a mode: a reward or a value."""
    return mode == "reward" or (mode == "rlhf" and algorithm == "ppo")


def for_conversations(checkpoint: Checkpoint, *, scores: bool, seed: int) -> Checkpoint:
    """Give a checkpoint the tokens of the chat template, and the head for scores, that it lacks.

    New tokens begin as the mean of all, which disturbs the others' probabilities the least (Hewitt
    2021, nlp.stanford.edu/~johnhew/vocab-expansion.html). An embedding that has more rows than its
    tokenizer has tokens gives them of these. New scores are 0 everywhere.

    Args:
        scores: Whether the model gives a number for each position; else such a head is left out.
        seed: Of the tie that new tokens, alike otherwise, would be in.
    """
    tokenizer = extend_tokenizer(checkpoint.tokenizer, CONTROL_TOKENS)
    model, known = checkpoint.config.model, checkpoint.tokenizer.vocab_size
    size = max(model.vocab_size, tokenizer.vocab_size)
    weights = dict(checkpoint.weights)
    for name, axis in ((EMBEDDING, 0), (HEAD, 1)):
        if name in weights and tokenizer.vocab_size > known:
            weights[name] = with_new_tokens(
                weights[name],
                known=known,
                wanted=tokenizer.vocab_size,
                size=size,
                axis=axis,
                seed=seed,
            )
    if scores:
        zeros = np.zeros((model.hidden_size, 1), weights[EMBEDDING].dtype)
        weights.setdefault(SCORES, zeros)
    else:
        weights.pop(SCORES, None)
    model = dataclasses.replace(model, vocab_size=size, score_head=scores)
    return dataclasses.replace(
        checkpoint,
        config=dataclasses.replace(checkpoint.config, model=model),
        weights=weights,
        tokenizer=tokenizer,
        tokenizer_hash=tokenizer.hash,
    )


def with_new_tokens(
    rows: np.ndarray, *, known: int, wanted: int, size: int, axis: int, seed: int
) -> np.ndarray:
    """Write rows for the tokens from `known` to `wanted` into a table of `size` rows.

    Each is the mean of the known ones, and a hundredth of their spread at random.
    """
    table = np.moveaxis(rows, axis, 0)
    # In float64 at least: sums of a whole vocabulary in bfloat16 would be far off.
    mean, spread = (each(table[:known], axis=0, dtype=np.float64) for each in (np.mean, np.std))
    draws = np.random.default_rng(seed).standard_normal((wanted - known, *mean.shape))
    new = np.zeros((size, *table.shape[1:]), rows.dtype)
    new[: len(table)] = table
    new[known:wanted] = mean + 0.01 * spread * draws
    return np.ascontiguousarray(np.moveaxis(new, 0, axis))


def model_table(config: Config) -> Mapping[str, object]:
    """Give the settings that a run takes over from the checkpoint it begins with, by dotted name."""
    table = {f"model.{name}": value for name, value in dataclasses.asdict(config.model).items()}
    return table | {"data.sequence_length": config.data.sequence_length}
