"""What the tests of losses after pretraining share: a model that is a table, and batches of answers.

A loss is looked at in two ways: as a function of logits and scores that are given, which a loop in
NumPy computes as well, and as a function of a real model's weights, in both packages.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from llama_oracle import SMALL, changed, random_weights
from parity import as_torch_batch, torch_model

from tinyllm_jax.config import ModelConfig
from tinyllm_jax.model import weights as jax_weights
from tinyllm_torch.model import weights as torch_weights

WIDE = changed(SMALL, compute_dtype="float64", score_head=True)
WIDE_EXPERTS = dataclasses.replace(
    WIDE,
    num_experts=4,
    num_shared_experts=1,
    moe_intermediate_size=12,
    router_z_loss_coef=0.01,
    tie_word_embeddings=False,
)
PLACES, VOCAB = 9, WIDE.vocab_size
# Of a difference quotient of a function that is exact to float64.
SLOPE_TOLERANCE = 1e-6


def answer_mask(spans: list[list[tuple[int, int]]], places: int = PLACES) -> np.ndarray:
    """Mark the targets that are a row's answer: from the first of each span to before the second."""
    mask = np.zeros((len(spans), places), bool)
    for row, parts in enumerate(spans):
        for start, stop in parts:
            mask[row, start:stop] = True
    return mask


def random_rows(numbers: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    """Draw tokens and the targets that follow them."""
    tokens = numbers.integers(0, VOCAB, (rows, PLACES + 1)).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


class Table:
    """Stands for a model whose logits and scores are given."""

    def __init__(self, logits: Any, scores: Any):
        self.config = ModelConfig()
        self._given = logits, scores

    def hidden(self, tokens: Any, *, counted: Any, **_: Any) -> SimpleNamespace:
        assert tokens.shape == counted.shape
        return SimpleNamespace(states=self._given[0], routing=None)

    def logits(self, states: Any) -> Any:
        return states

    def scores(self, _states: Any) -> Any:
        return self._given[1]


def of_tables(
    package: str, loss_sums: Any, logits: np.ndarray, scores: np.ndarray, batch: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Give all that a loss tells of a table, and the slopes of what is minimised, in float64."""
    if package == "jax":
        with jax.enable_x64(True):
            rows = {name: jnp.asarray(array) for name, array in batch.items()}

            def minimised(given: Any) -> Any:
                return loss_sums(Table(*given), rows, None)

            run = jax.jit(jax.value_and_grad(minimised, has_aux=True))
            (loss, told), slopes = run((jnp.asarray(logits), jnp.asarray(scores)))
            found = {**told, "minimised": loss, "by_logits": slopes[0], "by_scores": slopes[1]}
            return {name: np.asarray(value) for name, value in found.items()}
    given = [torch.tensor(array, requires_grad=True) for array in (logits, scores)]
    loss, told = loss_sums(Table(*given), as_torch_batch(batch), None)
    slopes = torch.autograd.grad(loss, given, materialize_grads=True)
    found = {**told, "minimised": loss, "by_logits": slopes[0], "by_scores": slopes[1]}
    return {name: value.detach().numpy() for name, value in found.items()}


def of_models(
    package: str, loss_sums: Any, config: ModelConfig, batch: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Give all that a loss tells of a random model, and its gradient by every weight."""
    weights = random_weights(config)
    if package == "jax":
        with jax.enable_x64(True):
            structure, _ = jax_weights.model_structure(config)

            def minimised(weights: Any) -> Any:
                return loss_sums(jax_weights.merge_weights(structure, weights), rows, None)

            rows = {name: jnp.asarray(array) for name, array in batch.items()}
            run = jax.jit(jax.value_and_grad(minimised, has_aux=True))
            (loss, told), gradients = run({name: jnp.asarray(w) for name, w in weights.items()})
            named = torch_weights.from_jax_weights(gradients)
        return {**jax.device_get(told), "minimised": np.asarray(loss), **named}
    model = torch_model(config, weights)
    loss, told = loss_sums(model, as_torch_batch(batch), None)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    found = {**told, "minimised": loss, **dict(zip(names, gradients, strict=True))}
    return {name: value.detach().numpy() for name, value in found.items()}


def of_function(package: str, function: Any, *arrays: np.ndarray, **settings: Any) -> np.ndarray:
    """Call a function of arrays of either package in float64."""
    if package == "jax":
        with jax.enable_x64(True):
            return np.asarray(function(*(jnp.asarray(array) for array in arrays), **settings))
    return function(*(torch.tensor(array) for array in arrays), **settings).numpy()


def slopes_of(function: Callable[[np.ndarray], float], at: np.ndarray) -> np.ndarray:
    """Measure the slopes of a function by small steps to either side."""
    slopes, step = np.zeros_like(at), 1e-5
    for place in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[place] += step
        down[place] -= step
        slopes[place] = (function(up) - function(down)) / (2 * step)
    return slopes


def log_softmax(logits: np.ndarray) -> list[float]:
    """Give the log-probabilities of one position, one at a time."""
    whole = np.log(sum(np.exp(float(logit)) for logit in logits))
    return [float(logit) - whole for logit in logits]
