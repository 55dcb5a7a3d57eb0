"""The model as one compiled program that gives log-probabilities of tokens."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from tinyllm_jax.evaluation.run import with_compute_dtype
from tinyllm_jax.inference.language_model import LanguageModel
from tinyllm_jax.model.compiled import compiled
from tinyllm_jax.model.weights import Weights, merge_weights, model_structure
from tinyllm_jax.objectives.log_probs import target_log_probs


class TokenScorer:
    """Scores tokens; compiled once for each shape of rows.

    Args:
        model: The model with its weights.
        compute_dtype: float32, or "model" for what the model's settings say.
    """

    def __init__(self, model: LanguageModel, *, compute_dtype: str):
        self._model = model
        config = with_compute_dtype(model.config, compute_dtype)
        self._is_double = config.compute_dtype == "float64"
        with jax.enable_x64(self._is_double):
            structure, _ = model_structure(config)

        @compiled
        def run(weights: Weights, tokens: Any, targets: Any, positions: Any, segments: Any) -> Any:
            module = merge_weights(structure, weights)
            hidden = module.hidden(tokens, positions, segments).states
            # Row by row, since the logits of all rows would be the largest array by far.
            return jax.lax.map(lambda row: score_row(module, *row), (hidden, targets))

        self._run = run

    def __call__(
        self,
        tokens: Int32[np.ndarray, "rows width"],
        targets: Int32[np.ndarray, "rows width"],
        positions: Int32[np.ndarray, "rows width"],
        segment_ids: Int32[np.ndarray, "rows width"],
    ) -> tuple[Float[np.ndarray, "rows width"], Bool[np.ndarray, "rows width"]]:
        """Give log p(target) in nats, and whether the target is the likeliest token."""
        # Without it JAX would make float64 float32.
        with jax.enable_x64(self._is_double):
            found = self._run(self._model.weights, tokens, targets, positions, segment_ids)
            log_probs, greedy = jax.device_get(found)
        return log_probs, greedy


def score_row(
    module: Any, hidden: Float[Array, "width hidden"], targets: Int[Array, " width"]
) -> tuple[Float[Array, " width"], Bool[Array, " width"]]:
    """Score the targets of one row."""
    logits = module.logits(hidden[None])
    log_probs = target_log_probs(logits, targets[None])[0]
    return log_probs, jnp.argmax(logits[0], axis=-1) == targets
